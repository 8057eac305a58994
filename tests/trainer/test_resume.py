"""A run that was cut off anywhere goes on to the last bit of the run that was not."""

import functools
import json

import cases
import pytest
import runs
from kills import CutOffError, Kill, assert_equal, options, run_until_killed
from transformers import TrainerCallback

from hbat.state.files import digest
from hbat.state.manifest import RunStateError

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

BUILDERS = {"full": cases.tiny_llama, "lora": functools.partial(cases.lora_llama, dropout=0.1)}
EVALUATION = runs.rows(2, sft=8, dpo=8)


#: Kill, and how often the trainer saves inside a stage.
KILLS = {
    "at the start": (Kill(0, "begin"), None),
    "between stages": (Kill(2, "begin"), None),
    "inside a stage": (Kill(1, "step", 2), None),
    "inside a stage with a checkpoint": (Kill(2, "step", 2), 1),
    "at a checkpoint": (Kill(1, "save", 1), 1),
    "after the last step, which is in a checkpoint": (Kill(1, "end"), 1),
    "in the last stage": (Kill(3, "step", 3), None),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not cut off, trained once for a case and a state."""

    @functools.cache
    def train(case, state):
        return runs.train(BUILDERS[case](0), tmp_path_factory.mktemp("whole"), **options(state))

    return train


# Each way to be cut off once, and the most involved one with every model and state. Slow: what takes the same path,
# and what is below by the death of a process, and in every stage.
SAME_PATH = {"at the start", "between stages", "in the last stage", "inside a stage with a checkpoint"}
CUTS = [
    pytest.param("full", "carry", name, marks=[pytest.mark.slow] if name in SAME_PATH else []) for name in KILLS
] + [
    pytest.param("full", "reset", "inside a stage with a checkpoint", marks=pytest.mark.slow),
    ("lora", "carry", "inside a stage with a checkpoint"),
    pytest.param("lora", "reset", "inside a stage with a checkpoint", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "state", "kill"), CUTS)
def test_a_run_that_was_cut_off_ends_as_if_it_was_not(case, state, kill, whole, tmp_path):
    killer, save_steps = KILLS[kill]
    killer.current = -1
    settings = options(state, save_steps)
    with pytest.raises(CutOffError):
        runs.train(BUILDERS[case](0), tmp_path, callbacks=[killer], **settings)
    resumed = runs.train(BUILDERS[case](0), tmp_path, resume=True, **settings)
    assert_equal(resumed, whole(case, state))


def test_a_run_can_be_cut_off_again_and_again(whole, tmp_path):
    """The first time it is resumed where there is no run, which starts one."""
    settings = options("carry", 1)
    for stage in range(4):  # the callback counts the stages from the one at which its run goes on
        with pytest.raises(CutOffError):
            runs.train(
                BUILDERS["full"](0), tmp_path, resume=True, callbacks=[Kill(int(stage > 0), "step", 2)], **settings
            )
    assert_equal(runs.train(BUILDERS["full"](0), tmp_path, resume=True, **settings), whole("full", "carry"))


def test_a_run_cut_off_while_it_is_evaluated_evaluates_again(tmp_path, monkeypatch):
    settings = options("carry") | {"evaluation": EVALUATION, "num_rounds": 1}
    expected = runs.train(BUILDERS["full"](0), tmp_path / "whole", **settings)
    run = runs.build_run(BUILDERS["full"](0), tmp_path / "run", **settings)
    evaluate, calls = run.evaluate, []

    def evaluates_once():
        calls.append(1)
        if len(calls) == 2:
            raise CutOffError
        return evaluate()

    monkeypatch.setattr(run, "evaluate", evaluates_once)
    with pytest.raises(CutOffError):
        run.train()
    assert json.loads((tmp_path / "run" / "hbat_state.json").read_text())["next_stage"] == 1
    assert_equal(runs.train(BUILDERS["full"](0), tmp_path / "run", resume=True, **settings), expected)


PROGRAM = """
import cases, kills, runs
runs.train(cases.tiny_llama(), sys.argv[1], callbacks=[kills.KillProcess(2, "step", 2)], **kills.options("carry", 1))
"""


def test_a_process_that_was_killed_resumes_in_another(whole, tmp_path):
    run_until_killed(PROGRAM, tmp_path)
    assert (tmp_path / "stage-002-sft" / "checkpoint-1").is_dir()
    resumed = runs.train(BUILDERS["full"](0), tmp_path, resume=True, **options("carry", 1))
    assert_equal(resumed, whole("full", "carry"))


# --- when a run may start, and when go on ----------------------------------------------------------------------------


def test_a_finished_run_returns_its_result_at_once(tmp_path):
    run = runs.build_run(cases.tiny_llama(), tmp_path, num_rounds=1, evaluation=EVALUATION)
    first = run.train()
    stages = Kill(-1, "never")
    other = runs.build_run(cases.tiny_llama(seed=4), tmp_path, num_rounds=1, evaluation=EVALUATION, callbacks=[stages])
    again = other.train(resume_from_checkpoint=True)
    assert stages.current == -1
    assert again == first
    assert runs.same(cases.weights(other.model), cases.weights(run.model))


CHANGES = {
    "a section": ({"dpo": {"beta": 0.7}}, r"dpo\.beta: 0\.1 -> 0\.7"),
    "the strength": ({"ewc": {"strength": 3.0}}, r"ewc.*"),
    "the rounds": ({"num_rounds": 3}, r"run\.num_rounds: 2 -> 3"),
    "the order": ({"objectives": ["dpo", "sft"]}, r"run\.objectives: \['sft', 'dpo'\] -> \['dpo', 'sft'\]"),
    "the data": ({"data": runs.rows(8, sft=77)}, r"data\.sft\.content: "),
    "the number of rows": ({"data": runs.rows(9)}, r"data\.dpo\.rows: 8 -> 9; .*data\.sft\.rows: 8 -> 9"),
    "the moments": ({"optimizer_state": "carry"}, r"run\.optimizer_state: 'reset' -> 'carry'"),
}


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut-off")
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), folder, callbacks=[Kill(1, "begin")])
    return folder


@pytest.mark.parametrize(("changed", "message"), CHANGES.values(), ids=CHANGES)
def test_another_run_is_not_resumed_and_the_message_says_what_changed(changed, message, cut_off):
    with pytest.raises(RunStateError, match=f"holds another run: .*{message}"):
        runs.train(cases.tiny_llama(), cut_off, resume=True, **changed)


def test_a_run_is_not_resumed_with_another_model(cut_off):
    with pytest.raises(RunStateError, match=r"parameters\.shapes"):
        runs.train(cases.tiny_llama(hidden=16), cut_off, resume=True)


def test_a_run_is_not_resumed_with_another_source_of_importance_though_it_was_allowed(tmp_path):
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), tmp_path, ewc={}, callbacks=[Kill(1, "begin")])
    run = runs.build_run(cases.tiny_llama(), tmp_path, ewc={"source": "relative"})
    for allowed in [(), ("ewc.source",), ("ewc.",)]:
        message = r"`ewc\.source` cannot change within a run: " if allowed else r"ewc\.source: 'path' -> 'relative'"
        with pytest.raises(RunStateError, match=message):
            run.train(resume_from_checkpoint=True, allow_changed=allowed)


def test_what_only_concerns_logs_and_checkpoints_may_change(cut_off, tmp_path):
    expected = runs.train(cases.tiny_llama(), tmp_path)
    resumed = runs.train(
        cases.tiny_llama(), cut_off, resume=True, dpo={"logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
    )
    assert runs.same(cases.weights(resumed.model), cases.weights(expected.model))


MANIFESTS = [
    ('{"format": 4, "finge', "holds no complete state .*cannot be read"),
    (
        json.dumps({"format": 99, "checksum": digest({"format": 99})}),
        "has format 99; this version of hbat reads format 5",
    ),
    ('{"format": 4, "epoch": 3}', "its checksum differs"),
    ("{}", "cannot be read"),
]


def test_a_manifest_that_is_not_of_a_run_is_refused(tmp_path):
    run, manifest = runs.build_run(cases.tiny_llama(), tmp_path), tmp_path / "hbat_state.json"
    for text, message in MANIFESTS:
        manifest.write_text(text, encoding="utf-8")
        with pytest.raises(RunStateError, match=message):
            run.train(resume_from_checkpoint=True)
        assert manifest.read_text(encoding="utf-8") == text


# --- what stays on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_as_many_weights_files_stay_beside_the_start_as_states_are_kept(limit, tmp_path):
    found = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            found.append(sorted(each.name for each in (tmp_path / "state").glob("weights-*")))

    save = {"save_strategy": "steps", "save_steps": 1}
    runs.train(cases.tiny_llama(), tmp_path, callbacks=[Look()], sft=save, dpo=save, keep_states=limit)
    weights = [f"weights-{index:03d}.safetensors" for index in range(5)]
    expected = [weights[:1], weights[:2], [weights[0], weights[2]], [weights[0], weights[3]]]
    assert found == (expected if limit == 1 else [*expected[:2], weights[:3], [weights[0], *weights[2:4]]])
    assert sorted(each.name for each in (tmp_path / "state").iterdir()) == [weights[0], *weights[5 - limit :]]
    assert len(list(tmp_path.glob("hbat_state*.json"))) == limit
    assert not list(tmp_path.glob("stage-*"))
    assert not list(tmp_path.rglob("*.tmp"))
    assert not [each for each in tmp_path.rglob("*") if each.suffix in {".bin", ".pt", ".pkl", ".pth"}]
