"""Columns that TRL reads beside those that hold the data, as arguments or as its own. Standard library only."""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hbat.row_parts import Fault

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
