"""`evaluation` within a run: more columns of its forgetting matrix, and no change of what is trained."""

import json

import cases
import pytest
import runs
from kills import CutOffError, Kill

from hbat.config.hbat import HBATConfig
from hbat.evaluation.completions import read_rows
from hbat.reports.record import RunRecord
from hbat.stages.measurements import Measurements
from hbat.trainer import HBATTrainer


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} plus 1", "completion": f" {n + 1}"}) + "\n" for n in range(3)))
    return str(file)


def build(folder, evaluation, callbacks=None, *, evaluation_rows=False, **options):
    config = runs.config(folder, **options)
    config = HBATConfig(**{**vars(config), "evaluation": evaluation})
    return HBATTrainer(
        cases.tiny_llama(),
        config,
        runs.rows(),
        runs.rows() if evaluation_rows else None,
        cases.tiny_tokenizer(),
        callbacks=callbacks,
    )


def measured(prompts, **options):
    return {"prompts": prompts, "max_new_tokens": 4, "pairs": None, **options}


def test_every_stage_gets_its_scores_and_training_stays_the_same(tmp_path, prompts):
    run = build(tmp_path / "with", measured(prompts))
    output = run.train()
    without = runs.train(cases.tiny_llama(), tmp_path / "without")
    assert runs.same(cases.weights(run.model), cases.weights(without.model))
    assert list(run.matrix.headline.items()) == [
        ("sft", "loss"),
        ("dpo", "loss"),
        ("completions", "ended"),
        ("rouge", "rougeL"),
    ]
    assert run.matrix.better_of("rouge") == "higher"
    assert [row["stage"] for row in run.matrix.rows if row["scores"].get("rouge")] == [-1, 0, 1, 2, 3]
    folders = {"start", "stage-000-sft", "stage-001-dpo", "stage-002-sft", "stage-003-dpo"}
    assert {folder.name for folder in (tmp_path / "with" / "evaluation").iterdir()} == folders
    assert output.metrics["eval_rouge/rougeL"] == run.matrix.end["rouge"]["rougeL"]
    run.save_model()
    record = RunRecord.read(tmp_path / "with")
    assert record.matrix.headline == run.matrix.headline
    assert "rouge rougeL" in (tmp_path / "with" / "README.md").read_text()
    assert "rougeL" in (tmp_path / "with" / "report.html").read_text()


@pytest.mark.parametrize(("after", "stages"), [("round", [-1, 1, 3]), ("end", [3])])
def test_a_run_is_measured_after_its_rounds_or_at_its_end(tmp_path, prompts, after, stages):
    run = build(tmp_path / "run", measured(prompts, after=after))
    run.train()
    assert [row["stage"] for row in run.matrix.rows if "rouge" in row["scores"]] == stages
    names = ("start", "stage-000-sft", "stage-001-dpo", "stage-002-sft", "stage-003-dpo")
    folders = {names[stage + 1] for stage in stages}
    assert {folder.name for folder in (tmp_path / "run" / "evaluation").iterdir()} == folders


def test_a_run_that_is_resumed_has_the_scores_of_one_that_was_not_cut_off(tmp_path, prompts):
    whole = build(tmp_path / "whole", measured(prompts), num_rounds=1)
    whole.train()
    with pytest.raises(CutOffError):
        build(tmp_path / "cut", measured(prompts), callbacks=[Kill(1, "begin")], num_rounds=1).train()
    resumed = build(tmp_path / "cut", measured(prompts), num_rounds=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.matrix.as_dict() == whole.matrix.as_dict()
    again = build(tmp_path / "cut", measured(prompts), num_rounds=1)
    again.train(resume_from_checkpoint=True)  # nothing is left
    assert again.matrix.as_dict() == whole.matrix.as_dict()


def test_a_run_that_continues_another_with_fewer_objectives_gets_no_column_of_them(tmp_path, prompts):
    first = build(tmp_path / "first", measured(prompts), evaluation_rows=True, num_rounds=1)
    first.train()
    config = runs.config(tmp_path / "second", continue_from=str(tmp_path / "first"), objectives=["sft"], num_rounds=1)
    data = {"sft": runs.rows()["sft"]}
    second = HBATTrainer(cases.tiny_llama(), config, data, processing_class=cases.tiny_tokenizer())
    second.train()
    assert list(second.matrix.headline) == ["sft", "completions", "rouge"]


def test_a_prompt_that_does_not_fit_is_refused_at_construction(tmp_path, prompts):
    with pytest.raises(ValueError, match="do not fit the model's context"):
        build(tmp_path / "run", measured(prompts, max_new_tokens=128, after="end"))


def test_a_stage_that_is_trained_again_is_completed_again(tmp_path, prompts):
    build(tmp_path / "run", measured(prompts), num_rounds=1).train()
    before = read_rows(tmp_path / "run" / "evaluation" / "stage-001-dpo" / "completions.jsonl")
    newest = max((tmp_path / "run" / "state").glob("weights*"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])  # the run goes back to the state before
    run = build(tmp_path / "run", measured(prompts), num_rounds=1, dpo={"learning_rate": 0.5})
    run.train(resume_from_checkpoint=True, allow_changed=["dpo.learning_rate"])
    after = read_rows(tmp_path / "run" / "evaluation" / "stage-001-dpo" / "completions.jsonl")
    assert [row["text"] for row in after] != [row["text"] for row in before]


def test_a_run_that_starts_over_forgets_the_completions_before(tmp_path, prompts):
    build(tmp_path / "run", measured(prompts), num_rounds=1).train()
    run = build(tmp_path / "run", measured(prompts, max_new_tokens=5), num_rounds=1, overwrite_output_dir=True)
    run.train()
    assert {row["stage"] for row in run.matrix.rows} == {-1, 0, 1}


def test_several_processes_are_refused_at_construction(tmp_path, prompts, monkeypatch):
    run = build(tmp_path / "run", measured(prompts))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="`evaluation` measures in one process, and this run has 2"):
        Measurements(run.args, list(run.tracks.values()), run.model, run.processing_class)


def test_a_wrong_option_is_refused_when_the_configuration_is_built(tmp_path):
    with pytest.raises(ValueError, match=r"`evaluation.promts`.*Did you mean `prompts`"):
        runs.config(tmp_path, evaluation={"promts": "x"})
    with pytest.raises(TypeError, match="`evaluation` is a str; it must be a mapping, an `EvalConfig` or null"):
        runs.config(tmp_path, evaluation="rouge")
