"""What is wrong with one row of prompts or of KTO data: pure checks on mappings. Standard library only."""

from collections.abc import Iterator, Mapping
from typing import Any

from hbat.host_columns import OF_THE_REFERENCE, argument_faults, companion_faults, reserved_faults
from hbat.row_parts import ASKING, MISSING_COLUMN, Fault, in_messages, in_text, prompted_faults, value_faults
from hbat.rows import preference_faults
from hbat.turns import text_turns, turn_faults

PROMPT_FORMAT = "data of an online objective has `prompt` (text or messages); other columns go to the reward functions"
KTO_FORMATS = "KTO data has `prompt`, `completion`, `label`; or `prompt`, `chosen`, `rejected`"


def prompt_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what is wrong with a row for a trainer that generates the answers itself.

    Args:
        row: The row.

    Yields:
        The faults; none for a good row.
    """
    if "prompt" not in row:
        yield Fault(MISSING_COLUMN, "prompt", PROMPT_FORMAT)
        return
    found = list(value_faults(row, ("prompt",)))
    yield from argument_faults(row)
    yield from found
    if found:
        return
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        yield from in_messages("prompt", turn_faults(prompt, last=ASKING))
    elif turns := text_turns(prompt):
        begun = turns[-1]["role"] == "assistant"  # the answer, of which the marker alone stands there as a rule
        yield from in_text("prompt", turn_faults(turns[:-1] if begun else turns))


def kto_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what is wrong with a row for TRL's `KTOTrainer`, which takes pairs as well and takes them apart.

    Args:
        row: The row.

    Yields:
        The faults; none for a good row.
    """
    if "chosen" in row and "rejected" in row:
        yield from preference_faults(row)
        # TRL takes the pair apart into these columns, but those of the pair's row win.
        yield from reserved_faults(row, ("completion", "label"))
        return
    missing = [field for field in ("prompt", "completion", "label") if field not in row]
    if missing:
        yield Fault(MISSING_COLUMN, missing[0], KTO_FORMATS)
        return
    yield from argument_faults(row)
    yield from prompted_faults(row, ("completion",))
    yield from companion_faults(row, ("prompt", "completion"))
    yield from reserved_faults(row, OF_THE_REFERENCE)
    label = row["label"]
    if label is None:
        yield Fault("missing value", "label", "there is no value")
    elif not isinstance(label, bool):
        yield Fault("not a label", "label", f"{label!r:.60} is neither true (a good answer) nor false (a bad one)")
