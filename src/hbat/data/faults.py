"""What can be wrong with parts of a row that several kinds of data share: values, prompts with answers, turns."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hbat.data.turns import TurnFault, text_turns, turn_faults, turn_marker

MISSING_COLUMN = "missing column"


UNREADABLE = {"missing value", "not text", "not a message", "empty conversation", "mixed formats"}


ASSISTANT = ("assistant",)


ASKING = ("user", "tool")


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be trained on.

    Attributes:
        kind: Short stable name, for counting.
        field: Where in the row, as one would index it.
        problem: The sentence, without its full stop.
    """

    kind: str
    field: str
    problem: str


RowCheck = Callable[[Mapping[str, Any]], Iterator[Fault]]


def value_faults(row: Mapping[str, Any], fields: Sequence[str]) -> Iterator[Fault]:
    """Check that fields hold something, all as text or all as messages.

    Args:
        row: The row.
        fields: Names of the fields.

    Yields:
        The faults.
    """
    found = False
    for field in fields:
        value = row.get(field)
        problem = None
        if value is None:
            problem = ("missing value", "there is no value")
        elif not isinstance(value, str | list | tuple):
            problem = ("not text", f"{value!r:.60} is neither text nor a list of messages")
        elif not value and not isinstance(value, str):
            problem = ("empty conversation", "the list of messages is empty")
        elif isinstance(value, str) and not value.strip():
            problem = ("empty text", "the text is empty")
        if problem:
            found = True
            yield Fault(problem[0], field, problem[1])
    texts = [field for field in fields if isinstance(row.get(field), str)]
    if not found and 0 < len(texts) < len(fields):
        others = ", ".join(f"`{field}`" for field in fields if field not in texts)
        yield Fault(
            "mixed formats", texts[0], f"it is text, but {others} is a list of messages; give both in one form"
        )


def prompted_faults(row: Mapping[str, Any], sides: Sequence[str]) -> Iterator[Fault]:
    """Check a prompt and the answers to it.

    Args:
        row: The row, with the field `prompt`.
        sides: Fields of the answers.

    Yields:
        The faults.
    """
    fields = ("prompt", *sides)
    found = list(value_faults(row, fields))
    yield from found
    if found:
        return
    if not isinstance(row["prompt"], str):
        yield from in_messages("prompt", turn_faults(row["prompt"], last=ASKING))
        for side in sides:
            yield from in_messages(side, turn_faults(row[side], first=ASSISTANT, last=ASSISTANT))
        return
    for side in sides:
        turns = text_turns(row["prompt"] + row[side])
        if turns:
            yield from in_text(side, turn_faults(turns, last=ASSISTANT))
        elif marker := turn_marker(row[side], "assistant"):
            yield Fault("role marker", side, marker)


def in_messages(field: str, found: Iterator[TurnFault]) -> Iterator[Fault]:
    """Place faults of turns in a field that holds messages.

    Args:
        field: The field.
        found: Faults of its turns.

    Yields:
        The same, as faults of the row.
    """
    for index, part, kind, problem in found:
        yield Fault(kind, f"{field}[{index}]{part and '.'}{part}", problem)


def in_text(field: str, found: Iterator[TurnFault]) -> Iterator[Fault]:
    """Place faults of turns in a field that holds them written out.

    Args:
        field: The field.
        found: Faults of its turns.

    Yields:
        The same, as faults of the row.
    """
    for index, _, kind, problem in found:
        yield Fault(kind, field, f"turn {index + 1} in the text: {problem}")


#: What TRL makes out of text; where the column is there already, it trains on that.
RESERVED = ("labels", "completion_mask", "assistant_masks", "seq_lengths")


#: What TRL takes for log-probabilities of the reference policy, which here is the model at the stage's start.
OF_THE_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")


#: TRL tells text from conversations by any one of these columns, no matter which ones it trains on.
_TELLING = ("prompt", "chosen", "rejected", "completion", "messages")


def reserved_faults(row: Mapping[str, Any], names: Collection[str]) -> Iterator[Fault]:
    """Find columns with names that TRL keeps for itself.

    Args:
        row: The row.
        names: The names.

    Yields:
        The faults.
    """
    for name in names:
        if name in row:
            yield Fault(
                "reserved column",
                name,
                "TRL takes a column of this name for its own (labels, masks, log-probabilities, text to end); "
                "rename or remove it",
            )


def companion_faults(row: Mapping[str, Any], used: Collection[str]) -> Iterator[Fault]:
    """Find columns that are not trained on, but make TRL take text for a conversation or the other way round.

    Args:
        row: The row.
        used: The columns that are trained on.

    Yields:
        The faults.
    """
    conversational = any(isinstance(row.get(name), list | tuple) for name in used)
    for name in _TELLING:
        if name in used or name not in row:
            continue
        if conversational and not _is_conversation(row[name]):
            problem = "it holds no messages, but the data does"
        elif not conversational and isinstance(row[name], list | tuple):
            problem = "it holds a list, but the data is text"
        else:
            continue
        advice = "TRL may take either to tell text from messages; rename or remove this column"
        yield Fault("mixed formats", name, f"{problem}. {advice}")


def argument_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find arguments of the chat template that it cannot take.

    Args:
        row: The row.

    Yields:
        The faults.
    """
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], Mapping):
        yield Fault(
            "bad template arguments", "chat_template_kwargs", "it is no mapping; `{}` says that there are none"
        )
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            yield Fault("bad tools", "tools", "it is text, but not JSON")
            return
    if tools is None:
        return
    if not isinstance(tools, list | tuple) or not all(isinstance(each, Mapping) for each in tools):
        yield Fault("bad tools", "tools", f"{tools!r:.60} is not a list of descriptions of tools (mappings)")


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
