"""Recognises the layout of rows by their columns: TRL's own, or another one, which is converted."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hbat.config.fields import nearest, shown
from hbat.data.conversion import CALL, TRANSCRIPTS, Conversion
from hbat.data.load import DatasetError
from hbat.data.turns import ROLES

#: TRL's own formats, which are not converted.
TRL = "trl"
#: What other layouts call TRL's roles, in lower case; what most files have comes first.
FOREIGN_ROLES = {
    "human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool", "prompter": "user",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    CALL: CALL,
}  # fmt: skip

_PAIRS = ({"turns", "chosen", "rejected"}, {"question", "chosen", "rejected"}, {"chosen", "rejected"})
#: Places that a layout must fill, any one of these sets.
_NEEDED: dict[str, tuple[set[str], ...]] = {
    "sft": ({"turns"}, {"question", "answer"}, {"transcript", "answer"}, {"transcript"}),
    "preference": _PAIRS,
    "kto": ({"turns", "label"}, {"question", "answer", "label"}, {"transcript", "answer", "label"}, *_PAIRS),
    "prompts": ({"turns"}, {"question"}, {"transcript"}),
}
_OF_A_QUESTION = {"system", "history", "input"}

_SYSTEM = {"system": ("system", "system_prompt")}
_SIDES = {
    "chosen": ("chosen", "chosen_messages", "chosen_response", "response_chosen", "response_j"),
    "rejected": ("rejected", "rejected_messages", "rejected_response", "response_rejected", "response_k"),
}
_LABEL = {"label": ("label", "kto_tag")}
#: By layout the names of its columns for each place of `Conversion`; of several names the first one present counts.
#: Looked for in this order.
LAYOUTS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "alpaca": {
        **_SYSTEM, "history": ("history",), "question": ("instruction",), "input": ("input", "context"),
        "answer": ("output",), **_SIDES, **_LABEL,
    },
    "sharegpt": {**_SYSTEM, "turns": ("conversations", "conversation"), **_SIDES, **_LABEL},
    "messages": {**_SYSTEM, "turns": ("messages",), **_SIDES, **_LABEL},
    "question-answer": {
        **_SYSTEM, "question": ("question", "query", "instruction", "prompt"), "input": ("input", "context"),
        "answer": ("answer", "response", "output", "completion"), **_SIDES, **_LABEL,
    },
    "ultrafeedback": _SIDES,
    TRANSCRIPTS: {"transcript": ("text", "prompt"), "answer": ("completion",), **_SIDES, **_LABEL},
}  # fmt: skip
LAYOUT_NAMES = (TRL, *LAYOUTS)
#: Names that columns have in any of them.
KNOWN_COLUMNS = {name for places in LAYOUTS.values() for names in places.values() for name in names}


def recognize(
    dataset: Dataset,
    kind: str,
    *,
    text_field: str = "text",
    layout: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> Conversion | None:
    """Find the layout of a data set, by its columns and what stands in them.

    `layout` and `roles` are the user's, if they were given; `text_field` is the column of TRL's SFT texts.

    Returns:
        What converts it; None if it is in one of TRL's formats, or in none that is known.

    Raises:
        DatasetError: If it is not in the layout that was given.
    """
    held = _Held(dataset)
    if layout == TRL or (layout is None and not roles and _is_trl(held, kind, text_field)):
        return None
    places = _places(held, kind, layout)
    if places is None:
        if layout is None and not roles:
            return None
        asked = f"`layout: {layout}`" if layout else "`roles`"
        raise DatasetError(
            f"{asked} does not fit the columns {_quoted(dataset.column_names)}. {advice(held.names, kind, layout)}"
        )
    name, columns = places
    return held.conversion(name, kind, columns, roles or {})


def advice(columns: Sequence[str], kind: str, layout: str | None = None) -> str:
    """Say what the nearest layout lacks, and how to map columns to it; empty if none is near."""
    names = [layout] if layout in LAYOUTS else [name for name in LAYOUTS if name not in ("ultrafeedback", TRANSCRIPTS)]
    gaps = [(len(lacking), -len(had), name, lacking) for name in names for had, lacking in _gaps(name, kind, columns)]
    near = [gap for gap in gaps if gap[0] and (gap[1] < 0 or layout)]
    if not near:
        return ""
    *_, name, lacking = min(near)
    missing = [LAYOUTS[name][place][0] for place in lacking]
    mapping = ", ".join(f"{column}: ..." for column in missing)
    return (
        f"The nearest layout is `{name}`, which also needs {_quoted(missing)}. Rename or map columns, as in "
        f"`columns: {{{mapping}}}`."
    )


def _gaps(layout: str, kind: str, present: Sequence[str]) -> Iterable[tuple[list[str], list[str]]]:
    places = LAYOUTS[layout]
    for needed in _NEEDED[kind]:
        if needed <= set(places):
            had = [place for place in needed if set(places[place]) & set(present)]
            yield had, sorted(needed - set(had), key=list(places).index)


class _Held:
    """What the columns of a data set hold, as far as it tells layouts apart."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.names: list[str] = dataset.column_names
        self._samples: dict[str, Any] = {}

    def sample(self, column: str) -> Any:
        """The first value of a column that is not missing or empty."""
        if column not in self.names:
            return None
        if column not in self._samples:
            rows = self._dataset.select_columns([column])
            batches = itertools.islice(rows.iter(batch_size=100), 10)
            values = (value for batch in batches for value in batch[column] if value not in (None, "", []))
            self._samples[column] = next(values, None)
        return self._samples[column]

    def turns(self, column: str) -> list[Mapping[str, Any]]:
        """The turns of the sample of a column, if it has any."""
        value = self.sample(column)
        turns = [value] if isinstance(value, Mapping) else value
        is_list = isinstance(turns, list) and turns and isinstance(turns[0], Mapping)
        return turns if is_list and {"role", "from"} & set(turns[0]) else []

    def suits(self, column: str, place: str) -> bool:
        """Whether a column can stand at a place of a layout."""
        sample = self.sample(column)
        if sample is None or place == "label":
            return True
        if place == "history":
            return isinstance(sample, list) and isinstance(sample[0], list)
        is_number = isinstance(sample, int | float) and not isinstance(sample, bool)
        is_text, has_turns = isinstance(sample, str) or is_number, bool(self.turns(column))
        if place in ("chosen", "rejected"):
            return is_text or has_turns
        return has_turns if place == "turns" else is_text

    def is_trl_turns(self, column: str) -> bool:
        """Whether a column holds messages as TRL's trainers take them."""
        if isinstance(self.sample(column), Mapping) or not (turns := self.turns(column)):
            return False
        if "role" not in turns[0] or any(set(FOREIGN_ROLES) & {name.lower()} for name in self.roles(column)):
            return False
        parts = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
        return not parts or not all(map(_is_text_parts, parts))

    def is_whole(self, column: str) -> bool:
        """Whether a column of answers holds whole conversations."""
        turns = self.turns(column)
        role = str(next((turns[0][key] for key in ("role", "from") if turns and turns[0].get(key)), "assistant"))
        return FOREIGN_ROLES.get(role.lower(), role) not in ("assistant", CALL)

    def roles(self, column: str) -> set[str]:
        """All roles of a column of turns."""
        key = "role" if "role" in self.turns(column)[0] else "from"
        try:
            values = self._dataset.data.column(column) if self._dataset.format["type"] is None else None
            while values is not None and not pa.types.is_struct(values.type):
                values = pc.list_flatten(values)
            if values is not None:
                return {str(role) for role in pc.unique(pc.struct_field(values, key)).to_pylist() if role is not None}
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, TypeError):
            pass  # a type of column that Arrow cannot look into, such as JSON
        rows = self._dataset.select_columns([column])
        turns = (
            value if isinstance(value, list) else [value]
            for batch in rows.iter(batch_size=1000)
            for value in batch[column]
        )
        return {
            str(turn[key])
            for turn in itertools.chain.from_iterable(turns)
            if isinstance(turn, Mapping) and turn.get(key)
        }

    def conversion(self, layout: str, kind: str, columns: Mapping[str, str], roles: Mapping[str, str]) -> Conversion:
        """Make what converts the rows."""
        with_turns = [columns[place] for place in ("turns", "chosen", "rejected") if place in columns]
        with_turns = [column for column in with_turns if self.turns(column)]
        seen = {role for column in with_turns for role in self.roles(column)}
        mapped = FOREIGN_ROLES | {str(role).lower(): own for role, own in roles.items()}
        turns = [turn for column in with_turns for turn in self.turns(column)]
        turn = turns[0] if turns else {}
        keys = ("role" if "role" in turn else "from", "content" if "content" in turn else "value")
        return Conversion(
            layout=layout,
            kind=kind,
            columns=columns,
            roles={role: own for role, own in mapped.items() if role != own or role == CALL},
            keys=keys if with_turns else ("role", "content"),
            calls=any("tool_calls" in one for one in turns) or any(mapped.get(role.lower()) == CALL for role in seen),
            ignored=tuple(sorted({key for one in turns for key in one} - {*keys, "tool_calls"})),
        )


def _is_trl(held: _Held, kind: str, text_field: str) -> bool:
    """Whether rows are in one of TRL's formats, or look like an attempt at one, whose faults the check names."""
    names = set(held.names)

    def own(*columns: str) -> bool:  # all texts, or all messages
        kinds = {"messages" if held.is_trl_turns(column) else type(held.sample(column)) for column in columns}
        return names >= set(columns) and (kinds <= {str, type(None)} or kinds <= {"messages", type(None)})

    if kind == "prompts":
        return own("prompt")
    if kind == "sft":
        return (
            "input_ids" in names
            or (not {"conversations", "messages"} & names and text_field in names)
            or own("prompt", "completion")
            or ("prompt" not in names and own("messages"))  # TRL looks for a prompt's completion first
        )
    if kind == "kto" and own("prompt", "completion") and isinstance(held.sample("label"), bool | None):
        return True
    if "prompt" in names:
        return own("prompt", "chosen", "rejected")
    return own("chosen", "rejected") and (
        not names & _QUESTIONS or any(map(held.is_whole, ("chosen", "rejected")))  # else they answer what stands there
    )


#: Columns that make of `chosen` and `rejected` answers to what stands there.
_QUESTIONS = {
    name for layout in LAYOUTS.values() for place in ("turns", "question") for name in layout.get(place, ())
} - {"prompt"}


def _places(held: _Held, kind: str, layout: str | None) -> tuple[str, dict[str, str]] | None:
    """The first layout that the columns fill, with the column of each place."""
    for name in [layout] if layout else LAYOUTS:
        if layout is None and name == TRANSCRIPTS:  # texts that TRL trains on as they are
            continue
        columns = {
            place: next((own for own in names if own in held.names and held.suits(own, place)), "")
            for place, names in LAYOUTS[name].items()
        }
        columns = {place: column for place, column in columns.items() if column}
        whole = any(held.is_whole(columns[side]) for side in ("chosen", "rejected") if side in columns)
        for needed in _NEEDED[kind]:
            asks = bool({"turns", "question"} & needed)
            if needed == {"chosen", "rejected"} and name not in ("ultrafeedback", TRANSCRIPTS):
                continue
            if not needed <= set(columns) or ("chosen" in needed and name != TRANSCRIPTS and whole == asks):
                continue
            more = _OF_A_QUESTION if asks else {"transcript"}
            return name, {place: column for place, column in columns.items() if place in needed | more}
    return None


def _is_text_parts(content: list[Mapping[str, Any]]) -> bool:
    return all(isinstance(part, Mapping) and part.get("type", "text") == "text" for part in content)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def require_layout(name: str, layout: Any, roles: Any) -> None:
    """Check the user's `layout` and `roles`; raises `DatasetError` if they are none."""
    if layout is not None and layout not in LAYOUT_NAMES:
        hint = nearest(str(layout), LAYOUT_NAMES)
        raise DatasetError(f"{name}: `layout` is {shown(layout)}; it must be one of {', '.join(LAYOUT_NAMES)}.{hint}")
    if not isinstance(roles, Mapping | None):
        raise DatasetError(f"{name}: `roles` is {shown(roles)}; it must be a mapping such as {{human: user}}.")
    for role, own in (roles or {}).items():
        if own not in (*ROLES, CALL):
            raise DatasetError(
                f"{name}: `roles.{role}` is {shown(own)}; it must be one of {', '.join((*ROLES, CALL))}."
                f"{nearest(str(own), ROLES)}"
            )
