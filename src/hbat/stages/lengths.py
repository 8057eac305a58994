"""How long rows are in tokens, and what a trainer cuts and drops of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from hbat.data.template import Limits, RowFit, row_fit
from hbat.objectives.track import Track
from hbat.stages.builder import TrainerBuilder
from hbat.stages.dropped_rows import rows_left

_NO_LIMIT = Limits(vocabulary=0)


@dataclass(frozen=True)
class RowLengths:
    """Tokens per row of a data set.

    Attributes:
        name: Its name: objective and whether it is trained or evaluated on.
        median: Half of the rows have as many at most.
        most: 95 of 100 rows have as many at most.
        longest: Tokens of the longest row.
        limit: `max_length`; None without one.
        cut: Rows that are longer.
        dropped: Rows that the trainer drops, all of whose tokens to learn from are cut off; None if it packs rows.
    """

    name: str
    median: int
    most: int
    longest: int
    limit: int | None
    cut: int
    dropped: int | None


def measure_rows(tracks: Sequence[Track], builder: TrainerBuilder, tokenizer: Any) -> list[RowLengths]:
    """Measure all rows of objectives whose layout is known; none for a processor, which prepares them its own way."""
    found = []
    for track in tracks:
        fit = row_fit(track.objective.row_check(), tokenizer, _NO_LIMIT)
        if fit is None or hasattr(tokenizer, "tokenizer"):
            continue
        limit = getattr(track.args, "max_length", None)
        left: dict[str, int | None] = {}
        if limit is not None:
            train, evaluation = track.train_dataset, track.eval_dataset
            with builder.building(track, train_dataset=train, eval_dataset=evaluation) as trainer:
                left = {"train": rows_left(trainer, "train"), "eval": rows_left(trainer, "eval")}
        for split, rows in (("train", track.train_dataset), ("eval", track.eval_dataset)):
            if rows is not None:
                found.append(_lengths(f"{track.name} {split}", rows, fit, limit, left.get(split, len(rows))))
    return found


def _lengths(name: str, rows: Any, fit: RowFit, limit: int | None, left: int | None) -> RowLengths:
    counts = sorted(fit.length(row) for row in rows)
    return RowLengths(
        name=name,
        median=median_low(counts),
        most=counts[(95 * len(counts) - 1) // 100],
        longest=counts[-1],
        limit=limit,
        cut=0 if limit is None else sum(count > limit for count in counts),
        dropped=None if left is None else len(rows) - left,
    )
