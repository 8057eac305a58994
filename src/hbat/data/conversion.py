"""From rows of a layout to messages in TRL's formats, and faults of these back to the words of the layout."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, List, Value

from hbat.data.faults import Fault, not_a_label
from hbat.data.turns import answer_start, text_turns

#: What layouts call a turn that calls functions: its text is the JSON of the calls.
CALL = "function_call"
#: The layout of texts with "Human:" and "Assistant:" at their turns.
TRANSCRIPTS = "hh"
#: Columns that TRL's trainers read beside the messages.
_COMPANIONS = ("tools", "chat_template_kwargs", "image", "images")
_PAIR = ("user", "assistant")
#: Kinds of faults of a turn, each with what it is for a text of its own, and in words.
_AS_TEXT = {
    "message without content": ("missing value", "the value is missing"),
    "empty turn": ("empty text", "the text is empty"),
}
_LABELS: dict[str, bool] = {
    "1": True, "0": False, "-1": False, "true": True, "false": False,
    "chosen": True, "rejected": False, "good": True, "bad": False, "desirable": True, "undesirable": False,
}  # fmt: skip


class _UnreadableError(Exception):
    """Something in a row that no message can be made of."""

    def __init__(self, found: str, problem: str) -> None:
        super().__init__(problem)
        self.found = found


class _Said(NamedTuple):
    """A message, and where in the row it was found: a text, a turn of a list, or a turn alone."""

    role: Any
    content: Any
    calls: Any
    found: str
    is_text: bool


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Makes messages out of the rows of a layout.

    Attributes:
        layout: Its name.
        kind: What the rows are for: `sft`, `preference`, `kto` or `prompts`.
        columns: Column of each place: `system`, `history` (pairs of question and answer), `question`, `input` (more of
            it) and `answer`; `turns`; `chosen` and `rejected` (texts, turns or lists of turns); `label`; `transcript`
            (a text with "Human:" and "Assistant:" at its turns, before `chosen`, `rejected` or `answer`).
        roles: TRL's role for every other one, in lower case.
        keys: What turns call `role` and `content`.
        calls: Whether turns call functions, so that all have `tool_calls`.
        whole: Whether prompt and answer become one conversation: `messages`, or `chosen` and `rejected` that begin
            with the prompt.
        ignored: Keys of turns that are not used.
    """

    layout: str
    kind: str
    columns: Mapping[str, str]
    roles: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, str] = ("role", "content")
    calls: bool = False
    whole: bool = False
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        used = ", ".join(f"`{column}`" for column in self.columns.values())
        made = ", ".join(f"`{name}`" for name in (*self.made, *(["label"] if "label" in self.columns else ())))
        left = f"; not used of its messages: {', '.join(f'`{key}`' for key in self.ignored)}" if self.ignored else ""
        return f"layout `{self.layout}` ({used}), converted to {made}{left}"

    @property
    def made(self) -> tuple[str, ...]:
        """Columns of messages that are made."""
        if "chosen" in self.columns:
            asks = {"turns", "question"} & set(self.columns)
            return ("prompt", "chosen", "rejected") if asks and not self.whole else ("chosen", "rejected")
        if self.kind == "prompts":
            return ("prompt",)
        if self.kind == "sft" and (self.whole or "answer" not in self.columns):
            return ("messages",)
        return ("prompt", "completion")

    def convert(self, dataset: Dataset) -> Dataset:
        """Convert all rows; those of files into files of the cache. A row that is unreadable gets no messages."""
        turn = {"role": Value("string"), "content": Value("string")} | ({"tool_calls": Json()} if self.calls else {})
        kept = self.kept(dataset.column_names)
        made: dict[str, Any] = {name: List(turn) for name in self.made}
        if "label" in self.columns:
            made["label"] = Value("bool")
        return dataset.map(
            self._batch,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in kept],
            features=Features({name: dataset.features[name] for name in kept} | made),
            load_from_cache_file=False,  # its key does not change with the code of this library
            desc=f"Converting {self.layout} rows",
        )

    def kept(self, columns: Sequence[str]) -> list[str]:
        """Columns that stay beside what is made: what TRL reads too, and all that rewards may compare with."""
        used = {*self.columns.values(), *self.made}
        return [name for name in columns if name not in used and (self.kind == "prompts" or name in _COMPANIONS)]

    def _batch(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        keys = ("role", "content", "tool_calls") if self.calls else ("role", "content")
        made: dict[str, list[Any]] = {name: [] for name in self.made}
        columns = {place: batch[column] for place, column in self.columns.items()}
        for values in zip(*columns.values(), strict=True):
            try:
                row = self._row(dict(zip(columns, values, strict=True)))
            except _UnreadableError:  # `worded` says why, where the check finds that there are no messages
                row = {name: [] for name in self.made}
            for name, turns in row.items():
                made[name].append([dict(zip(keys, turn, strict=False)) for turn in turns])
        return made | ({"label": [_label(value) for value in columns["label"]]} if "label" in columns else {})

    def _row(self, row: Mapping[str, Any]) -> dict[str, list[_Said]]:
        """Make the messages of a row, given by place."""
        if self.layout == TRANSCRIPTS:
            return self._from_transcripts(row)
        turns = self._context(row)
        if "chosen" in row:
            sides = {side: turns + self._side(row, side) for side in ("chosen", "rejected")}
            if "prompt" not in self.made:
                return sides
            return {"prompt": turns} | {side: said[len(turns) :] for side, said in sides.items()}
        if self.kind == "prompts":
            end = max((index for index, turn in enumerate(turns, 1) if turn.role != "assistant"), default=0)
            return {"prompt": turns[:end]}
        if "answer" in row:
            turns += self._side(row, "answer")
        if self.made == ("messages",):
            return {"messages": turns}
        start = len(turns)
        if turns and turns[-1].role == "assistant":
            start = answer_start([{"role": turn.role, "tool_calls": turn.calls} for turn in turns])
        return {"prompt": turns[:start], "completion": turns[start:]}

    def _from_transcripts(self, row: Mapping[str, Any]) -> dict[str, list[_Said]]:
        texts = {place: row[place] or "" for place in ("transcript", "answer", "chosen", "rejected") if place in row}
        for place, text in texts.items():
            if not isinstance(text, str):
                raise _UnreadableError(self.columns[place], f"{text!r:.60} is not a text")
        begun = texts.get("transcript", "")
        if "chosen" in row:
            return {side: self._split(begun + texts[side], side) for side in ("chosen", "rejected")}
        turns = self._split(begun + texts.get("answer", ""), "answer" if "answer" in row else "transcript")
        if self.made == ("messages",):
            return {"messages": turns}
        if self.kind == "prompts":
            return {"prompt": turns[:-1] if turns[-1].role == "assistant" else turns}
        return {"prompt": turns[:-1], "completion": turns[-1:]}

    def _split(self, text: str, place: str) -> list[_Said]:
        turns = text_turns(text) or [{"role": "user", "content": text}]
        return [_Said(turn["role"], turn["content"], None, self.columns[place], is_text=True) for turn in turns]

    def _context(self, row: Mapping[str, Any]) -> list[_Said]:
        def said(role: str, text: Any, place: str, at: str = "") -> _Said:
            found = f"{self.columns[place]}{at}"
            return _Said(role, _text(text, found), None, found, is_text=True)

        turns = [said("system", row["system"], "system")] if row.get("system") else []
        for index, pair in enumerate(row.get("history") or ()):
            if not isinstance(pair, list) or len(pair) != len(_PAIR):
                found = f"{self.columns['history']}[{index}]"
                raise _UnreadableError(found, f"{pair!r:.60} is not a pair of question and answer")
            turns += [
                said(role, text, "history", f"[{index}][{at}]")
                for at, (role, text) in enumerate(zip(_PAIR, pair, strict=True))
            ]
        if "turns" in row:
            own = self._turns(row["turns"], self.columns["turns"])
            turns = own if own and own[0].role == "system" else turns + own  # its own system message counts
        elif "question" in row:
            texts = [_text(row[place], self.columns[place]) for place in ("question", "input") if place in row]
            whole = None if texts[0] is None else "\n".join(text for text in texts if text)
            turns.append(said("user", whole, "question"))
        return turns

    def _side(self, row: Mapping[str, Any], side: str) -> list[_Said]:
        value, column = row[side], self.columns[side]
        if isinstance(value, Mapping):
            return [self._turn(value, column)]
        if isinstance(value, list) and side != "answer":
            return self._turns(value, column)
        return [_Said("assistant", _text(value, column), None, column, is_text=True)]

    def _turns(self, turns: Any, column: str) -> list[_Said]:
        if not isinstance(turns, list | None):
            raise _UnreadableError(column, f"{turns!r:.60} is not a list of messages")
        return [self._turn(turn, f"{column}[{index}]") for index, turn in enumerate(turns or ())]

    def _turn(self, turn: Any, found: str) -> _Said:
        if not isinstance(turn, Mapping):
            raise _UnreadableError(found, f"{turn!r:.60} is not a message with `{self.keys[0]}` and `{self.keys[1]}`")
        role, text = (turn.get(key) for key in self.keys)
        role = self.roles.get(str(role).lower(), role)
        text = _text(text, f"{found}.{self.keys[1]}")
        if role == CALL:
            return _Said("assistant", "", _calls(text, f"{found}.{self.keys[1]}"), found, is_text=False)
        return _Said(role, text, turn.get("tool_calls"), found, is_text=False)

    def worded(self, fault: Fault, row: Mapping[str, Any]) -> Fault:
        """Say a fault of the converted row in the words of the row that it was made of."""
        place = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:\.(\w+))?", fault.field)
        if place is None:
            return fault
        name, index, key = place[1], place[2], place[3]
        if name == "label" and row.get(self.columns.get(name, "")) is not None:
            return Fault("not a label", self.columns[name], not_a_label(row[self.columns[name]]))
        if name not in self.made:
            return replace(fault, field=self.columns.get(name, name))
        try:
            said = self._row({place: row[column] for place, column in self.columns.items()})[name]
        except _UnreadableError as error:
            return Fault("unreadable", error.found, str(error))
        if index is None:  # the whole list
            column = self.columns.get(name) or self.columns.get("turns") or next(iter(self.columns.values()))
            ends = Fault("wrong last turn", column, "the last turn must be from the assistant")
            return ends if (name, fault.kind) == ("completion", "empty conversation") else replace(fault, field=column)
        return self._worded_turn(fault, said[int(index)], key)

    def _worded_turn(self, fault: Fault, turn: _Said, key: str | None) -> Fault:
        if turn.is_text:
            kind, problem = _AS_TEXT.get(fault.kind, (fault.kind, fault.problem))
            return Fault(kind, turn.found, problem)
        own = dict(zip(("role", "content"), self.keys, strict=True))
        place = f"{turn.found}.{own.get(key, key)}" if key else turn.found
        return Fault(fault.kind, place, self._said_by(fault, own))

    def _said_by(self, fault: Fault, own: Mapping[str, str]) -> str:
        problem = re.sub(r"`(role|content)`", lambda key: f"`{own[key[1]]}`", fault.problem)
        if fault.kind == "unknown role":
            stop = "" if problem.endswith(("?", ".")) else "."
            return f"{problem}{stop} `roles` maps roles, as in `roles: {{narrator: assistant}}`"
        names: dict[str, str] = {}
        for other, role in self.roles.items():
            names.setdefault(role, other)
        if self.keys[0] == "from" and fault.kind in ("repeated role", "wrong first turn", "wrong last turn"):
            return re.sub(r"\b(user|assistant|tool)\b", lambda role: names.get(role[1]) or role[1], problem)
        return problem


def _text(content: Any, found: str) -> str | None:
    """The text of a content: a text, a number, or a list of parts that are texts."""
    if isinstance(content, str | None):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, Mapping):
            raise _UnreadableError(found, f"{content!r:.60} is not a text")
        if part.get("type", "text") != "text":
            raise _UnreadableError(
                found,
                f"a part of the type {part['type']!r} cannot be converted, only text. Remove it, or set `layout: trl` "
                "if the model's processor takes it",
            )
    return "".join(part.get("text") or part.get("value") or "" for part in parts)


def _label(value: Any) -> bool | None:
    if isinstance(value, bool) or value is None:
        return value
    return _LABELS.get(value.strip().lower() if isinstance(value, str) else str(value).removesuffix(".0"))


def _calls(text: Any, found: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(text or "")
        calls = calls if isinstance(calls, list) else [calls]
        return [
            {"type": "function", "function": {"name": call["name"], "arguments": _arguments(call.get("arguments"))}}
            for call in calls
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        example = '{"name": "search", "arguments": {"query": "cats"}}'
        raise _UnreadableError(found, f"{text!r:.60} is not the JSON of a function call, such as {example}") from None


def _arguments(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) and given.strip() else given or {}
