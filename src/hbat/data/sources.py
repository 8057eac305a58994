"""From data as a user names it, in any layout, to rows in TRL's formats: sources, mixtures and a held-out share."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets

from hbat.config.fields import nearest, shown
from hbat.data.check import check_type, each_row, plain, without_media
from hbat.data.conversion import Conversion
from hbat.data.faults import RowCheck
from hbat.data.formats import FIELDS, kind_of, shared_beginning, text_field_of
from hbat.data.layouts import KNOWN_COLUMNS, recognize, require_layout
from hbat.data.load import SOURCE_KEYS, DatasetError, load
from hbat.data.origin import Origin
from hbat.data.turns import text_turns

logger = logging.getLogger(__name__)

#: Keys of one source besides those that say where it is.
_PART_KEYS = ("layout", "columns", "roles", "rows", "weight", "shuffle", "seed")
_WHOLE_KEYS = ("mixture", "eval_split")


@dataclass(frozen=True)
class Rows:
    """Rows in TRL's formats, and where each comes from."""

    dataset: Dataset
    origin: Origin

    def select(self, indices: Any) -> "Rows":
        """Some of the rows."""
        return Rows(self.dataset.select(indices), self.origin.select(indices))


@dataclass(frozen=True)
class _Part:
    """One source, loaded and not yet converted."""

    name: str
    rows: Rows
    conversion: Conversion | None
    weight: float | None


def load_splits(train: Any, evaluation: Any, *, names: Sequence[str], check: RowCheck | None) -> list[Rows]:
    """Load the rows that an objective trains on and, if there are any, those that it is evaluated on.

    Each is what `load_rows` takes, or what this function gave. Messages begin with their `names`.

    Raises:
        DatasetError: If they cannot be found, read or converted, or evaluation rows are given twice.
    """
    rows, held_out = (train, None) if isinstance(train, Rows) else load_rows(train, name=names[0], check=check)
    if evaluation is None:
        return [rows] if held_out is None else [rows, held_out]
    if held_out is not None:
        raise DatasetError(f"{names[0]} has `eval_split`, and there is {names[1]} too. Remove one of them.")
    if isinstance(evaluation, Rows):
        return [rows, evaluation]
    evaluated, split = load_rows(evaluation, name=names[1], check=check)
    if split is not None:
        raise DatasetError(f"{names[1]} has `eval_split`, which is for rows to train on. Remove it.")
    return [rows, evaluated]


def load_rows(source: Any, *, name: str, check: RowCheck | None) -> tuple[Rows, Rows | None]:
    """Load rows and convert them to TRL's formats.

    Args:
        source: A `Dataset`; a name on the Hub, a file or a list of files; a mapping with one of these as `path`,
            other `SOURCE_KEYS` and `layout`, `columns`, `roles`, `rows`, `weight`, `shuffle`, `seed`; a list of all
            these, or it as `mixture` of a mapping; a mapping may have `eval_split`.
        name: How the user knows the data set; messages begin with it.
        check: The check of its rows, which tells what they are for.

    Returns:
        The rows, and those that `eval_split` holds out: no prompt is in both.

    Raises:
        DatasetError: If they cannot be found, read or converted.
    """
    if isinstance(source, DatasetDict | IterableDatasetDict) or source is None:  # a dictionary, but no mapping of keys
        check_type(source, name)
    whole = (
        dict(source) if isinstance(source, Mapping) else {"mixture": source} if _is_list(source) else {"path": source}
    )
    share = whole.pop("eval_split", None)
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
        raise DatasetError(
            f"{name}: `eval_split` is {shown(share)}; it must be a share between 0 and 1, such as 0.02."
        )
    mixture = whole.pop("mixture", None)
    if mixture is None:
        parts = [_part(whole, name, "", check)]
    else:
        if not _is_list(mixture) or not mixture:
            raise DatasetError(f"{name} is {shown(mixture)}; a mixture is a list of files, names or mappings.")
        given = [dict(part) if isinstance(part, Mapping) else {"path": part} for part in mixture]
        parts = [_part(whole | part, name, _title(part, index), check) for index, part in enumerate(given)]
    rows = _mixed(_weighted(_alike(parts), name), name)
    if share is None:
        return rows, None
    held_out = _held_out(rows.dataset, float(share), _seed(whole, name))
    if not 0 < len(held_out) < len(rows.dataset):
        raise DatasetError(
            f"{name}: `eval_split` {share} of {len(rows.dataset)} rows leaves no rows to train on or none to evaluate "
            "on: rows with equal prompts stay together. Give `eval_datasets` instead."
        )
    kept = np.setdiff1d(np.arange(len(rows.dataset)), held_out)
    return rows.select(kept), rows.select(held_out)


def _is_list(source: Any) -> bool:
    return isinstance(source, list | tuple)


def _title(part: Mapping[str, Any], index: int) -> str:
    """What to call a part of a mixture in messages."""
    path = part.get("path") or part.get("data_files")
    if not isinstance(path, str | Path):
        return f"part {index}"
    return Path(path).name if Path(path).suffix else str(path)


def _source(path: Any) -> str:
    """The name of a source for others: paths of folders are private."""
    if isinstance(path, list | tuple):
        return ", ".join(map(_source, path))
    if not isinstance(path, str | Path):
        return ""
    return Path(path).name if Path(path).exists() else str(path)


def _part(given: Mapping[str, Any], name: str, title: str, check: RowCheck | None) -> _Part:
    label = f"{name}, {title}" if title else name
    keys = (*SOURCE_KEYS, *_PART_KEYS)
    for key in given:
        if key == "streaming" and not given[key]:
            continue
        if key not in keys:
            raise DatasetError(f"{label} has {_unknown(str(key), keys)}")
    place = {key: value for key, value in given.items() if key in SOURCE_KEYS}
    path = given.get("path")
    if isinstance(path, str | Path | list | tuple | None):
        dataset = load(place, name=label)
    else:
        check_type(path, label)
        dataset = plain(path)
        if len(place) > 1:
            raise DatasetError(
                f"{label}: `{next(key for key in place if key != 'path')}` does not apply to a `Dataset`."
            )
    require_layout(label, given.get("layout"), given.get("roles"))
    dataset = _renamed(dataset, given.get("columns"), label)
    conversion = _conversion(dataset, given, label, check)
    rows = _chosen(Rows(dataset, Origin.of(dataset, title, _source(path or given.get("data_files")))), given, label)
    weight = given.get("weight")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < math.inf):
        raise DatasetError(f"{label}: `weight` is {shown(weight)}; it must be a finite number above 0.")
    return _Part(title, rows, conversion, weight)


def _unknown(key: str, keys: Sequence[str]) -> str:
    if key == "streaming":
        return "`streaming`, but a streamed data set has no length and cannot be split into rounds. Remove it."
    if key in _WHOLE_KEYS:
        return f"`{key}`, which is for a whole data set: `{{mixture: [...], eval_split: 0.02}}`."
    if key == "fraction":
        return "`fraction`; here it is called `weight`."
    if key in {*FIELDS, *KNOWN_COLUMNS}:
        return f"the unknown key `{key}`. Create a data set of rows with `datasets.Dataset.from_list(rows)`."
    valid = ", ".join(f"`{known}`" for known in (*keys, *_WHOLE_KEYS))
    return f"the unknown key `{key}`; valid are {valid}.{nearest(key, (*keys, *_WHOLE_KEYS))}"


def _renamed(dataset: Dataset, columns: Any, label: str) -> Dataset:
    """Select columns (a list), or give them the names of TRL or of a layout (a mapping from that to the data's)."""
    if columns is None:
        return dataset
    is_list = _is_list(columns)
    wanted = list(columns) if is_list else list(columns.values()) if isinstance(columns, Mapping) else None
    if not wanted or not all(isinstance(column, str) for column in wanted):
        raise DatasetError(
            f"{label}: `columns` is {shown(columns)}; it must be a mapping such as {{prompt: question}}, or a list."
        )
    for column in wanted:
        if column not in dataset.column_names:
            present = ", ".join(f"`{name}`" for name in dataset.column_names)
            raise DatasetError(
                f"{label}: `columns` names `{column}`, but the data has {present}."
                f"{nearest(column, dataset.column_names)}"
            )
    if is_list:
        return dataset.select_columns(wanted)
    names = {column: target for target, column in columns.items()}
    if len(names) < len(columns):
        raise DatasetError(f"{label}: `columns` is {shown(columns)}, which gives one column two names.")
    replaced = [target for target in names.values() if target in dataset.column_names and target not in names]
    return dataset.remove_columns(replaced).rename_columns({own: new for own, new in names.items() if own != new})


def _conversion(dataset: Dataset, given: Mapping[str, Any], label: str, check: RowCheck | None) -> Conversion | None:
    kind, layout, roles = kind_of(check), given.get("layout"), given.get("roles")
    if kind is None or dataset.format["type"] == "custom":  # a transform makes the rows that its user wants
        if layout or roles:
            raise DatasetError(
                f"{label}: `{'layout' if layout else 'roles'}` does not apply to rows of a transform, or of an "
                "objective of your own. Convert them before (`datasets.Dataset.map`)."
            )
        return None
    text_field = text_field_of(check)
    try:
        conversion = recognize(dataset, kind, text_field=text_field, layout=layout, roles=roles)
    except DatasetError as error:
        raise DatasetError(f"{label}: {error}") from None
    if conversion is not None:
        used = {*conversion.columns.values(), *conversion.kept(dataset.column_names)}
    else:  # columns of rewards may have any name
        used = {*FIELDS, text_field, *(dataset.column_names if kind == "prompts" else ())}
        used |= set(dataset.column_names) - KNOWN_COLUMNS
    left = ", ".join(f"`{column}`" for column in dataset.column_names if column not in used)
    if conversion is not None or left:
        found = conversion or "one of TRL's formats, trained on as it is"
        logger.info("%s: %s%s.", label, found, f"; not used: {left}" if left else "")
    return conversion


def _chosen(rows: Rows, given: Mapping[str, Any], label: str) -> Rows:
    """The first `rows` of a source, shuffled before if that is asked for."""
    count, total = given.get("rows"), len(rows.dataset)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise DatasetError(f"{label}: `rows` is {shown(count)}; it must be a whole number of at least 1.")
    if not given.get("shuffle"):
        return rows if count is None else rows.select(range(min(count, total)))
    order = np.random.default_rng(_seed(given, label)).permutation(total)
    return rows.select(order[:count])


def _seed(given: Mapping[str, Any], label: str) -> int:
    seed = given.get("seed") or 0
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise DatasetError(f"{label}: `seed` is {shown(seed)}; it must be a whole number of at least 0.")
    return int(seed)


def _alike(parts: list[_Part]) -> list[_Part]:
    """Let the parts of a mixture become alike: whole conversations if one does, with `tool_calls` if one has."""
    conversions = [part.conversion for part in parts if part.conversion is not None]
    if len(parts) == 1 or not conversions:
        return parts
    made = [set(part.conversion.made if part.conversion else part.rows.dataset.column_names) for part in parts]
    whole = any("messages" in columns or ("chosen" in columns and "prompt" not in columns) for columns in made)
    calls = any(conversion.calls for conversion in conversions)
    return [
        part
        if part.conversion is None
        else replace(part, conversion=replace(part.conversion, whole=whole, calls=calls))
        for part in parts
    ]


def _weighted(parts: list[_Part], name: str) -> list[_Part]:
    """Cut the parts of a mixture to their weights, so that it is as large as it can be without repeating a row."""
    weights = [part.weight for part in parts]
    if all(weight is None for weight in weights):
        return parts
    if None in weights:
        bare = next(part.name for part in parts if part.weight is None)
        raise DatasetError(f"{name}: `weight` must be set for all parts or none, but {bare} has none.")
    shares = np.asarray(weights, dtype=np.float64) / np.sum(np.asarray(weights, dtype=np.float64))
    total = min(len(part.rows.dataset) / share for part, share in zip(parts, shares, strict=True))
    counts = [max(1, round(share * total)) for share in shares]
    return [
        replace(part, rows=part.rows.select(range(min(count, len(part.rows.dataset)))))
        for part, count in zip(parts, counts, strict=True)
    ]


def _mixed(parts: Sequence[_Part], name: str) -> Rows:
    converted = [_converted(part) for part in parts]
    if len(converted) == 1:
        return converted[0]
    for part, rows in zip(parts, converted, strict=True):
        if rows.dataset.format["type"] == "custom":
            raise DatasetError(f"{name}, {part.name} has a transform, which a mixture would lose. Apply it by `map`.")
    held = [{column for column in rows.dataset.column_names if column in FIELDS} for rows in converted]
    for part, columns in zip(parts, held, strict=True):
        if columns != held[0]:
            raise DatasetError(
                f"{name}: {parts[0].name} has the columns {', '.join(sorted(held[0]))}, {part.name} has "
                f"{', '.join(sorted(columns))}. Give them one format with `columns` or `layout`."
            )
    try:
        dataset = concatenate_datasets([rows.dataset for rows in converted])
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        names = ", ".join(part.name for part in parts)
        raise DatasetError(f"{name}: the columns of {names} do not agree: {reason}.") from error
    return Rows(dataset, Origin.joined([rows.origin for rows in converted]))


def _converted(part: _Part) -> Rows:
    if part.conversion is None:
        return part.rows
    origin = replace(part.rows.origin, parts=(replace(part.rows.origin.parts[0], conversion=part.conversion),))
    return Rows(part.conversion.convert(part.rows.dataset), origin)


def _held_out(dataset: Dataset, share: float, seed: int) -> Any:
    """Indices of a share of the rows, at random by groups of rows with equal prompts, in order."""
    keys = np.empty(len(dataset), np.uint64)
    if dataset.format["type"] is None:
        dataset = without_media(dataset)
    for index, row in enumerate(each_row(dataset)):
        keys[index] = xxhash.xxh3_64_intdigest(_asked(row).encode("utf-8", "surrogatepass"), seed=seed)
    # The keys are the random order: their groups fill the share until it is reached.
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    filled = np.cumsum(counts)
    last = int(np.searchsorted(filled, share * len(dataset)))
    return np.flatnonzero(group <= last)


def _asked(row: Mapping[str, Any]) -> str:
    """What a row asks first: its first user turn, or its prompt, or else all that it is learned from."""
    if "prompt" not in row and isinstance(row.get("chosen"), str) and not text_turns(row["chosen"]):
        chosen, rejected = row["chosen"], row.get("rejected") or ""
        return _folded(chosen[: shared_beginning(chosen, rejected)])  # which TRL takes as the prompt
    for field in ("prompt", "messages", "conversations", "chosen", "text", "input_ids"):
        value = row.get(field)
        turns = value if isinstance(value, list) else text_turns(value) if isinstance(value, str) else []
        for turn in turns:
            if isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human"):
                return _folded(turn.get("content", turn.get("value")))
        if value:
            return _folded(value)
    return json.dumps(row, sort_keys=True, default=str)


def _folded(value: Any) -> str:
    """A value as text, but for letter case and white space: near copies of a prompt are the same."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return " ".join(text.casefold().split())
