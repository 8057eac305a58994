"""Faults of one row of SFT, preference, KTO or prompt data: pure checks on mappings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hbat.data.faults import (
    ASKING,
    ASSISTANT,
    MISSING_COLUMN,
    OF_THE_REFERENCE,
    RESERVED,
    UNREADABLE,
    Fault,
    RowCheck,
    argument_faults,
    companion_faults,
    dialogue_faults,
    message_faults,
    not_a_label,
    prompted_faults,
    reserved_faults,
    value_faults,
)
from hbat.data.turns import Turn, answer_start, text_turns, turn_marker

SFT_FORMATS = (
    "SFT expects `{text}`; `messages`; `conversations` (from, value); `prompt`, `completion`; or `input_ids` "
    "(tokenized)"
)
PREFERENCE_FORMATS = (
    "DPO expects `prompt`, `chosen`, `rejected`; or `chosen`, `rejected` that both begin with the prompt"
)
KTO_FORMATS = "KTO expects `prompt`, `completion`, `label`; or `prompt`, `chosen`, `rejected`"
PROMPT_FORMAT = "online objectives expect `prompt` (text or messages); reward functions receive the other columns"

#: Columns that hold data in one of the formats.
FIELDS = ("text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "input_ids", "label")

_PER_TOKEN = ("labels", "completion_mask", "assistant_masks", "attention_mask")
_IGNORED = -100  # the label that torch's cross-entropy ignores


def sft_faults(row: Mapping[str, Any], *, text_field: str = "text") -> Iterator[Fault]:
    """Find the faults of a row for TRL's `SFTTrainer` with `dataset_text_field=text_field`; none for a good one."""
    # Columns are looked for in the order of that trainer.
    if "input_ids" in row:
        yield from _token_faults(row)
        return
    yield from reserved_faults(row, RESERVED)
    yield from argument_faults(row)
    if "prompt" in row:
        yield from _answered_faults(row, text_field)
    elif "conversations" in row:
        yield from _conversation_faults(row, "conversations", ("from", "value"))
    elif "messages" in row:
        yield from _conversation_faults(row, "messages", ("role", "content"))
    elif text_field in row:
        yield from _text_faults(row, text_field)
        yield from companion_faults(row, (text_field,))
    else:
        yield Fault(MISSING_COLUMN, text_field, SFT_FORMATS.format(text=text_field))


def preference_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find the faults of a row for TRL's `DPOTrainer`; none for a good one."""
    missing = [field for field in ("chosen", "rejected") if field not in row]
    if missing:
        tokens = [field for field in row if field.endswith(("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"))]
        reason = f"TRL's DPO does not accept tokenized data (`{tokens[0]}`); provide text. " if tokens else ""
        yield Fault(MISSING_COLUMN, missing[0], f"{reason}{PREFERENCE_FORMATS}")
        return
    check = prompted_faults if "prompt" in row else _unprompted_faults
    found = [*check(row, ("chosen", "rejected")), *argument_faults(row)]
    found += companion_faults(row, ("chosen", "rejected", "prompt"))
    found += reserved_faults(row, OF_THE_REFERENCE)
    yield from found
    if any(fault.kind in UNREADABLE for fault in found):
        return
    if row["chosen"] == row["rejected"]:
        yield Fault("identical pair", "rejected", "it is identical to `chosen`")
    elif _folded(row["chosen"]) == _folded(row["rejected"]):
        yield Fault("nearly identical pair", "rejected", "it differs from `chosen` only in letter case or whitespace")


def kto_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find the faults of a row for TRL's `KTOTrainer`, which also takes pairs and splits them; none for a good one."""
    if "chosen" in row and "rejected" in row:
        yield from preference_faults(row)
        # TRL splits the pair into these columns, but those of the row take precedence.
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
        yield Fault("missing value", "label", "the value is missing")
    elif not isinstance(label, bool):
        yield Fault("not a label", "label", not_a_label(label))


def prompt_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find the faults of a row for a trainer that generates the answers itself; none for a good one."""
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
        yield from message_faults("prompt", prompt, last=ASKING)
    elif turns := text_turns(prompt):
        begun = turns[-1]["role"] == "assistant"  # the answer, usually no more than its marker
        yield from dialogue_faults("prompt", turns[:-1] if begun else turns)


#: What rows are for, by the check of the objective that trains on them.
_KINDS: dict[Any, str] = {
    sft_faults: "sft",
    preference_faults: "preference",
    kto_faults: "kto",
    prompt_faults: "prompts",
}


def kind_of(check: RowCheck | None) -> str | None:
    """What rows are for that a check is made for; None if that is not known."""
    return _KINDS.get(getattr(check, "func", check))


def text_field_of(check: RowCheck | None) -> str:
    """Column of TRL's SFT texts that a check was made for."""
    return str(getattr(check, "keywords", {}).get("text_field", "text"))


def _answered_faults(row: Mapping[str, Any], text_field: str) -> Iterator[Fault]:
    if "completion" not in row:
        reason = "a `prompt` needs a `completion`; remove `prompt` if another column holds the full text"
        yield Fault(MISSING_COLUMN, "completion", f"{reason}. {SFT_FORMATS.format(text=text_field)}")
        return
    yield from prompted_faults(row, ("completion",))
    yield from companion_faults(row, ("prompt", "completion"))
    if isinstance(row.get("conversations"), list | tuple):
        yield Fault("mixed formats", "conversations", "TRL would read the messages from it; rename or remove it")
    if isinstance(row["prompt"], str):  # TRL would append the end-of-sequence token to it, not to the completion
        yield from reserved_faults(row, (text_field,))


def _text_faults(row: Mapping[str, Any], field: str) -> Iterator[Fault]:
    value = row.get(field)
    if isinstance(value, list | tuple):
        yield Fault("not text", field, "it is a list; rename the column to `messages` if it holds messages")
    elif not isinstance(value, str) or not value.strip():
        yield from value_faults(row, (field,))
    elif turns := text_turns(value):
        yield from dialogue_faults(field, turns)
    elif value.lstrip().startswith("Assistant:"):
        yield Fault("role marker", field, "it begins with `Assistant:`, an answer without its question")


def _conversation_faults(row: Mapping[str, Any], field: str, keys: tuple[str, str]) -> Iterator[Fault]:
    value = row.get(field)
    if isinstance(value, str):
        yield Fault("not text", field, "it is a string; rename the column to `text` or provide a list of messages")
    elif not isinstance(value, list | tuple) or not value:
        yield from value_faults(row, (field,))
    elif field == "conversations" and isinstance(value[0], Mapping) and "role" in value[0]:
        problem = "the messages have `role` and `content`, which TRL reads from `messages`; rename the column"
        yield Fault("message without role", "conversations[0].from", problem)
    else:
        yield from message_faults(field, value, last=ASSISTANT, keys=keys)
    yield from companion_faults(row, (field,))


def _unprompted_faults(row: Mapping[str, Any], sides: Sequence[str]) -> Iterator[Fault]:
    found = list(value_faults(row, sides))
    yield from found
    if found:
        return
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str):
        found = [fault for side in sides for fault in message_faults(side, row[side], last=ASSISTANT)]
        yield from found
        if not any(fault.kind in UNREADABLE for fault in found):
            yield from _prompt_faults(chosen, rejected)
        return
    turns = text_turns(chosen), text_turns(rejected)
    if turns[0] and turns[1]:
        yield from dialogue_faults("chosen", turns[0], last=ASSISTANT)
        yield from dialogue_faults("rejected", turns[1], last=ASSISTANT)
        yield from _prompt_faults(*turns, indexed=False)
    elif chosen != rejected:
        yield from _remainder_faults(chosen, rejected)


def shared_beginning(chosen: str, rejected: str) -> int:
    """Count the characters with which both texts begin, which TRL takes for the prompt."""
    shared, end = 0, min(len(chosen), len(rejected))
    while shared < end:  # bisection: comparing slices is far cheaper than comparing characters
        middle = (shared + end + 1) // 2
        shared, end = (middle, end) if chosen[:middle] == rejected[:middle] else (shared, middle - 1)
    return shared


def _remainder_faults(chosen: str, rejected: str) -> Iterator[Fault]:
    shared = shared_beginning(chosen, rejected)
    if not shared:
        problem = "it has no common beginning with `rejected`, and there is no column `prompt`"
        yield Fault("no prompt", "chosen", problem)
        return
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[shared:].strip():
            yield Fault("empty text", field, "nothing follows the common beginning of `chosen` and `rejected`")
        elif marker := turn_marker(text[shared:], "assistant"):
            yield Fault("role marker", field, marker)


def _prompt_faults(chosen: Sequence[Turn], rejected: Sequence[Turn], *, indexed: bool = True) -> Iterator[Fault]:
    prompt, other = chosen[: answer_start(chosen)], rejected[: answer_start(rejected)]
    if not any(turn.get("role") == "user" for turn in prompt):
        yield Fault("no prompt", "chosen", "no user turn precedes the answer, and there is no column `prompt`")
        return
    if prompt == other:
        return
    pairs = enumerate(zip(prompt, other, strict=False))
    index = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(prompt), len(other)))
    yield Fault(
        "prompts differ",
        f"rejected[{index}]" if indexed else "rejected",
        f"turn {index + 1} differs from that of `chosen`; all turns before the answer must be the same",
    )


def _folded(side: Any) -> Any:
    if isinstance(side, str):
        return "".join(side.casefold().split())
    if all(_is_text_turn(turn) for turn in side):
        return [(turn.get("role"), _folded(turn.get("content"))) for turn in side]
    return side


def _is_text_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and not turn.get("tool_calls")


def _token_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    ids = row["input_ids"]
    if not isinstance(ids, list | tuple) or not ids:
        yield Fault("bad token ids", "input_ids", "there are no token ids")
        return
    for index, token in _unfit(ids, {int}, lowest=0):
        yield Fault("bad token ids", f"input_ids[{index}]", f"{token!r:.60} is not a non-negative integer")
    for field in _PER_TOKEN:
        if field in row:
            yield from _per_token_faults(field, row[field], len(ids))
    if "seq_lengths" in row:
        lengths = row["seq_lengths"]
        positive = isinstance(lengths, list | tuple) and all(type(length) is int and length > 0 for length in lengths)
        if not positive or sum(lengths) != len(ids):
            problem = f"it does not consist of positive integers that sum to {len(ids)}, the number of token ids"
            yield Fault("bad token ids", "seq_lengths", problem)


def _per_token_faults(field: str, values: Any, count: int) -> Iterator[Fault]:
    if not isinstance(values, list | tuple):
        yield Fault("bad token ids", field, "it is not a list; remove the column or provide one entry per token")
    elif len(values) != count:
        yield Fault("bad token ids", field, f"its length {len(values)} differs from that of `input_ids`, {count}")
    elif field == "labels" and all(label == _IGNORED for label in values):
        yield Fault("bad token ids", field, f"all labels are {_IGNORED}, so there is nothing to learn")
    else:
        for index, value in _unfit(values, {int} if field == "labels" else {int, bool}, lowest=_IGNORED):
            problem = f"{value!r:.60} is not an integer of at least {_IGNORED}"
            yield Fault("bad token ids", f"{field}[{index}]", problem)


def _unfit(values: Sequence[Any], kinds: set[type], *, lowest: int) -> Iterator[tuple[int, Any]]:
    if set(map(type, values)) <= kinds and min(values) >= lowest:
        return
    yield next((at, value) for at, value in enumerate(values) if type(value) not in kinds or value < lowest)
