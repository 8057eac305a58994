"""What a person sees of a run: bar, lines, `progress.json`."""

import json
import math
import sys
import types

import pytest

from hbat.reports import progress
from hbat.reports.costs import cost_entry, duration, run_metrics, stage_line, tokens_per_second
from hbat.reports.files import PROGRESS_FILE
from hbat.reports.progress import EvaluationBar, Progress, StageProgress
from hbat.state.plan import plan

FORMAT = progress.tqdm.format_dict.fget
PLAN = plan(2, ["sft", "dpo"])


@pytest.fixture
def clock(monkeypatch):
    """The time that the progress sees, which passes only when it is told."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def terminal(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    return capsys


def train(shown, at, clock, steps, *, seconds=1.0, logs=None):
    for _ in range(steps):
        clock.seconds += seconds
        at.step(at.done + 1)
        at.note(logs or {})
        shown.show(at)


def begin(shown, stage, *, before=0, done=0, steps=10, later=None):
    at = StageProgress(stage, done, steps)
    shown.stage_begins(at, before=before, later=later or {})
    return at


def test_the_bar_counts_the_steps_of_the_run_and_corrects_its_total(terminal, tmp_path, clock):
    shown = Progress(tmp_path, 0, 100, shows=True)
    first = begin(shown, PLAN[0], later={"sft": 10, "dpo": 20})
    train(shown, first, clock, 10, logs={"loss": 0.1234})
    second = begin(shown, PLAN[1], before=10, steps=8, later={"sft": 10, "dpo": 10})
    train(shown, second, clock, 8)
    shown.close()
    said = terminal.readouterr().err
    for text in ("round 1/2 sft", "10/40", "10/10, loss 0.123", "round 1/2 dpo", "18/38"):
        assert text in said


@pytest.mark.parametrize(("columns", "end"), [(60, "4/10"), (80, "run 0:06"), (90, "loss 0.123"), (200, "GiB")])
def test_a_narrow_terminal_shows_whole_values(terminal, monkeypatch, tmp_path, clock, columns, end):
    monkeypatch.setattr(progress.tqdm, "format_dict", property(lambda bar: FORMAT(bar) | {"ncols": columns}))
    shown = Progress(tmp_path, 0, 10, shows=True)
    train(shown, begin(shown, PLAN[0]), clock, 4, logs={"loss": 0.1234, "mean_token_accuracy": 0.9})
    shown.close()
    last = terminal.readouterr().err.split("\r")[-1].rstrip()
    assert len(last) <= columns
    assert last.endswith(end)


def test_the_bar_of_a_run_that_is_resumed_starts_where_it_was(terminal, tmp_path):
    shown = Progress(tmp_path, 20, 40, shows=True)
    begin(shown, PLAN[2], before=20, later={"dpo": 10})
    shown.close()
    assert "20/40" in terminal.readouterr().err


def test_without_a_terminal_there_are_lines_at_most_once_a_minute(capsys, tmp_path, clock):
    shown = Progress(tmp_path, 0, 100, shows=True)
    train(shown, begin(shown, PLAN[0], steps=100), clock, 100, seconds=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"round 1/2 sft: {done}/100" for done in (0, 31, 62, 93)]


@pytest.mark.parametrize("redraws", [True, False])
def test_nothing_is_shown_where_nothing_is_wanted(redraws, capsys, monkeypatch, tmp_path, clock):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: redraws)
    shown = Progress(None, 0, 10, shows=False)
    train(shown, begin(shown, PLAN[0]), clock, 10)
    shown.say("Scores")
    shown.close()
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_that_of_training_alone_and_knows_every_objective(tmp_path, clock):
    shown = Progress(tmp_path, 0, 30, shows=False)
    first = begin(shown, PLAN[0], steps=10, later={"sft": 10, "dpo": 10})
    train(shown, first, clock, 10, seconds=3.0)
    second = begin(shown, PLAN[1], before=10, later={"sft": 10, "dpo": 10})
    train(shown, second, clock, 4, seconds=5.0)
    clock.seconds += 1000.0  # an evaluation
    second.pause()
    train(shown, second, clock, 1, seconds=5.0)
    written = json.loads((tmp_path / PROGRESS_FILE).read_text())
    assert "5/10, 0:25 left, of the run 1:45" in written["doing"]  # 5 * 5, and 10 * 3 and 10 * 5 after it
    assert written["stage"] == 1


def test_the_loss_is_smoothed_and_what_says_more_than_it_is_shown(clock):
    at = StageProgress(PLAN[1], 0, 10)
    at.note({"loss": 1.0, "rewards/accuracies": 0.25, "mean_token_accuracy": 0.9})
    at.note({"loss": 0.5, "rewards/accuracies": 0.75, "mean_token_accuracy": 0.9, "ewc/penalty": 0.5})
    assert ", loss 0.900, accuracy 0.75, penalty 50 %" in at.shown(None)
    assert "0.90 " not in at.shown(None)
    at.note({"eval_loss": 3.0})
    assert "loss 0.900" in at.shown(None)


def test_what_is_no_number_is_not_shown(clock):
    at = StageProgress(PLAN[1], 0, 10)
    for odd in ({"loss": "low"}, {"loss": math.nan}, {"loss": 1.0, "reward": [1.0], "ewc/penalty": math.inf}):
        at.note(odd)
    assert ", loss 1.000, " in at.shown(None)
    assert "reward" not in at.shown(None)


def test_tokens_per_second_are_those_between_two_entries(clock):
    at = StageProgress(PLAN[0], 0, 10)
    for tokens in (5000, 6000):
        clock.seconds += 2.0
        at.step(at.done + 1)
        at.note({"loss": 1.0, "num_tokens": tokens})
    assert "500 tokens/s" in at.shown(None)


def test_the_file_is_gone_when_the_run_has_ended(tmp_path):
    shown = Progress(tmp_path, 0, 10, shows=False)
    shown.between("evaluating")
    assert json.loads((tmp_path / PROGRESS_FILE).read_text())["doing"] == "evaluating"
    shown.close()
    assert not list(tmp_path.iterdir())


def test_the_bar_says_what_the_run_does_between_stages(terminal, tmp_path):
    shown = Progress(tmp_path, 0, 20, shows=True)
    begin(shown, PLAN[0])
    shown.between("completing 4 prompts")
    last = terminal.readouterr().err.rpartition("\r")[2]
    assert "completing 4 prompts" in last
    assert "round" not in last
    assert json.loads((tmp_path / PROGRESS_FILE).read_text())["doing"] == "completing 4 prompts"


def test_an_evaluation_has_a_bar_of_its_own(terminal):
    state = types.SimpleNamespace(is_local_process_zero=True)
    bar = EvaluationBar("dpo")
    for _ in range(3):
        bar.on_prediction_step(None, state, None, eval_dataloader=[0, 1, 2])
    bar.on_evaluate(None, state, None)
    assert "evaluating dpo" in (said := terminal.readouterr().err)
    assert "/3 " in said


# --- costs -----------------------------------------------------------------------------------------------------------

COST = {
    "stage": 1, "objective": "dpo", "steps": 20, "tokens": 4000, "seconds": 100.0, "evaluation": 10.0, "saving": 10.0,
    "ewc": 1.0, "peak_gib": 2.5,
}  # fmt: skip


def test_tokens_per_second_leave_evaluating_and_saving_out():
    assert tokens_per_second(COST) == 50.0
    assert tokens_per_second(COST | {"tokens": 0}) is None


def test_a_stage_says_in_a_line_what_it_cost_and_how_strong_its_penalty_was():
    assert stage_line(PLAN[1], COST | {"ewc_ratio": 0.3}) == (
        "Round 1 of 2, dpo: 20 steps in 1:40, 50.0 tokens/s, peak 2.5 GiB, 10 % evaluation, 10 % saving, 1 % EWC, "
        "the penalty's gradient 0.30 of the task's."
    )


def test_the_log_has_shares_and_the_run_sums():
    entry = cost_entry(COST)
    assert entry["dpo/cost/seconds"] == 100.0
    assert (entry["dpo/cost/evaluation_share"], entry["dpo/cost/ewc_share"]) == (0.1, 0.01)
    metrics = run_metrics([{"stage": -1, "seconds": 20.0, "peak_gib": 1.0}, COST])
    assert metrics == {"train_runtime": 120.0, "train_tokens_per_second": 50.0}
    assert run_metrics([]) == {"train_runtime": 0}
    assert run_metrics([COST, COST | {"tokens": 0}])["train_tokens_per_second"] == 50.0


def test_a_stage_that_was_resumed_says_which_steps_its_costs_are_about():
    line = stage_line(PLAN[1], COST | {"resumed_at": 12})
    assert line.startswith("Round 1 of 2, dpo: 20 steps, from 12 on in 1:40")


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (3700, "1:01:40"), (600, "10:00")])
def test_durations_read_as_clocks_do(seconds, text):
    assert duration(seconds) == text
