"""What can be wrong with parts of a row that several kinds of data share: values, prompts with answers, turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hbat.turns import TurnFault, text_turns, turn_faults, turn_marker

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
