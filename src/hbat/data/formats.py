"""What is wrong with one row of SFT or preference data: pure checks on mappings. Standard library only."""

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
    argument_faults,
    companion_faults,
    in_messages,
    in_text,
    prompted_faults,
    reserved_faults,
    value_faults,
)
from hbat.data.turns import Turn, answer_start, text_turns, turn_faults, turn_marker

SFT_FORMATS = (
    "`{text}`; `messages`; `conversations` (from, value); `prompt` with `completion`; or `input_ids` (tokenized)"
)


PREFERENCE_FORMATS = "`prompt`, `chosen`, `rejected`; or `chosen`, `rejected` that both begin with the prompt"


FIELDS = ("text", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "input_ids", "label")


_PER_TOKEN = ("labels", "completion_mask", "assistant_masks", "attention_mask")


_IGNORED = -100  # a label that counts for nothing


def sft_faults(row: Mapping[str, Any], *, text_field: str = "text") -> Iterator[Fault]:
    """Find what is wrong with a row for TRL's `SFTTrainer`, in the order in which that trainer looks for its fields.

    Args:
        row: The row.
        text_field: The column of plain text (`dataset_text_field` of `SFTConfig`).

    Yields:
        The faults; none for a good row.
    """
    if "input_ids" in row:
        yield from _token_faults(row)
        return
    yield from reserved_faults(row, RESERVED)
    yield from argument_faults(row)
    if "prompt" in row:
        yield from _answered_faults(row, text_field)
    elif "conversations" in row:
        yield from _dialogue_faults(row, "conversations", ("from", "value"))
        yield from companion_faults(row, ("conversations",))
    elif "messages" in row:
        yield from _dialogue_faults(row, "messages", ("role", "content"))
        yield from companion_faults(row, ("messages",))
    elif text_field in row:
        yield from _text_faults(row, text_field)
        yield from companion_faults(row, (text_field,))
    else:
        yield Fault(MISSING_COLUMN, text_field, f"SFT data has {SFT_FORMATS.format(text=text_field)}")


def preference_faults(row: Mapping[str, Any]) -> Iterator[Fault]:
    """Find what is wrong with a row for TRL's `DPOTrainer`.

    Args:
        row: The row.

    Yields:
        The faults; none for a good row.
    """
    missing = [field for field in ("chosen", "rejected") if field not in row]
    if missing:
        tokens = [field for field in row if field.endswith(("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"))]
        reason = f"TRL's DPO takes no tokenized data (`{tokens[0]}`): give it the texts. " if tokens else ""
        yield Fault(MISSING_COLUMN, missing[0], f"{reason}preference data has {PREFERENCE_FORMATS}")
        return
    check = prompted_faults if "prompt" in row else _unprompted_faults
    found = [*check(row, ("chosen", "rejected")), *argument_faults(row)]
    found += companion_faults(row, ("chosen", "rejected", "prompt"))
    found += reserved_faults(row, OF_THE_REFERENCE)
    yield from found
    if not any(fault.kind in UNREADABLE for fault in found):
        yield from _pair_faults(row["chosen"], row["rejected"])


def _answered_faults(row: Mapping[str, Any], text_field: str) -> Iterator[Fault]:
    if "completion" not in row:
        reason = "`prompt` needs it; remove `prompt` if another column holds the whole text"
        yield Fault(MISSING_COLUMN, "completion", f"{reason}. SFT data has {SFT_FORMATS.format(text=text_field)}")
        return
    yield from prompted_faults(row, ("completion",))
    yield from companion_faults(row, ("prompt", "completion"))
    if isinstance(row.get("conversations"), list | tuple):
        yield Fault("mixed formats", "conversations", "TRL takes it for the messages; rename or remove this column")
    if isinstance(row["prompt"], str):  # TRL would put the end token there and not behind the completion
        yield from reserved_faults(row, (text_field,))


def _text_faults(row: Mapping[str, Any], field: str) -> Iterator[Fault]:
    value = row.get(field)
    if isinstance(value, list | tuple):
        yield Fault("not text", field, "it is a list; name the column `messages` if it holds messages")
    elif not isinstance(value, str) or not value.strip():
        yield from value_faults(row, (field,))
    elif turns := text_turns(value):
        yield from in_text(field, turn_faults(turns))
    elif value.lstrip().startswith("Assistant:"):
        yield Fault("role marker", field, "it begins with `Assistant:`, an answer without its question")


def _dialogue_faults(row: Mapping[str, Any], field: str, keys: tuple[str, str]) -> Iterator[Fault]:
    value = row.get(field)
    if isinstance(value, str):
        yield Fault("not text", field, "it is text; name the column `text`, or give a list of messages")
    elif not isinstance(value, list | tuple) or not value:
        yield from value_faults(row, (field,))
    elif field == "conversations" and isinstance(value[0], Mapping) and "role" in value[0]:
        yield Fault(
            "message without role",
            "conversations[0].from",
            "the messages have `role` and `content`; TRL reads these from the column `messages`, so rename it",
        )
    else:
        yield from in_messages(field, turn_faults(value, last=ASSISTANT, keys=keys))


def _unprompted_faults(row: Mapping[str, Any], sides: Sequence[str]) -> Iterator[Fault]:
    found = list(value_faults(row, sides))
    yield from found
    if found:
        return
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str):
        found = [*in_messages("chosen", turn_faults(chosen, last=ASSISTANT))]
        found += in_messages("rejected", turn_faults(rejected, last=ASSISTANT))
        yield from found
        if not any(fault.kind in UNREADABLE for fault in found):
            yield from _prompt_faults(chosen, rejected)
        return
    turns = text_turns(chosen), text_turns(rejected)
    if turns[0] and turns[1]:
        yield from in_text("chosen", turn_faults(turns[0], last=ASSISTANT))
        yield from in_text("rejected", turn_faults(turns[1], last=ASSISTANT))
        yield from _prompt_faults(*turns, indexed=False)
    elif chosen != rejected:
        yield from _remainder_faults(chosen, rejected)


def _remainder_faults(chosen: str, rejected: str) -> Iterator[Fault]:
    shared, end = 0, min(len(chosen), len(rejected))
    while shared < end:  # bisection: comparing slices is far cheaper than comparing characters
        middle = (shared + end + 1) // 2
        shared, end = (middle, end) if chosen[:middle] == rejected[:middle] else (shared, middle - 1)
    if not shared:
        yield Fault("no prompt", "chosen", "it and `rejected` begin differently, and there is no column `prompt`")
        return
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[shared:].strip():
            yield Fault("empty text", field, "nothing is left of it after the beginning that both sides share")
        elif marker := turn_marker(text[shared:], "assistant"):
            yield Fault("role marker", field, marker)


def _prompt_faults(chosen: Sequence[Turn], rejected: Sequence[Turn], *, indexed: bool = True) -> Iterator[Fault]:
    prompt, other = chosen[: answer_start(chosen)], rejected[: answer_start(rejected)]
    if not any(turn.get("role") == "user" for turn in prompt):
        yield Fault("no prompt", "chosen", "no user turn stands before the answer, and there is no column `prompt`")
        return
    if prompt == other:
        return
    pairs = enumerate(zip(prompt, other, strict=False))
    index = next((at for at, (ours, theirs) in pairs if ours != theirs), min(len(prompt), len(other)))
    field = f"rejected[{index}]" if indexed else "rejected"
    yield Fault(
        "prompts differ",
        field,
        f"turn {index + 1} is not that of `chosen`; all turns before the answer must be the same on both sides",
    )


def _pair_faults(chosen: Any, rejected: Any) -> Iterator[Fault]:
    if chosen == rejected:
        yield Fault("identical pair", "rejected", "it is the same as `chosen`")
    elif _folded(chosen) == _folded(rejected):
        yield Fault("nearly identical pair", "rejected", "it differs from `chosen` only in letter case or white space")


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
        yield Fault("bad token ids", f"input_ids[{index}]", f"{token!r:.60} is not a whole number of at least 0")
    for field in _PER_TOKEN:
        if field in row:
            yield from _per_token_faults(field, row[field], len(ids))
    if "seq_lengths" in row:
        yield from _packing_faults(row["seq_lengths"], len(ids))


def _per_token_faults(field: str, values: Any, count: int) -> Iterator[Fault]:
    if not isinstance(values, list | tuple):
        yield Fault("bad token ids", field, "there is no list; leave the column out, or give an entry for every token")
    elif len(values) != count:
        yield Fault("bad token ids", field, f"it has {len(values)} entries for {count} token ids")
    elif field == "labels" and all(each == _IGNORED for each in values):
        yield Fault("bad token ids", field, f"every entry is {_IGNORED}, so there is nothing to learn")
    else:
        for index, value in _unfit(values, {int} if field == "labels" else {int, bool}, lowest=_IGNORED):
            yield Fault(
                "bad token ids", f"{field}[{index}]", f"{value!r:.60} is not a whole number or below {_IGNORED}"
            )


def _packing_faults(lengths: Any, count: int) -> Iterator[Fault]:
    whole = isinstance(lengths, list | tuple) and all(type(each) is int and each > 0 for each in lengths)
    if not whole or sum(lengths) != count:
        yield Fault("bad token ids", "seq_lengths", f"it does not cut the {count} token ids into sequences")


def _unfit(values: Sequence[Any], kinds: set[type], *, lowest: int) -> Iterator[tuple[int, Any]]:
    if set(map(type, values)) <= kinds and min(values) >= lowest:
        return
    yield next((at, each) for at, each in enumerate(values) if type(each) not in kinds or each < lowest)


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
