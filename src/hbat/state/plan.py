"""The plan of a run: which objective trains when, and on which rows."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One objective within a round: one `train()` of one trainer.

    Attributes:
        index: Position in the run, from 0; a run that continues another counts on from it.
        round: Its round, from 1, likewise.
        objective: Name of the objective that it trains.
        num_rounds: Number of rounds of the run, without those that it continues.
        rounds_before: Number of rounds of the runs that the run continues.
        is_last: Whether the run ends with it.
    """

    index: int
    round: int
    objective: str
    num_rounds: int
    rounds_before: int = 0
    is_last: bool = False

    @property
    def part(self) -> int:
        """Which of the run's `num_rounds` parts of the data it trains on, from 0."""
        return self.round - self.rounds_before - 1

    @property
    def last_round(self) -> int:
        """Number of the run's last round, from 1."""
        return self.rounds_before + self.num_rounds

    @property
    def folder(self) -> str:
        """Name of the stage's folder inside the run's."""
        return f"stage-{self.index:03d}-{self.objective}"

    def __str__(self) -> str:
        return f"stage {self.index} (round {self.round} of {self.last_round}, {self.objective})"


def plan(
    num_rounds: int,
    objectives: Sequence[str],
    *,
    shares: Mapping[str, Sequence[float]] | None = None,
    first_stage: int = 0,
    rounds_before: int = 0,
) -> list[Stage]:
    """List the stages of a run in order: each round trains every objective once that has a share of its data there."""
    order = [
        (rounds_before + number + 1, name)
        for number in range(num_rounds)
        for name in objectives
        if shares is None or shares[name][number] > 0
    ]
    return [
        Stage(
            index=first_stage + position,
            round=number,
            objective=name,
            num_rounds=num_rounds,
            rounds_before=rounds_before,
            is_last=position == len(order) - 1,
        )
        for position, (number, name) in enumerate(order)
    ]


def part_indices(
    num_rows: int, num_rounds: int, round_index: int, seed: int, shares: Sequence[float] | None = None
) -> list[int]:
    """Rows of a data set that one of the parts (`round_index`, from 0) holds, in ascending order.

    A seeded permutation deals the rows into disjoint parts: without `shares` they hold every row together and differ
    in size by at most one. Inside a part the rows keep their order, so with one round the part is the data set itself.
    The sum of `shares` is at most 1.

    Raises:
        ValueError: If there are fewer rows than equal parts.
    """
    if shares is None and num_rows < num_rounds:
        raise ValueError(
            f"`num_rounds` is {num_rounds} but the data set has {num_rows} rows: every round needs at least one. "
            "Lower `num_rounds` or add data."
        )
    rows = list(range(num_rows))
    random.Random(seed).shuffle(rows)  # noqa: S311 - a seeded permutation, not cryptography
    start, end = part_bounds(num_rows, num_rounds, round_index, shares)
    return sorted(rows[start:end])


def part_bounds(
    num_rows: int, num_rounds: int, round_index: int, shares: Sequence[float] | None = None
) -> tuple[int, int]:
    """Where a part begins and ends in the permutation of the rows; the arguments are those of `part_indices`."""
    if shares is not None:
        start, end = (round(num_rows * math.fsum(shares[:number])) for number in (round_index, round_index + 1))
        return start, end
    size, extra = divmod(num_rows, num_rounds)
    start = round_index * size + min(round_index, extra)
    return start, start + size + (round_index < extra)
