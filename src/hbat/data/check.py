"""Checks a data set before the first stage: its type, size, columns and, by the rules of `formats`, every row."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hbat.config.evaluation import OnBadRows
from hbat.config.fields import nearest
from hbat.data.faults import MISSING_COLUMN, Fault, RowCheck
from hbat.data.formats import FIELDS, kind_of
from hbat.data.layouts import advice
from hbat.data.load import DatasetError
from hbat.data.origin import Origin

logger = logging.getLogger(__name__)

_MEDIA = {"image", "images", "audio", "audios", "video", "videos"}


@dataclass
class FaultyRows:
    """Indices of the faulty rows, the first fault as a sentence, and the number of rows with each kind of fault."""

    rows: list[int] = field(default_factory=list)
    first: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    first_row: int = 0

    def add(self, row: int, origin: Origin, faults: Sequence[Fault]) -> None:
        """Count the faults of a row, in the words of what it comes from."""
        faults = [origin.worded(row, fault) for fault in faults]
        if not self.rows or row < self.first_row:
            self.first_row = row
            stop = "" if faults[0].problem.endswith("?") else "."
            self.first = f"{origin.where(row)}, field `{faults[0].field}`: {faults[0].problem}{stop}"
        self.rows.append(row)
        self.kinds.update({fault.kind for fault in faults})

    @property
    def counts(self) -> str:
        """Number of rows with each kind of fault, most frequent first."""
        ordered = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{kind}: {count}" for kind, count in ordered)


def search(rows: Dataset, faults: RowCheck, origin: Origin | None = None) -> FaultyRows:
    """Check every row. With `preference_faults`, a pair that reverses an earlier one is faulty as well."""
    found, origin = FaultyRows(), origin or Origin.of(rows)
    pairs = _Pairs() if kind_of(faults) == "preference" else None
    for index, row in enumerate(each_row(rows)):
        if of_row := list(faults(row)):
            found.add(index, origin, of_row)
        elif pairs is not None:  # a row that is faulty in itself contradicts no other
            pairs.add(index, row)
    for reversed_row, other in pairs.reversals() if pairs is not None else ():
        problem = f"{origin.where(other)} is the same pair with chosen and rejected swapped"
        found.add(reversed_row, origin, [Fault("reversed pair", "chosen", problem)])
    return found


def without_media(dataset: Dataset) -> Dataset:
    """Leave out columns of images, audio and video, which are slow to decode and not checked."""
    return dataset.select_columns([column for column in dataset.column_names if column not in _MEDIA])


def each_row(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yield every row, read in batches as a transform takes them."""
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class _Pairs:
    """Checksums of pairs as they are and reversed: 24 bytes a row."""

    def __init__(self) -> None:
        self._rows, self._own, self._reversed = array("Q"), array("Q"), array("Q")

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Add a pair."""
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        self._rows.append(index)
        self._own.append(_digest(prompt, chosen, rejected))
        self._reversed.append(_digest(prompt, rejected, chosen))

    def reversals(self) -> Iterator[tuple[int, int]]:
        """Yield rows whose reversed pair stands in an earlier row, with the first such row."""
        if not self._rows:
            return
        rows, own, swapped = (np.frombuffer(numbers, np.uint64) for numbers in (self._rows, self._own, self._reversed))
        known, first = np.unique(own, return_index=True)
        at = np.minimum(np.searchsorted(known, swapped), len(known) - 1)
        for place in np.flatnonzero((known[at] == swapped) & (first[at] < np.arange(len(own)))):
            yield int(rows[place]), int(rows[first[at[place]]])


def _digest(*values: Any) -> int:
    return xxhash.xxh3_64_intdigest(repr(values).encode("utf-8", "surrogatepass"))


def check_dataset(
    dataset: Any,
    *,
    name: str,
    faults: RowCheck | None,
    num_rounds: int = 1,
    rows_per_round: int = 1,
    on_bad_rows: OnBadRows | None = "raise",
    origin: Origin | None = None,
) -> tuple[Dataset, Origin]:
    """Check a data set before anything is trained on it: its type, size, columns and every row.

    Args:
        dataset: What the user passed.
        name: How the user knows it; every message begins with it.
        faults: Check of one row; None to check no rows.
        num_rounds: Number of parts that the data set is split into.
        rows_per_round: Minimum number of rows per part.
        on_bad_rows: Whether to `raise` an error about faulty rows or `drop` them with a warning. None: `raise`, where
            there is no such option.
        origin: Where the rows come from; by default they are the user's own.

    Returns:
        The data set, of plain rows and without those that were dropped, and where its rows come from.

    Raises:
        DatasetError: If it cannot be trained on.
    """
    check_type(dataset, name)
    dataset = plain(dataset)
    total, needed = len(dataset), num_rounds * rows_per_round
    need = f"every round needs at least {rows_per_round} {'row' if rows_per_round == 1 else 'rows'}"
    if rows_per_round > 1:
        need += " (set by the batch sizes of its section)"
    if total == 0:
        raise DatasetError(f"{name} has no rows.")
    if total < needed:
        raise DatasetError(
            f"{name} has too few rows: {total} for {num_rounds} {'round' if num_rounds == 1 else 'rounds'}; {need}. "
            "Lower `num_rounds` or provide more data."
        )
    origin = origin or Origin.of(dataset)
    found = FaultyRows() if faults is None else _searched(dataset, name, faults, origin)
    if not found.rows:
        return dataset, origin
    bad = len(found.rows)
    summary = f"Faulty rows: {bad} of {total} ({found.counts})."
    if on_bad_rows != "drop":
        advice = ", or set `on_bad_rows: drop` to train without these rows" if on_bad_rows else ""
        raise DatasetError(f"{name}, {found.first} {summary} Fix the data{advice}.")
    if total - bad < needed:
        raise DatasetError(
            f"{name}, {found.first} {summary} Without them {total - bad} rows remain, but {needed} are needed: {need}."
        )
    logger.warning("%s: dropped %d of %d rows (%s). First: %s", name, bad, total, found.counts, found.first)
    dropped = set(found.rows)
    kept = [index for index in range(total) if index not in dropped]
    return dataset.select(kept), origin.select(kept)


def plain(dataset: Dataset) -> Dataset:
    """Remove the format (torch, numpy, pandas), which trainers cannot read. A transform is part of the data."""
    return dataset if dataset.format["type"] in {None, "custom"} else dataset.with_format(None)


def check_type(dataset: Any, name: str) -> None:
    """Raise DatasetError, with advice, if something is no `datasets.Dataset`."""
    if isinstance(dataset, Dataset):
        return
    if dataset is None:
        raise DatasetError(f"{name} is None; it must be a `datasets.Dataset`.")
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        split = "train" if "train" in dataset else next(iter(dataset), "train")
        splits = ", ".join(map(str, dataset)) or "none"
        raise DatasetError(f"{name} is a dictionary of splits ({splits}). Did you mean `dataset[{split!r}]`?")
    if isinstance(dataset, IterableDataset):
        raise DatasetError(
            f"{name} is an IterableDataset, which has no length, so it cannot be split into rounds. Load it without "
            "`streaming=True`."
        )
    hint = " Create one with `datasets.Dataset.from_list(rows)`." if isinstance(dataset, list | tuple) else ""
    raise DatasetError(f"{name} is a {type(dataset).__name__}; it must be a `datasets.Dataset`.{hint}")


def _searched(dataset: Dataset, name: str, faults: RowCheck, origin: Origin) -> FaultyRows:
    rows = without_media(dataset)
    try:
        _check_columns(rows[0] if rows.column_names else {}, dataset.column_names, name, faults)
        return search(rows, faults, origin)
    except UnicodeDecodeError as error:  # Arrow stores bytes unchecked; the first access to the text fails
        raise DatasetError(f"{name}: a text is not UTF-8 ({error}). Save the data as UTF-8.") from None


def _check_columns(row: Mapping[str, Any], columns: Sequence[str], name: str, faults: RowCheck) -> None:
    for fault in faults(row):
        if fault.kind == MISSING_COLUMN:
            hints = [f"`{column}`:{nearest(column, FIELDS)}" for column in columns if column not in FIELDS]
            close = " ".join(["", *(hint for hint in hints if hint.endswith("?"))])
            kind = kind_of(faults)
            mapping = (kind and advice(columns, kind)) or "Rename or map the columns."
            raise DatasetError(
                f"{name} has no column `{fault.field}`. Its columns: {', '.join(f'`{column}`' for column in columns)}."
                f"{close} {fault.problem[0].upper()}{fault.problem[1:]}. {mapping}"
            )
