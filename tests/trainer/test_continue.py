"""A run that continues a finished one with new data goes on as one run would have, and leaves the other as it was."""

import functools
import hashlib
import json
import logging
import shutil
from pathlib import Path

import cases
import pytest
import runs
from faults import flip_a_bit, remove, truncate
from kills import CutOffError, Kill, options, run_until_killed

from hbat.reports.matrix import markdown_table
from hbat.state.manifest import RunStateError
from hbat.state.plan import part_indices

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

BUILDERS = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}
both_models = pytest.mark.parametrize("case", BUILDERS)
EVALUATION = runs.rows(2, sft=8, dpo=8)
SETTINGS = options("carry") | {"evaluation": EVALUATION}


def half(number):
    """The rows that the round of a run of two trains on."""
    return {name: rows.select(part_indices(8, 2, number, runs.SEED)) for name, rows in runs.rows().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two rounds over all rows, and its folder."""

    @functools.cache
    def train(case):
        folder = tmp_path_factory.mktemp("whole")
        return runs.train(BUILDERS[case](0), folder, keep_states=5, **SETTINGS), folder

    return train


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run of one round over the first half of the rows."""

    @functools.cache
    def train(case):
        folder = tmp_path_factory.mktemp("first") / "first"
        runs.train(BUILDERS[case](0), folder, data=half(0), num_rounds=1, **SETTINGS)
        return folder

    return train


def second(folder, source, case="full", **changed):
    """The run that continues it with the other half, not yet trained."""
    settings = SETTINGS | {"data": half(1), "num_rounds": 1, "continue_from": str(source)} | changed
    return runs.build_run(BUILDERS[case](0), folder, **settings)


def manifest(folder):
    return json.loads((folder / "hbat_state.json").read_text(encoding="utf-8"))


def contents(folder):
    """Digest of every file by name, with the time at which it was written."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def assert_is_whole(run, folder, expected):
    """Weights, all that the state holds and the scores of new stages are those of the run of two rounds."""
    one, other = expected
    assert runs.same(cases.weights(run.model), cases.weights(one.model))
    kinds = manifest(folder)["files"]
    assert kinds.keys() == manifest(other)["files"].keys()
    for kind in kinds:
        assert runs.same(runs.state_tensors(folder, kind), runs.state_tensors(other, kind)), kind
    rows = [
        {key: row[key] for key in row if key != "run"} for row in run.matrix.rows if row["objective"] or row.get("run")
    ]
    assert rows == one.matrix.rows


# --- one run in two pieces -------------------------------------------------------------------------------------------


@both_models
def test_two_runs_of_one_round_equal_one_run_of_two(case, first, whole, tmp_path):
    before = contents(first(case))
    run = second(tmp_path, first(case), case)
    run.train()
    assert_is_whole(run, tmp_path, whole(case))
    assert contents(first(case)) == before
    # Stages are numbered on; steps and log are the run's own.
    assert {entry["hbat/stage"] for entry in run.state.log_history if "hbat/stage" in entry} == {2, 3}
    assert run.state.global_step == 6
    assert [row.get("run") for row in run.matrix.rows] == ["first"] * 3 + [None] * 3
    assert [label for label, _ in run.matrix.lines()] == [
        "first, start", "first, round 1: sft", "first, round 1: dpo", "start", "round 2: sft", "round 2: dpo",
    ]  # fmt: skip
    assert run.matrix.interference() == whole(case)[0].matrix.interference()
    assert run.matrix.backward_transfer() == whole(case)[0].matrix.backward_transfer()


def test_the_first_stage_is_held_back_by_the_other_objective_and_not_by_its_own(first, whole, tmp_path):
    one = {"objectives": ["sft"], "data": {"sft": half(1)["sft"]}, "evaluation": None}
    run = second(tmp_path / "held", first("full"), **one)
    run.train()
    held = cases.weights(run.model)
    stage_end = whole("full")[1] / "state" / "weights-003.safetensors"
    assert runs.same(held, runs.load_file(stage_end))
    free = second(tmp_path / "free", first("full"), **one | {"ewc": None})
    free.train()
    assert not runs.same(cases.weights(free.model), held)
    # An objective that this run lacks leaves its importance and moments to the next.
    assert {"importance-dpo", "optimizer-dpo"} < manifest(tmp_path / "held")["files"].keys()


def test_an_objective_can_be_added(first, tmp_path):
    rows = half(0)
    alone = {"evaluation": {}, "num_rounds": 1}
    runs.train(
        BUILDERS["full"](0),
        tmp_path / "sft",
        **SETTINGS | alone | {"objectives": ["sft"], "data": {"sft": rows["sft"]}},
    )
    run = second(tmp_path / "dpo", tmp_path / "sft", objectives=["dpo"], data={"dpo": rows["dpo"]}, evaluation={})
    run.train()
    assert runs.same(cases.weights(run.model), runs.state_tensors(first("full"), "weights"))


@pytest.mark.slow
def test_a_run_that_continues_can_be_continued(first, whole, tmp_path):
    sft, dpo = ({name: half(1)[name]} for name in ("sft", "dpo"))
    second(tmp_path / "sft", first("full"), objectives=["sft"], data=sft, evaluation=None).train()
    run = second(tmp_path / "dpo", tmp_path / "sft", objectives=["dpo"], data=dpo, evaluation=None)
    run.train()
    assert runs.same(cases.weights(run.model), cases.weights(whole("full")[0].model))
    assert [row["run"] for row in run.matrix.rows] == ["first"] * 3


def test_a_schedule_over_the_rounds_is_that_of_the_new_rounds(first, tmp_path):
    run = second(tmp_path, first("full"), num_rounds=2, lr_schedule="decay", evaluation=None)
    run.train()
    rates = {}
    for entry in run.state.log_history:
        rates.setdefault(entry["hbat/round"], []).append(entry.get("sft/learning_rate", 0.0))
    assert {number: max(found) for number, found in rates.items()} == pytest.approx({2: 0.01, 3: 0.005})


# --- killed and resumed ----------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_after_its_start_resumes_without_the_other(first, whole, tmp_path):
    source, folder = tmp_path / "first", tmp_path / "run"
    shutil.copytree(first("full"), source)
    with pytest.raises(CutOffError):
        second(folder, source, callbacks=[Kill(1, "step", 2)], sft=SAVES, dpo=SAVES).train()
    assert (folder / "stage-003-dpo" / "checkpoint-1").is_dir()
    shutil.rmtree(source)
    run = second(folder, source, sft=SAVES, dpo=SAVES)
    run.train(resume_from_checkpoint=True)
    assert_is_whole(run, folder, whole("full"))


PROGRAM = """
folder, source, kill, case, here = sys.argv[1:]
sys.path.insert(0, here)
import test_continue as here
from kills import KillProcess
from hbat.state.folder import RunFolder

killer = KillProcess(1, "step", 2)
if kill == "start":
    RunFolder.commit = lambda *arguments: killer._end()
here.second(folder, source, case, callbacks=[killer], sft=here.SAVES, dpo=here.SAVES).train()
"""
SAVES = options("carry", 1)["sft"]


# Processes: `state/test_continued.py` cuts the start off at every operation on files, and a stage is cut off above.
@pytest.mark.slow
@pytest.mark.parametrize("kill", ["start", "step"])
@both_models
def test_a_killed_run_resumes_and_after_its_start_needs_the_other_no_more(case, kill, first, whole, tmp_path):
    folder, source = tmp_path / "run", tmp_path / "first"
    shutil.copytree(first(case), source)
    run_until_killed(PROGRAM, folder, source, kill, case, Path(__file__).parent)
    if kill == "start":
        assert (folder / "state" / "importance-dpo-001.safetensors").is_file()
        assert not (folder / "hbat_state.json").exists()
    else:
        assert (folder / "stage-003-dpo" / "checkpoint-1").is_dir()
        shutil.rmtree(source)
    run = second(folder, source, case, sft=SAVES, dpo=SAVES)
    run.train(resume_from_checkpoint=True)
    assert_is_whole(run, folder, whole(case))


def test_a_run_resumes_with_the_run_that_it_began_with(first, tmp_path):
    with pytest.raises(CutOffError):
        second(tmp_path, first("full"), callbacks=[Kill(0, "begin")]).train()
    for changed, shown in [(tmp_path / "other", "'other'"), (None, "None")]:
        run = second(tmp_path, changed, continue_from=changed and str(changed))
        with pytest.raises(RunStateError, match=rf"run\.continue_from: 'first' -> {shown}\..* cannot change"):
            run.train(resume_from_checkpoint=True, allow_changed=["run.continue_from"])


# --- what is refused, and what is left behind ------------------------------------------------------------------------


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), tmp_path / "first", callbacks=[Kill(1, "begin")])
    with pytest.raises(RunStateError, match=r"not finished: 1 of its 4 stages are done\. Finish it first"):
        second(tmp_path / "run", tmp_path / "first")


def test_a_folder_without_run_is_refused(tmp_path):
    with pytest.raises(RunStateError, match=r"`continue_from` '.*nowhere' holds no run"):
        second(tmp_path / "run", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(kind, flip_a_bit) for kind in ("manifest", "weights", "initial", "importance-dpo", "optimizer-sft")]
    + [("manifest", truncate), ("weights", remove)],
)
def test_a_damaged_run_is_refused_with_the_name_of_the_file(kind, damage, first, tmp_path):
    source = tmp_path / "first"
    shutil.copytree(first("full"), source)
    name = "hbat_state.json" if kind == "manifest" else f"state/{manifest(source)['files'][kind]}"
    damage(source / name)
    with pytest.raises(
        RunStateError, match=rf"`continue_from` '.*first' cannot be continued: .*{name} (is|has|cannot)"
    ):
        second(tmp_path / "run", source)
    assert not (tmp_path / "run").exists()


OTHERS = {
    "source": (
        {"ewc": {"strength": 1.0, "source": "fisher"}},
        r"ewc\.source: 'path' -> 'fisher': the importance",
    ),
    "granularity": ({"ewc": {"strength": 1.0, "granularity": "tensor"}}, r"ewc\.granularity: 'element' -> 'tensor'"),
}


@pytest.mark.parametrize(("changed", "message"), OTHERS.values(), ids=OTHERS)
def test_importance_of_another_kind_is_refused(changed, message, first, tmp_path):
    with pytest.raises(RunStateError, match=f"cannot be continued with other values: {message}"):
        second(tmp_path, first("full"), **changed)


def test_another_model_is_refused(first, tmp_path):
    settings = SETTINGS | {"num_rounds": 1}
    for source, model, name in [
        ("full", cases.tiny_llama(hidden=16), "shapes"),
        ("full", cases.lora_llama(), "tensors"),
        ("lora", cases.lora_llama(rank=2), "shapes"),
        ("lora", cases.lora_llama(seed=1), "frozen"),
    ]:
        with pytest.raises(RunStateError, match=rf"parameters\.{name}: .*the tensors on disk are not those of this"):
            runs.build_run(model, tmp_path, continue_from=str(first(source)), **settings)


def test_without_ewc_no_importance_goes_along_and_without_moments_none(first, tmp_path):
    second(tmp_path / "plain", first("full"), ewc=None, optimizer_state="reset", evaluation=None).train()
    assert manifest(tmp_path / "plain")["files"].keys() == {"weights", "initial"}
    other = {"optim": "sgd", "max_steps": 1}
    run = second(tmp_path / "other", first("full"), sft=other)
    assert "optimizer-sft" not in run.continued.carried
    assert "optimizer-dpo" in run.continued.carried


def test_a_run_without_importance_is_continued_with_a_warning(tmp_path, caplog):
    runs.train(cases.tiny_llama(), tmp_path / "plain", num_rounds=1)
    with caplog.at_level(logging.WARNING, "hbat.state.continued"):
        run = second(tmp_path / "run", tmp_path / "plain", evaluation=None)
    assert "left no importance (its `ewc` was off), so it holds nothing back" in caplog.text
    run.train()
    assert {"importance-sft", "importance-dpo"} < manifest(tmp_path / "run")["files"].keys()


def test_a_folder_with_remains_of_another_run_is_refused(first, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights-007.safetensors").touch()
    with pytest.raises(RunStateError, match=r"holds 'state/weights-007\.safetensors' of another run"):
        second(tmp_path, first("full")).train()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_on_other_rows_do_not_compare(first, tmp_path):
    evaluation = EVALUATION | {"sft": cases.sft_rows(4, 9)}
    run = second(tmp_path, first("full"), evaluation=evaluation)
    run.train()
    sft, dpo = (run.matrix.series(name) for name in ("sft", "dpo"))
    assert sft[:3] == [None] * 3
    assert None not in sft[3:] + dpo
    assert [row["scores"]["sft"]["loss"] for row in run.matrix.rows[:3]] == [
        row["scores"]["sft"]["loss"] for row in manifest(first("full"))["evaluations"]
    ]


def test_a_run_that_evaluates_nothing_reports_no_scores_as_its_own(first, tmp_path):
    run = second(tmp_path, first("full"), evaluation=None)
    result = run.train()
    assert not [name for name in result.metrics if name.startswith("eval_")]
    assert "| first, round 1: dpo |" in markdown_table(run.matrix)
