"""What the evidence computes from scores: areas under fronts, paired intervals, choices that do not see their seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

Record = Mapping[str, Any]
Point = tuple[float, float]  # style, accuracy

#: 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_STEPS = 20  # points that are filled in between two points of a line


def line(record: Record, heat: str, group: str = "all") -> list[Point]:
    """Style and accuracy along a run's averaging line, from the last stage's start to its end."""
    scores = [scores[heat][group] for scores in record["scores"].values()]
    return [(score["style"], score["accuracy"]) for score in scores]


def area(lines: Sequence[Sequence[Point]]) -> float:
    """Area that the lines dominate: of all (style, accuracy), those that some point of a line is at least as good as.

    Between neighbours a line is straight.
    """
    points = [point for points in lines for pair in pairwise(points) for point in _between(*pair)]
    total, best = 0.0, 0.0
    for style, accuracy in sorted(points, reverse=True):  # from the most style to the least
        if accuracy > best:
            total += (accuracy - best) * style
            best = accuracy
    return total


def _between(first: Point, second: Point) -> list[Point]:
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    return [(first[0] + s * (second[0] - first[0]), first[1] + s * (second[1] - first[1])) for s in shares]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval (infinite for one value)."""
    if len(values) == 1:
        return values[0], math.inf
    return fmean(values), _T[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def chosen_without_own_seed(scores: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """For every seed the score, on it, of the configuration that is best on the mean of the other seeds.

    Args:
        scores: Scores by seed, of every configuration; all have the same seeds.
    """
    seeds = list(scores[0])
    if len(seeds) == 1:
        return {seeds[0]: fmean(score[seeds[0]] for score in scores)}

    def elsewhere(seed: int) -> Callable[[Mapping[int, float]], float]:
        return lambda score: fmean(value for other, value in score.items() if other != seed)

    return {seed: max(scores, key=elsewhere(seed))[seed] for seed in seeds}
