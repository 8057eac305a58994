"""Faults that rows of several formats share: of values, prompts with answers, messages, and columns TRL reserves."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hbat.data.turns import Turn, text_turns, turn_faults, turn_marker

MISSING_COLUMN = "missing column"
UNREADABLE = {"missing value", "not text", "not a message", "empty conversation", "mixed formats"}

ASSISTANT = ("assistant",)
ASKING = ("user", "tool")

#: Columns that TRL derives from text; if they exist already, it trains on them.
RESERVED = ("labels", "completion_mask", "assistant_masks", "seq_lengths")

#: Columns that TRL reads as log-probabilities of the reference policy, which here is the model at the stage's start.
OF_THE_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")

#: TRL calls a data set conversational if any of these columns is, whichever ones it trains on.
_TELLING = ("prompt", "chosen", "rejected", "completion", "messages")


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be trained on.

    Attributes:
        kind: Short stable name, by which faults are counted.
        field: Place in the row, as one would index it.
        problem: A sentence without its full stop.
    """

    kind: str
    field: str
    problem: str


#: Yields the faults of a row; none for a good one.
RowCheck = Callable[[Mapping[str, Any]], Iterator[Fault]]


def value_faults(row: Mapping[str, Any], fields: Sequence[str]) -> Iterator[Fault]:
    """Check that fields hold something, and that all hold text or all hold messages."""
    found = False
    for field in fields:
        value = row.get(field)
        problem = None
        if value is None:
            problem = ("missing value", "the value is missing")
        elif not isinstance(value, str | list | tuple):
            problem = ("not text", f"{value!r:.60} is neither a string nor a list of messages")
        elif not value and not isinstance(value, str):
            problem = ("empty conversation", "the list of messages is empty")
        elif isinstance(value, str) and not value.strip():
            problem = ("empty text", "the text is empty")
        if problem:
            found = True
            yield Fault(problem[0], field, problem[1])
    texts = [field for field in fields if isinstance(row.get(field), str)]
    if not found and 0 < len(texts) < len(fields):
        others = " and ".join(f"`{field}`" for field in fields if field not in texts)
        yield Fault("mixed formats", texts[0], f"it is a string, but there are messages in {others}; use one format")


def prompted_faults(row: Mapping[str, Any], sides: Sequence[str]) -> Iterator[Fault]:
    """Check a prompt and the answers to it, which stand in the fields `sides`."""
    found = list(value_faults(row, ("prompt", *sides)))
    yield from found
    if found:
        return
    if not isinstance(row["prompt"], str):
        yield from message_faults("prompt", row["prompt"], last=ASKING)
        for side in sides:
            yield from message_faults(side, row[side], first=ASSISTANT, last=ASSISTANT)
        return
    for side in sides:
        if turns := text_turns(row["prompt"] + row[side]):
            yield from dialogue_faults(side, turns, last=ASSISTANT)
        elif marker := turn_marker(row[side], "assistant"):
            yield Fault("role marker", side, marker)


def message_faults(field: str, messages: Sequence[Any], **rules: Any) -> Iterator[Fault]:
    """Check a field that holds messages; the rules are those of `turn_faults`."""
    for index, key, kind, problem in turn_faults(messages, **rules):
        yield Fault(kind, f"{field}[{index}]{key and '.'}{key}", problem)


def dialogue_faults(field: str, turns: Sequence[Turn], **rules: Any) -> Iterator[Fault]:
    """Check a field of text that was split into turns; the rules are those of `turn_faults`."""
    for index, _, kind, problem in turn_faults(turns, **rules):
        yield Fault(kind, field, f"turn {index + 1} of the text: {problem}")


def reserved_faults(row: Mapping[str, Any], names: Collection[str]) -> Iterator[Fault]:
    """Find columns whose names TRL reserves."""
    for name in names:
        if name in row:
            yield Fault(
                "reserved column",
                name,
                "TRL reserves this name for a column of its own (labels, masks, log-probabilities or text); rename or "
                "remove it",
            )


def companion_faults(row: Mapping[str, Any], used: Collection[str]) -> Iterator[Fault]:
    """Find columns that are not `used`, but make TRL mistake text for a conversation or a conversation for text."""
    conversational = any(isinstance(row.get(name), list | tuple) for name in used)
    for name in _TELLING:
        if name in used or name not in row:
            continue
        if conversational and not _is_conversation(row[name]):
            problem = "it holds no messages, but the columns trained on do"
        elif not conversational and isinstance(row[name], list | tuple):
            problem = "it holds a list, but the columns trained on hold text"
        else:
            continue
        advice = "TRL may detect the format from this column; rename or remove it"
        yield Fault("mixed formats", name, f"{problem}. {advice}")


def argument_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Check the arguments of the chat template that a row brings along."""
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], Mapping):
        yield Fault("bad template arguments", "chat_template_kwargs", "it is not a mapping; use `{}` for no arguments")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            yield Fault("bad tools", "tools", "the string is not valid JSON")
            return
    if tools is None:
        return
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        yield Fault("bad tools", "tools", f"{tools!r:.60} is not a list of tool schemas")


def not_a_label(label: Any) -> str:
    """Say that a value does not judge an answer."""
    return f"{label!r:.60} is neither true (desirable) nor false (undesirable)"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
