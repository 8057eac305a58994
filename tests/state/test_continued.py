"""The start of a run that continues another is on disk whole or not at all, wherever it is cut off."""

import shutil

import pytest
import torch
from faults import Crash, at_every_operation

from hbat.config.hbat import HBATConfig
from hbat.state.fingerprint import Fingerprint
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunStateError
from hbat.state.plan import plan
from hbat.state.run import Run

pytestmark = pytest.mark.usefixtures("fast_disk")


def tensors(number):
    return {"a": torch.full((2, 2), float(number))}


def open_run(path, *, resume=False, source=None, objectives=("sft", "dpo"), **sections):
    config = HBATConfig(
        output_dir=str(path), num_rounds=1, objectives=list(objectives), continue_from=source and str(source)
    )
    trained = {name: {"optim": "sgd"} for name in objectives} | sections
    values = {"run": {"num_rounds": 1, "objectives": list(objectives)}, "ewc": None, **trained}
    return Run.open(config, RunFolder(path), Fingerprint(values, {}, {}), tensors(0), resume=resume)


def finish(run):
    """Commit every stage that is left, each with numbers that tell it."""
    for stage in run.stages_left():
        moments = {"a::exp_avg": torch.full((2, 2), stage.index + 0.5)}
        kept = {"critic": torch.tensor([stage.index + 0.25])} if stage.objective == "dpo" else {}
        record = {"displacement": tensors(stage.index + 1), "importance": tensors(stage.index + 2)}
        left = {"importance": record, "moments": moments, "kept": kept}
        run.commit_stage(stage, steps=5, weights=tensors(10 + stage.index), **left)
    return run


@pytest.fixture
def source(tmp_path):
    run = finish(open_run(tmp_path / "first"))
    run.commit_evaluations([{"stage": 1, "round": 0, "objective": "dpo", "scores": {"sft": {"loss": 0.5}}}])
    return tmp_path / "first"


def held(run):
    """All that a run holds before its next stage, in numbers."""
    return {
        "stage": run.state.next_stage,
        "weights": float(run.weights()["a"][0, 0]),
        "initial": float(run.weights("initial")["a"][0, 0]),
        "importance": {
            name: {kind: float(found["a"][0, 0]) for kind, found in record.items()}
            for name, record in run.consolidation.accumulated.items()
        },
        "moments": {name: float(found["a::exp_avg"][0, 0]) for name, found in run.moments.items()},
        "critic": float(run.kept["dpo"]["critic"]),
        "rows": run.state.evaluations,
        "plan": [(stage.index, stage.round, stage.part, str(stage)) for stage in run.plan],
    }


EXPECTED = {
    "stage": 2,
    "weights": 11.0,
    "initial": 0.0,
    "importance": {"sft": {"displacement": 1.0, "importance": 2.0}, "dpo": {"displacement": 2.0, "importance": 3.0}},
    "moments": {"sft": 0.5, "dpo": 1.5},
    "critic": 1.25,
    "rows": [{"run": "first", "stage": 1, "round": 0, "objective": "dpo", "scores": {"sft": {"loss": 0.5}}}],
    "plan": [(2, 2, 0, "stage 2 (round 2 of 2, sft)"), (3, 2, 0, "stage 3 (round 2 of 2, dpo)")],
}


def test_a_start_cut_off_at_any_file_operation_is_made_again_or_whole(source, tmp_path):
    for number, error in at_every_operation(
        lambda number, arm: (arm(), open_run(tmp_path / str(number), source=source)),
    ):
        assert isinstance(error, Crash)
        path = tmp_path / str(number)
        begun = RunFolder(path).holds_run()
        if begun:  # all is in its own folder
            source.rename(tmp_path / "away")
        run = open_run(path, resume=True, source=source)
        if begun:
            (tmp_path / "away").rename(source)
        assert held(run) == EXPECTED
        assert run.was_resumed
        finish(run)
        again = open_run(path, resume=True, source=source)
        assert again.consolidation.accumulated["sft"]["displacement"]["a"][0, 0] == 1.0 + 3.0
        assert not (path / "state" / "weights-002.safetensors.tmp").exists()
    assert number > 20


def test_the_first_stage_cut_off_while_it_is_committed_leaves_its_start_or_its_end(source, tmp_path):
    def action(number, arm):
        run = open_run(tmp_path / str(number), source=source)
        arm()
        finish(run)

    stages = set()
    for number, error in at_every_operation(action):
        assert isinstance(error, Crash)
        run = open_run(tmp_path / str(number), resume=True, source=source)
        stages.add(run.state.next_stage)
        assert run.state.next_stage > 2 or held(run) == EXPECTED
        assert float(finish(run).consolidation.accumulated["dpo"]["importance"]["a"][0, 0]) == 3.0 + 5.0
    assert stages == {2, 3, 4}


def test_numbers_count_on_over_several_runs_and_rows_keep_the_name_of_theirs(source, tmp_path):
    finish(open_run(tmp_path / "second", source=source, objectives=["dpo"])).commit_evaluations([{"run": "first"}, {}])
    run = open_run(tmp_path / "third", source=tmp_path / "second", objectives=["sft"])
    assert [(stage.index, stage.round) for stage in run.plan] == [(3, 3)]
    assert run.state.evaluations == [{"run": "first"}, {"run": "second"}]
    # Of `dpo` the importance is both runs', and the moments are the second's.
    moved = run.consolidation.accumulated["dpo"]["displacement"]["a"]
    importance = run.consolidation.importance(run.plan[0], tensors(0))["a"]
    assert float((importance * moved).sum()) == pytest.approx(1.0)
    assert float(moved[0, 0]) == 2.0 + 3.0
    assert float(finish(run)._folder.read_tensors(run.state, "optimizer-dpo")["a::exp_avg"][0, 0]) == 2.5  # noqa: SLF001


def test_the_order_of_importance_outlives_a_resume(tmp_path):
    # Floating-point sums over several objectives depend on it.
    finish(open_run(tmp_path / "first", objectives=["dpo", "kto"]))
    options = {"source": tmp_path / "first", "objectives": ["sft", "kto"]}
    run = finish(open_run(tmp_path / "second", **options))
    again = open_run(tmp_path / "second", resume=True, **options)
    assert list(again.consolidation.accumulated) == list(run.consolidation.accumulated) == ["dpo", "kto", "sft"]


def test_moments_of_another_optimizer_stay_behind(source, tmp_path):
    run = open_run(tmp_path / "second", source=source, sft={"optim": "adamw_torch"})
    assert (run.moments["sft"], "a::exp_avg" in run.moments["dpo"]) == ({}, True)
    # Also if the run in between does not train the objective.
    finish(open_run(tmp_path / "between", source=source, objectives=["dpo"]))
    for optim, there in [("adamw_torch", False), ("sgd", True)]:
        run = open_run(tmp_path / optim, source=tmp_path / "between", objectives=["sft"], sft={"optim": optim})
        assert bool(run.moments["sft"]) is there


def test_a_run_whose_folder_was_emptied_after_construction_still_continues_the_other(source, tmp_path):
    open_run(tmp_path / "second", source=source)
    shutil.rmtree(tmp_path / "second")
    assert held(open_run(tmp_path / "second", resume=True, source=source)) == EXPECTED


def test_a_run_continues_another_in_a_folder_without_a_run(source, tmp_path):
    open_run(tmp_path / "second", source=source)
    with pytest.raises(RunStateError, match="holds a run already"):
        open_run(tmp_path / "second", source=source)
    assert plan(1, ["sft"], first_stage=4, rounds_before=2)[0].folder == "stage-004-sft"
