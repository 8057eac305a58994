"""The numbers of `make evidence`."""

import itertools
import math
import pathlib
import random
import sys

import pytest


@pytest.fixture(scope="module")
def scripts():
    folder = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "alignment")
    sys.path.insert(0, folder)
    import metrics
    import tables

    sys.path.remove(folder)
    return metrics, tables


@pytest.fixture
def metrics(scripts):
    return scripts[0]


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


def run(method, family, seed, middle, end):
    """A record with right and stylish answers at the start (none), in the middle and at the end of the line."""
    points = {"0": 0.0, "0.5": middle, "1": end}
    scores = {
        share: {heat: {"all": dict.fromkeys(("accuracy", "style", "both"), value)} for heat in ("T0", "T0.75", "T1")}
        for share, value in points.items()
    }
    options = {"ewc": {"source": "path", "strength": 0.5} if family == "path" else None}
    return {"method": method, "family": family, "regime": "main", "base": "small", "seed": seed, "rate": 6e-4,
            "options": options, "scores": scores}  # fmt: skip


def test_the_main_table_has_ends_best_points_and_paired_differences(scripts):
    records = [
        run("two-stage 6e-4", "two-stage", 0, 0.6, 0.2), run("two-stage 6e-4", "two-stage", 1, 0.4, 0.4),
        run("two-stage 1e-4", "two-stage", 0, 0.1, 0.5), run("two-stage 1e-4", "two-stage", 1, 0.1, 0.1),
        run("path strength 0.5", "path", 0, 0.9, 0.8), run("path strength 0.5", "path", 1, 0.5, 0.7),
    ]  # fmt: skip
    lines = [line.strip("| ").split(" | ") for line in dict(scripts[1].tables(records))["Main table"].splitlines()]
    assert {label: cells[0] for label, *cells in lines[2:]} == {
        "two-stage 1e-4, end": "30.0",
        "two-stage 6e-4, end": "30.0",
        "two-stage, best of 4": "50.0",  # the middle at 6e-4
        "**HBAT** (`path`, strength 0.5), end": "75.0",
        "HBAT, best of 2": "75.0",
        "HBAT, end, minus two-stage, best of 4": "+25.0 [-38.5, +88.5]",  # 20 and 30, of which t(1) is 12.706
        "HBAT, best of 2, minus that": "+25.0 [-38.5, +88.5]",
        # On seed 0 the choice of seed 1, the middle or end at 6e-4; on seed 1 that of seed 0, its middle.
        "HBAT, end, minus two-stage, one of 4 chosen on other seeds": "+25.0 [-38.5, +88.5]",
    }
