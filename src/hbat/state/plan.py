"""The plan of a run: which objective trains when, and on which rows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One objective within a round: one `train()` of one trainer.

    Attributes:
        index: Position in the run, from 0.
        round: Round it belongs to, from 0.
        objective: Name of what it minimises.
        num_rounds: Number of rounds of the run.
    """

    index: int
    round: int
    objective: str
    num_rounds: int

    @property
    def folder(self) -> str:
        """Name of the stage's folder inside the run's."""
        return f"stage-{self.index:03d}-{self.objective}"

    def __str__(self) -> str:
        return f"stage {self.index} (round {self.round + 1} of {self.num_rounds}, {self.objective})"


def plan(num_rounds: int, objectives: Sequence[str]) -> list[Stage]:
    """List the stages of a run in order.

    Args:
        num_rounds: N, the number of rounds.
        objectives: Names of the objectives of a round, in order.

    Returns:
        N times the number of objectives stages.
    """
    return [
        Stage(index=n * len(objectives) + position, round=n, objective=name, num_rounds=num_rounds)
        for n in range(num_rounds)
        for position, name in enumerate(objectives)
    ]


def part_indices(num_rows: int, num_rounds: int, round_index: int, seed: int) -> list[int]:
    """Rows of a data set that one round trains on.

    The rows are dealt by a seeded permutation into parts that are disjoint, together hold every row, and differ by at
    most one row. Inside a part the rows keep their order, so the single part of one round is the data set itself.

    Args:
        num_rows: Number of rows of the data set.
        num_rounds: N, the number of parts.
        round_index: The round, from 0 to N - 1.
        seed: Seed of the permutation.

    Returns:
        Row numbers in ascending order.

    Raises:
        ValueError: If there are fewer rows than rounds.
    """
    if num_rows < num_rounds:
        raise ValueError(
            f"`num_rounds` is {num_rounds} but the data set has {num_rows} rows: every round needs at least one. "
            "Lower `num_rounds` or add data."
        )
    rows = list(range(num_rows))
    random.Random(seed).shuffle(rows)  # noqa: S311 - a seeded permutation, not cryptography
    short, extra = divmod(num_rows, num_rounds)
    start = round_index * short + min(round_index, extra)
    return sorted(rows[start : start + short + (round_index < extra)])
