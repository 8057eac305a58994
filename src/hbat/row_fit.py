"""What is wrong with a row for the model that is trained: a template that refuses it, tokens that are not there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from hbat.row_parts import Fault
from hbat.turns import Turn

_MESSAGES = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
_TOKENS = ("input_ids", "labels")
_ANSWERS = ("completion", "chosen", "rejected")


class RowFit:
    """The check of one row against tokenizer and model.

    A template is tried once for each sequence of roles, not for each row: what it refuses are roles and their order.

    Args:
        tokenizer: The tokenizer; None where a template of the section's own takes its place.
        vocabulary: Number of tokens that the model has.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._tried: dict[Any, str | None] = {}

    def concerns(self, dataset: Dataset) -> bool:
        """Say whether the rows of a data set hold what is checked here.

        Args:
            dataset: The data set.

        Returns:
            False where all of it is text.
        """
        fields = [each for each in (*_MESSAGES, *_TOKENS) if each in dataset.column_names]
        return any("string" not in str(getattr(dataset.features[each], "dtype", "")) for each in fields)

    def __call__(self, row: Mapping[str, Any]) -> Iterator[Fault]:
        """Find what is wrong with a row that is good in itself.

        Args:
            row: The row.

        Yields:
            The faults.
        """
        for field in _TOKENS if "input_ids" in row else ():
            tokens = row.get(field)
            if tokens and max(tokens) >= self._vocabulary:
                index = next(at for at, token in enumerate(tokens) if token >= self._vocabulary)
                problem = f"the model has no token {tokens[index]}; it has {self._vocabulary}"
                yield Fault("unknown token", f"{field}[{index}]", problem)
        if self._tokenizer is None or "input_ids" in row:
            return
        for field, turns, asks in _conversations(row):
            if refusal := self._refusal(turns, row, asks=asks):
                yield Fault("template", field, f"the tokenizer's chat template refuses it: {refusal}")
                return

    def _refusal(self, turns: Sequence[Turn], row: Mapping[str, Any], *, asks: bool) -> str | None:
        given = row.get("tools"), row.get("chat_template_kwargs")
        if any(given) or not all(isinstance(turn["content"], str) and not turn.get("tool_calls") for turn in turns):
            return self._try(turns, row, asks=asks)
        shape = (asks, *(turn["role"] for turn in turns))
        if shape not in self._tried:
            self._tried[shape] = self._try(turns, row, asks=asks)
        return self._tried[shape]

    def _try(self, turns: Sequence[Turn], row: Mapping[str, Any], *, asks: bool) -> str | None:
        present = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        options = dict(row.get("chat_template_kwargs") or {})
        tools = row.get("tools")
        try:
            self._tokenizer.apply_chat_template(
                present,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                add_generation_prompt=asks,
                tokenize=False,
                **options,
            )
        except Exception as error:  # noqa: BLE001 - a template raises anything
            return " ".join(f"{type(error).__name__}: {error}".split())
        return None


def _conversations(row: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Turn], bool]]:
    # As TRL renders them: the field, the turns, and whether an answer is asked for.
    if isinstance(row.get("prompt"), list):
        yield "prompt", row["prompt"], True
        for side in _ANSWERS:
            if isinstance(row.get(side), list):
                yield side, row["prompt"] + row[side], False
    elif isinstance(row.get("conversations"), list):
        turns = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
        yield "conversations", turns, False
    else:
        for field in ("messages", "chosen", "rejected"):
            if isinstance(row.get(field), list):
                yield field, row[field], False
