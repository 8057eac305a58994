"""The numbers of `make evidence`."""

import itertools
import math
import pathlib
import random
import sys

import pytest


@pytest.fixture(scope="module")
def metrics():
    folder = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "alignment")
    sys.path.insert(0, folder)
    import metrics

    sys.path.remove(folder)
    return metrics


def test_the_area_of_a_point_is_its_rectangle(metrics):
    assert metrics.area([[(0.5, 0.8), (0.5, 0.8)]]) == pytest.approx(0.4)


def test_a_dominated_line_adds_no_area(metrics):
    better, worse = [(0.2, 0.9), (0.9, 0.3)], [(0.1, 0.8), (0.7, 0.2)]
    assert metrics.area([better, worse]) == pytest.approx(metrics.area([better]))


def test_the_area_is_the_share_of_targets_that_some_point_of_a_line_meets(metrics):
    lines = [[(0.1, 0.9), (0.5, 0.8), (0.9, 0.3)], [(0.3, 0.85), (0.8, 0.7)]]
    rng = random.Random(0)
    points = [
        (first[0] + share * (second[0] - first[0]), first[1] + share * (second[1] - first[1]))
        for line in lines
        for first, second in itertools.pairwise(line)
        for share in (step / 20 for step in range(21))
    ]
    targets = [(rng.random(), rng.random()) for _ in range(20_000)]
    met = sum(any(x <= style and y <= right for style, right in points) for x, y in targets) / len(targets)
    assert metrics.area(lines) == pytest.approx(met, abs=0.01)


def test_the_interval_is_students(metrics):
    middle, half = metrics.interval([1.0, 2.0, 3.0, 4.0])
    assert middle == pytest.approx(2.5)
    assert half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2, rel=1e-3)


def test_a_configuration_is_chosen_without_looking_at_its_own_seed(metrics):
    lucky, steady = {0: 1.0, 1: 0.0, 2: 0.0}, {0: 0.4, 1: 0.4, 2: 0.4}
    assert metrics.chosen_without_own_seed([lucky, steady]) == {0: 0.4, 1: 0.0, 2: 0.0}
