"""A small campaign of kills: `make faults` is the large one, whose tables are in docs/faults.md."""

import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import kill_plan
import pytest


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_runs_that_are_killed_at_random_moments_end_as_if_they_were_not(count):
    command = [sys.executable, "benchmarks/fault_campaign.py", "--quick", "--runs", str(count), "--seed", "3"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"**{count} of {count}**" in done.stdout


# --- what is drawn and how ends are compared -------------------------------------------------------------------------


@dataclass
class Whole:
    """How long an uninterrupted run took."""

    seconds: float = 2.0
    operations: dict = field(default_factory=lambda: {"state": 60, "other": 40})


def test_every_level_of_every_factor_is_drawn_often_enough_and_always_the_same():
    cases = kill_plan.draw_cases(50, 1)
    for name, levels in kill_plan.FACTORS.items():
        for level in levels:
            assert sum(getattr(case, name) == level for case in cases) >= 5
    assert {case.objectives for case in cases if case.source == "fisher"} == {"sft+dpo"}
    assert cases == kill_plan.draw_cases(50, 1)
    assert cases != kill_plan.draw_cases(50, 2)


def test_kills_fall_into_what_is_left_of_a_run():
    chance = random.Random(1)
    kills = [kill_plan.draw_kill(chance, Whole(), 0.5) for _ in range(400)]
    assert {kill.kind for kill in kills} == {"time", "operation", "empty", "torn"}
    assert 0.9 < max(kill.seconds for kill in kills) <= 1.0
    assert max(kill.number for kill in kills if kill.group == "state") == 30
    assert max(kill.number for kill in kills if kill.group == "other") == 20


def test_the_first_kill_of_a_run_is_never_the_kernels():
    chance = random.Random(1)
    kills = [kill_plan.draw_kill(chance, Whole(), first=True) for _ in range(100)]
    assert {kill.kind for kill in kills} == {"time", "operation", "empty"}


def test_ends_that_differ_say_in_what():
    found = kill_plan.differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "d": 4})
    assert found == ["b: 3 -> 2", "c: None -> 3", "d: 4 -> None"]
    assert kill_plan.differences({"a": 1}, {"a": 1}) == []
