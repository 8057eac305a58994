"""Faults of a row for the model that is trained: what its template rejects, and tokens that it does not take."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hbat.data.faults import Fault, RowCheck
from hbat.data.formats import kind_of, text_field_of
from hbat.data.turns import ROLES, Turn

_TOKENS = ("input_ids", "labels")


@dataclass(frozen=True)
class Limits:
    """What the model can take.

    Attributes:
        vocabulary: Its number of token embeddings.
        room: Tokens that a row may have; None for any number.
        why: Why no more, for messages.
    """

    vocabulary: int
    room: int | None = None
    why: str = ""


@dataclass(frozen=True)
class _Read:
    """What an objective reads of a row besides `prompt`: answers to it, whole conversations, tokens."""

    answers: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    tokens: bool = False


_READ = {
    "sft": _Read(("completion",), ("messages", "conversations"), tokens=True),
    "preference": _Read(("chosen", "rejected"), ("chosen", "rejected")),
    "kto": _Read(("completion", "chosen", "rejected"), ("chosen", "rejected")),
    "prompts": _Read(),
}


def row_fit(check: RowCheck | None, tokenizer: Any, limits: Limits) -> "RowFit | None":
    """Make the check of rows against a tokenizer (if any) and a model; None if `check` is a custom one."""
    kind = kind_of(check)
    return None if kind is None else RowFit(_READ[kind], tokenizer, limits, text_field_of(check))


class RowFit:
    """Finds what is wrong with a row, good in itself, for a tokenizer and a model. Made by `row_fit`."""

    def __init__(self, read: _Read, tokenizer: Any, limits: Limits, text_field: str) -> None:
        self._read = read
        self._tokenizer = tokenizer
        self._limits = limits
        self._text_field = text_field
        # Tokenizing all rows takes time, so only where some may not fit.
        self._measures = tokenizer is not None and (limits.room is not None or len(tokenizer) > limits.vocabulary)
        self._tried: dict[Any, str | None] = {}

    def concerns(self, dataset: Dataset) -> bool:
        """Whether a data set has columns to check: False if all of its data is text, and all of it fits."""
        if self._measures:
            return True
        read = {"prompt", *self._read.answers, *self._read.whole, *(_TOKENS if self._read.tokens else ())}
        features = [feature for name, feature in dataset.features.items() if name in read]
        return any("string" not in str(getattr(feature, "dtype", "")) for feature in features)

    def __call__(self, row: Mapping[str, Any]) -> Iterator[Fault]:
        """Find the faults of a row that is good in itself."""
        if self._read.tokens and "input_ids" in row:
            yield from _token_faults(row, self._limits)
        elif self._tokenizer is not None:
            for field, turns, asks in _conversations(row, self._read):
                if refusal := self._refusal(turns, row, asks=asks):
                    yield Fault("template", field, f"the tokenizer's chat template rejects it: {refusal}")
                    return
            if self._measures:
                yield from self._measured(row)

    def _refusal(self, turns: Sequence[Turn], row: Mapping[str, Any], *, asks: bool) -> str | None:
        """Try the template, once per sequence of roles where nothing else in the row can matter to it."""
        given = row.get("tools"), row.get("chat_template_kwargs")
        if any(given) or not all(isinstance(turn["content"], str) and not turn.get("tool_calls") for turn in turns):
            return self._try(turns, row, asks=asks)
        shape = (asks, *(turn["role"] for turn in turns))
        if shape not in self._tried:
            self._tried[shape] = self._try(turns, row, asks=asks)
        return self._tried[shape]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a good row as the model reads it, before it generates."""
        prompt = row["prompt"]
        return prompt if isinstance(prompt, str) else self._rendered(prompt, row, asks=True)

    def length(self, row: Mapping[str, Any]) -> int:
        """Tokens of the longest sequence that an objective makes of a good row, uncut."""
        if "input_ids" in row:
            return len(row["input_ids"])
        return max((len(ids) for _, ids in self._tokenized(row)), default=0)

    def _tokenized(self, row: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
        texts = [
            (field, self._rendered(turns, row, asks=asks), False)
            for field, turns, asks in _conversations(row, self._read)
        ]
        for field, text, special in texts or _texts(row, self._read, self._text_field):
            ids = list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            end = self._tokenizer.eos_token
            ends = not special or field == "prompt" or end is None or text.endswith(end)
            yield field, ids if ends else [*ids, self._tokenizer.eos_token_id]  # as TRL adds to a text

    def _measured(self, row: Mapping[str, Any]) -> Iterator[Fault]:
        for field, ids in self._tokenized(row):
            for fault in _token_faults({"input_ids": ids}, self._limits):
                yield Fault(fault.kind, field, fault.problem)
                return

    def _rendered(self, turns: Sequence[Turn], row: Mapping[str, Any], *, asks: bool) -> str:
        present = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        tools = row.get("tools")
        text: str = self._tokenizer.apply_chat_template(
            present,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            add_generation_prompt=asks,
            tokenize=False,
            **(row.get("chat_template_kwargs") or {}),
        )
        return text

    def _try(self, turns: Sequence[Turn], row: Mapping[str, Any], *, asks: bool) -> str | None:
        try:
            text = self._rendered(turns, row, asks=asks)
        except Exception as error:  # noqa: BLE001 - a template raises anything
            return " ".join(f"{type(error).__name__}: {error}".split())
        called = [call.get("function", call) for turn in turns for call in turn.get("tool_calls") or ()]
        for name in (str(call.get("name")) for call in called if isinstance(call, Mapping)):
            if name not in text:
                return f"it leaves out the call of {name!r}. Set a `chat_template` that renders `tool_calls`"
        if missing := next((name for name in _tool_names(row.get("tools")) if name not in text), None):
            return (
                f"it leaves out the tool {missing!r}. Set a `chat_template` that renders `tools`, or remove the column"
            )
        for turn in turns:
            content = turn.get("content")
            if turn["role"] not in ROLES and isinstance(content, str) and content.strip() not in text:
                return f"it leaves out turns of the role {turn['role']!r}. The usual roles are {', '.join(ROLES)}"
        return None


def _tool_names(tools: Any) -> Iterator[str]:
    for tool in json.loads(tools) if isinstance(tools, str) else tools or ():
        function = tool.get("function") or tool
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            yield function["name"]


def _token_faults(row: Mapping[str, Any], limits: Limits) -> Iterator[Fault]:
    for field in _TOKENS:
        tokens = row.get(field)
        if tokens and max(tokens) >= limits.vocabulary:
            index = next(at for at, token in enumerate(tokens) if token >= limits.vocabulary)
            problem = f"the model has no token {tokens[index]}; its vocabulary size is {limits.vocabulary}"
            yield Fault("unknown token", f"{field}[{index}]", problem)
    count = len(row["input_ids"])
    if limits.room is not None and count > limits.room:
        yield Fault("too long", "input_ids", f"it has {count} tokens, but {limits.why}")


def _texts(row: Mapping[str, Any], read: _Read, text_field: str) -> Iterator[tuple[str, str, bool]]:
    """Yield what TRL tokenizes of rows without messages: the field, its text, and whether special tokens are added."""
    prompt = row.get("prompt", "")
    for side in read.answers:
        if isinstance(row.get(side), str):
            yield side, prompt + row[side], True
    if not read.answers and isinstance(prompt, str):
        yield "prompt", prompt, True
    if "prompt" not in row and read.tokens and isinstance(row.get(text_field), str):
        yield text_field, row[text_field], True


def _conversations(row: Mapping[str, Any], read: _Read) -> Iterator[tuple[str, Sequence[Turn], bool]]:
    """Yield what TRL renders: the field, its turns, and whether a generation prompt is added."""
    if "prompt" in row:
        if isinstance(row["prompt"], list):
            yield "prompt", row["prompt"], True
            for side in read.answers:
                if side in row:
                    yield side, row["prompt"] + row[side], False
    elif "conversations" in read.whole and "conversations" in row:
        turns = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
        yield "conversations", turns, False
    else:
        for field in read.whole:
            if isinstance(row.get(field), list):
                yield field, row[field], False
