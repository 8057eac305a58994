"""Checking the data sets of a run before its first stage: type, size, columns and every row."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hbat.config.fields import nearest
from hbat.data.faults import MISSING_COLUMN, Fault, RowCheck
from hbat.data.formats import FIELDS, preference_faults
from hbat.data.load import DatasetError


@dataclass
class FaultyRows:
    """The faulty rows of a data set.

    Attributes:
        first: The first fault in words, with its row and field.
        rows: Numbers of the faulty rows.
        kinds: How many rows show each kind of fault; a row can show several.
    """

    first: str = ""
    rows: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, row: int, faults: list[Fault]) -> None:
        """Count a row.

        Args:
            row: Its number.
            faults: What is wrong with it.
        """
        if not self.rows:
            stop = "" if faults[0].problem.endswith("?") else "."
            self.first = f"row {row}, field `{faults[0].field}`: {faults[0].problem}{stop}"
        self.rows.append(row)
        self.kinds.update({fault.kind for fault in faults})

    @property
    def counts(self) -> str:
        """The kinds of faults with their numbers of rows, most frequent first."""
        return ", ".join(
            f"{kind}: {count}" for kind, count in sorted(self.kinds.items(), key=lambda it: (-it[1], it[0]))
        )


def search(rows: Any, faults: RowCheck) -> FaultyRows:
    """Check every row of a data set.

    Args:
        rows: A `datasets.Dataset`, or anything with its `iter`.
        faults: The check of one row. With `preference_faults`, a pair that reverses an earlier one is a fault, too.

    Returns:
        The faulty rows.
    """
    found = FaultyRows()
    reversals = _Reversals() if getattr(faults, "func", faults) is preference_faults else None
    number = 0
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            here = list(faults(row))
            if reversals and not here:  # a row that is faulty in itself contradicts nothing
                here = list(reversals.faults(number, row))
            if here:
                found.add(number, here)
            number += 1
    return found


class _Reversals:
    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], int] = {}

    def faults(self, number: int, row: Mapping[str, Any]) -> Iterator[Fault]:
        chosen, rejected = (_digest(row.get("prompt"), row[side]) for side in ("chosen", "rejected"))
        other = self._seen.get((rejected, chosen))
        if other is not None:
            yield Fault("reversed pair", "chosen", f"row {other} has the same pair with chosen and rejected swapped")
        self._seen.setdefault((chosen, rejected), number)


def _digest(*values: Any) -> int:
    text = repr(values).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


logger = logging.getLogger(__name__)


# Decoding these takes long, and no check looks at them.
_MEDIA = {"image", "images", "audio", "audios", "video", "videos"}


def check_dataset(
    dataset: Any,
    *,
    name: str,
    faults: RowCheck | None,
    num_rounds: int = 1,
    rows_a_round: int = 1,
    on_bad_rows: Literal["raise", "drop"] = "raise",
) -> Dataset:
    """Check a data set before anything is trained on it: its type, its size, its columns and every row.

    Args:
        dataset: What the user gave.
        name: How the user knows it; every message begins with it.
        faults: The check of one row; None looks at no row.
        num_rounds: Into how many parts it is cut.
        rows_a_round: Rows that each part needs.
        on_bad_rows: `raise` an error about the faulty rows, or `drop` them with a warning.

    Returns:
        The data set, without its faulty rows where they are dropped.

    Raises:
        DatasetError: If it cannot be trained on.
    """
    _check_type(dataset, name)
    _check_size(len(dataset), name, num_rounds, rows_a_round)
    if faults is None:
        return dataset
    rows = _readable(dataset)
    try:
        _check_columns(rows[0] if rows.column_names else {}, dataset.column_names, name, faults)
        found = search(rows, faults)
    except UnicodeDecodeError as error:  # a reader takes bytes as they come; the first look at the text fails
        raise DatasetError(f"{name}: a text is not UTF-8 ({error}). Save the data as UTF-8.") from None
    if not found.rows:
        return dataset
    total, bad = len(dataset), len(found.rows)
    if on_bad_rows != "drop":
        others = f"{bad} of {total} rows are faulty ({found.counts})" if bad > 1 else f"It is the only one of {total}"
        raise DatasetError(
            f"{name}, {found.first} {others}. Correct the data, or set `on_bad_rows: drop` to train without such rows."
        )
    if total - bad < num_rounds * rows_a_round:
        raise DatasetError(
            f"{name}, {found.first} {bad} of {total} rows are faulty ({found.counts}); without them {total - bad} are "
            f"left, but {num_rounds * rows_a_round} are needed: {_need(rows_a_round)}."
        )
    logger.warning(
        "%s: %d of %d rows are faulty and left out (%s). First: %s", name, bad, total, found.counts, found.first
    )
    dropped = set(found.rows)
    return dataset.select([number for number in range(total) if number not in dropped])


def _check_type(dataset: Any, name: str) -> None:
    if isinstance(dataset, Dataset):
        return
    if dataset is None:
        raise DatasetError(f"{name} is missing (None). Give a `datasets.Dataset`.")
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        split = "train" if "train" in dataset else next(iter(dataset), "train")
        raise DatasetError(
            f"{name} holds several splits ({', '.join(map(str, dataset)) or 'none'}). Did you mean dataset[{split!r}]?"
        )
    if isinstance(dataset, IterableDataset):
        raise DatasetError(
            f"{name} is an IterableDataset, whose length is unknown, so it cannot be cut into rounds. "
            "Load it without `streaming=True`."
        )
    advice = (
        "Make one with `datasets.Dataset.from_list(rows)`." if isinstance(dataset, list | tuple) else "Load it first."
    )
    raise DatasetError(f"{name} is a {type(dataset).__name__}, not a `datasets.Dataset`. {advice}")


def _check_size(rows: int, name: str, num_rounds: int, rows_a_round: int) -> None:
    if rows == 0:
        raise DatasetError(f"{name} has no rows.")
    if rows < num_rounds * rows_a_round:
        rounds = "1 round" if num_rounds == 1 else f"{num_rounds} rounds"
        raise DatasetError(
            f"{name} has too few rows: {rows} for {rounds}; {_need(rows_a_round)}. "
            "Lower `num_rounds`, or give more data."
        )


def _need(rows_a_round: int) -> str:
    if rows_a_round == 1:
        return "every round needs at least one row"
    return f"every round needs at least {rows_a_round} rows, which its section sets by its batch sizes"


def _check_columns(row: Mapping[str, Any], columns: Sequence[str], name: str, faults: RowCheck) -> None:
    for fault in faults(row):
        if fault.kind == MISSING_COLUMN:
            hints = [f"`{column}`:{nearest(column, FIELDS)}" for column in columns if column not in FIELDS]
            close = " ".join(["", *(hint for hint in hints if hint.endswith("?"))])
            raise DatasetError(
                f"{name} has no column `{fault.field}`. Its columns: {', '.join(f'`{column}`' for column in columns)}."
                f"{close} {fault.problem[0].upper()}{fault.problem[1:]}. Rename or map the columns."
            )


def _readable(dataset: Dataset) -> Dataset:
    # A transform of the user's own is part of the data; any other format (torch, numpy) only hides the lists.
    plain = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
    return plain.select_columns([each for each in plain.column_names if each not in _MEDIA])
