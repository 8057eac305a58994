"""Scores go into the matrix, the log, the state and a file, once for each point of a run."""

import importlib.util
import json
import types

import cases
import pytest
import torch
from transformers import TrainerState, TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.reporter import RunReporter
from hbat.reports.scores import RunScores
from hbat.state.fingerprint import Fingerprint
from hbat.state.folder import RunFolder
from hbat.state.plan import plan
from hbat.state.run import Run

STAGES = plan(1, ["sft", "dpo"])
DESCRIBED = Fingerprint({"run": {"objectives": ["sft", "dpo"], "num_rounds": 1}}, {}, {})
MODEL = types.SimpleNamespace(config=types.SimpleNamespace(to_json_string=lambda: "{}"))


@pytest.fixture
def run(tmp_path):
    config = HBATConfig(output_dir=str(tmp_path), disable_tqdm=True, ewc=None)
    return Run.open(config, RunFolder(tmp_path), DESCRIBED, {"a": torch.zeros(1)}, resume=False)


@pytest.fixture
def reporter(tmp_path):
    config = HBATConfig(output_dir=str(tmp_path), disable_tqdm=True)
    made = RunReporter(config, MODEL, TrainerState(), 4, TrainingArguments(str(tmp_path), **cases.CHEAP_ARGS))
    yield made
    made.close()


@pytest.fixture
def scores(tmp_path):
    return RunScores(ForgettingMatrix({"sft": "loss", "dpo": "loss"}), RunFolder(tmp_path))


def finish(run, stage):
    run.commit_stage(stage, steps=2, importance=None, moments={}, weights={"a": torch.ones(1)})


def test_scores_are_due_once_at_the_start_and_once_after_every_stage(run, reporter, scores, tmp_path):
    assert scores.last() == {}
    for number, stage in enumerate([None, *STAGES]):
        if stage is not None:
            finish(run, stage)
        assert scores.are_due(run)
        scores.take({"sft": {"loss": 1.0 + number}, "dpo": {"loss": 2.0}}, run, reporter)
        assert not scores.are_due(run)
    rows = RunFolder(tmp_path).read().evaluations
    assert [(row["stage"], row["round"], row["objective"]) for row in rows] == [
        (-1, 1, None),
        (0, 1, "sft"),
        (1, 1, "dpo"),
    ]
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert (written["rows"], written["backward_transfer"]) == (rows, {"sft": -1.0})
    assert scores.last() == {"eval_sft/loss": 3.0, "eval_dpo/loss": 2.0}
    log = reporter.state.log_history
    assert [(entry["step"], entry["eval_sft/loss"]) for entry in log] == [(0, 1.0), (2, 2.0), (4, 3.0)]
    assert run.state.log["entries"] == 3


def consolidated(folder):
    config = HBATConfig(output_dir=str(folder), disable_tqdm=True)
    run = Run.open(config, RunFolder(folder), DESCRIBED, {"a": torch.zeros(2)}, resume=False)
    return run, {"a": torch.tensor([0.25, 0.75])}, {"a": torch.tensor([1.0, 3.0])}


def test_an_objective_that_was_not_evaluated_before_has_no_increase(reporter, scores, tmp_path):
    run, path, moved = consolidated(tmp_path)
    for stage in STAGES:
        scores.take({"dpo": {"loss": 1.0}}, run, reporter)
        left = {"displacement": moved, "importance": path}
        run.commit_stage(stage, steps=2, importance=left, moments={}, weights={"a": torch.ones(2)})
    assert run.state.predicted
    scores.take({"sft": {"loss": 4.0}, "dpo": {"loss": 1.0}}, run, reporter)
    assert "dpo/ewc/measured" not in reporter.state.log_history[-1]


def test_the_increase_that_was_predicted_is_logged_beside_the_measured_one(reporter, scores, tmp_path):
    run, path, moved = consolidated(tmp_path)
    scores.take({"sft": {"loss": 5.0}, "dpo": {"loss": 2.0}}, run, reporter)
    for stage, share, loss in ((STAGES[0], 1.0, 4.0), (STAGES[1], 0.25, 4.5)):  # the second goes half as far
        left = {"displacement": {"a": share * moved["a"]}, "importance": path}
        run.commit_stage(stage, steps=2, importance=left, moments={}, weights={"a": torch.ones(2)})
        scores.take({"sft": {"loss": loss}, "dpo": {"loss": 1.0}}, run, reporter)
    keys = ("dpo/ewc/predicted", "dpo/ewc/measured")
    found = [[entry.get(key) for key in keys] for entry in reporter.state.log_history]
    assert found == [[None, None], [None, None], [pytest.approx(0.25), 0.5]]


def test_only_the_main_process_writes_the_file(run, reporter, scores, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    scores.take({"sft": {"loss": 1.0}}, run, reporter)
    scores.draw()
    assert not list(tmp_path.glob("evaluation.*"))


@pytest.mark.parametrize("installed", [True, False])
def test_scores_are_drawn_if_there_are_any_and_matplotlib_is_installed(
    installed, run, reporter, scores, tmp_path, monkeypatch
):
    if installed:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scores.draw()
    assert not (tmp_path / "evaluation.png").exists()
    scores.take({"sft": {"loss": 1.0}}, run, reporter)
    scores.draw()
    assert (tmp_path / "evaluation.png").exists() is installed
