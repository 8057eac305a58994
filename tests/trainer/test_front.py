"""The line between the start and the end of a run's last stage: its scores, its models, and what it leaves alone."""

import functools
import json
import re
import shutil

import cases
import ppo_cases
import ppo_stages
import pytest
import runs
from kills import CutOffError, Kill
from safetensors.torch import load_file

from hbat.state.manifest import RunStateError

pytestmark = pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")

EVALUATION = runs.rows(4, sft=8, dpo=9)
WRITTEN = {"front.json", "front.png"}


def build(folder, case="full", *, model=None, **options):
    options = {"num_rounds": 1, "evaluation": EVALUATION} | options
    return runs.build_run(model or cases.MODEL_CASES[case](0), folder, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a case, trained once."""

    @functools.cache
    def train(case="full", **options):
        run = build(tmp_path_factory.mktemp("run"), case, **options)
        run.train()
        return run

    return train


@pytest.fixture
def folder_of(tmp_path):
    """Copy the folder of a run."""
    return lambda run: shutil.copytree(run.args.output_dir, tmp_path / "copy")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_on_disk(folder):
    """Trainable weights at the start and at the end of the last stage."""
    return [load_file(folder / "state" / f"weights-00{number}.safetensors") for number in (1, 2)]


def between(start, end, share):
    return {name: start[name] + share * (end[name] - start[name]) for name in start}


# --- scores ----------------------------------------------------------------------------------------------------------


each_case = pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])


@each_case
def test_the_line_begins_and_ends_with_the_scores_of_the_last_two_rows_of_the_matrix(case, trained, folder_of):
    run = trained(case)
    again = build(folder_of(run), case)
    front = again.front()
    assert front.points == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [front.rows[0]["scores"], front.rows[-1]["scores"]] == [row["scores"] for row in run.matrix.rows[-2:]]
    assert len({row["scores"]["dpo"]["loss"] for row in front.rows}) == 5
    again.move_to(0.25)
    assert again.evaluate() == front.rows[1]["scores"]


def test_ppo_and_its_reward_are_measured_at_the_last_stage_too(tmp_path):
    evaluation = {"sft": cases.sft_rows(2, 1), "ppo": ppo_cases.prompts(3)}
    run = ppo_stages.train("lora", tmp_path, evaluation=evaluation, num_rounds=1)
    front = run.front([1, 0])
    assert [row["scores"] for row in front.rows] == [row["scores"] for row in run.matrix.rows[-2:]]
    assert json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))["better"]["ppo"] == "higher"


@runs.needs_kto
def test_kto_is_measured_at_the_last_stage_too_and_an_objective_without_evaluation_rows_is_left_out(tmp_path):
    evaluation = {"sft": EVALUATION["sft"], "kto": runs.kto_rows(4, 1)}
    options = {"objectives": ["sft", "dpo", "kto"], "kto": runs.section(), "evaluation": evaluation}
    run = build(tmp_path, data=runs.rows() | {"kto": runs.kto_rows(8)}, **options)
    run.train()
    front = run.front([0, 1])
    assert list(front.headline) == ["sft", "kto"]
    assert [row["scores"] for row in front.rows] == [row["scores"] for row in run.matrix.rows[-2:]]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["full", "lora"])
def test_a_point_is_the_weighted_mean_of_start_and_end(case, trained):
    run = trained(case)
    start, end = weights_on_disk(run._folder.path)  # noqa: SLF001
    run.move_to(0.75)
    assert cases.largest_difference(cases.weights(run.model), between(start, end, 0.75)) < 1e-7
    run.move_to(0)
    assert runs.same(cases.weights(run.model), start)
    run.move_to(1)
    assert runs.same(cases.weights(run.model), end)


def test_one_is_the_end_of_the_stage_whatever_end_weight_the_run_had(trained):
    whole, averaged = trained(), trained(end_weight=0.25)
    start, kept = weights_on_disk(averaged._folder.path)  # noqa: SLF001
    _, end = weights_on_disk(whole._folder.path)  # noqa: SLF001
    assert cases.largest_difference(kept, between(start, end, 0.25)) < 1e-7
    averaged.move_to(1)
    assert cases.largest_difference(cases.weights(averaged.model), end) < 1e-6
    averaged.move_to(0.25)
    assert runs.same(cases.weights(averaged.model), kept)


def test_an_end_weight_that_a_finished_run_is_resumed_with_changes_no_point(trained, folder_of):
    run = trained()
    again = build(folder_of(run), end_weight=0.5)
    again.train(resume_from_checkpoint=True, allow_changed=["run.end_weight"])
    again.move_to(1)
    assert runs.same(cases.weights(again.model), cases.weights(run.model))


@each_case
def test_the_model_at_a_point_is_saved_with_tokenizer_and_a_card_that_says_so(case, trained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained(case)
    run.move_to(0.5)
    run.save_model(str(tmp_path))
    if case == "lora":
        loaded = PeftModel.from_pretrained(cases.tiny_llama(), tmp_path, is_trainable=True)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert runs.same(cases.weights(loaded), cases.weights(run.model))
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<pad>"  # noqa: S105 - no password
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "end_weight: `0.5`" in card
    assert "another point of its last stage" in card
    run.front([0.5])
    run.save_model(str(tmp_path / "end"))
    card = (tmp_path / "end" / "README.md").read_text(encoding="utf-8")
    assert "end_weight: `1.0`" in card
    assert "another point" not in card


# --- what it leaves alone --------------------------------------------------------------------------------------------


@each_case
def test_the_run_on_disk_and_in_memory_stays_as_it_was(case, trained, folder_of):
    run = trained(case)
    folder = folder_of(run)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)  # of other tests
    before = files(folder)
    again = build(folder, case)
    again.front([0, 0.5])
    after = files(folder)
    assert {str(path) for path in after.keys() - before.keys()} == WRITTEN
    assert before == {path: after[path] for path in before}
    assert runs.same(cases.weights(again.model), cases.weights(run.model))
    assert again.matrix == run.matrix
    assert again.train(resume_from_checkpoint=True).metrics == run.train(resume_from_checkpoint=True).metrics


def test_the_end_comes_back_after_an_evaluation_that_fails(trained, monkeypatch):
    run = trained()
    _, end = weights_on_disk(run._folder.path)  # noqa: SLF001
    monkeypatch.setitem(run.tracks["dpo"].objective.trainer_kwargs, "no_such_argument", 1)
    with pytest.raises(TypeError, match="no_such_argument"):
        run.front([0.5])
    assert runs.same(cases.weights(run.model), end)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(CutOffError):
        build(tmp_path, callbacks=[Kill(1, "step", 2)]).train()
    before = files(tmp_path)
    with pytest.raises(RunStateError, match=r"is not finished: 1 of its 2 stages are done.*`hbat train --resume`"):
        build(tmp_path).front()
    assert files(tmp_path) == before


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [-0.01, 1.5, float("nan"), "0.5", True, None])
def test_a_point_that_is_no_number_between_0_and_1_is_named(point, trained):
    with pytest.raises(ValueError, match=f"`points` is {re.escape(repr(point))}; it must be a number between 0 and 1"):
        trained().front([0, point])
    with pytest.raises(ValueError, match=f"`end_weight` is {re.escape(repr(point))}; it must be a number"):
        trained().move_to(point)


def test_no_points_are_refused(trained):
    with pytest.raises(ValueError, match="`points` is empty"):
        trained().front([])


@pytest.mark.parametrize("evaluation", [None, {"sft": EVALUATION["sft"]}])
def test_a_missing_evaluation_set_is_refused(evaluation, trained):
    with pytest.raises(ValueError, match=r"of \['sft', 'dpo'\] only \[.*\] have evaluation rows.*`eval_datasets`"):
        build(trained().args.output_dir, evaluation=evaluation).front()


def test_a_folder_without_a_run_is_refused_and_not_made(tmp_path):
    with pytest.raises(RunStateError, match="holds no run"):
        build(tmp_path / "none").front()
    assert not (tmp_path / "none").exists()


def test_a_run_that_keeps_one_state_has_lost_the_start_of_its_last_stage(tmp_path):
    run = build(tmp_path, keep_states=1)
    run.train()
    with pytest.raises(RunStateError, match=r"start of the last stage is no longer.*`keep_states: 2`"):
        run.front()


def test_a_run_that_kept_nothing_of_its_last_stage_has_no_line(tmp_path):
    run = build(tmp_path, end_weight=0.0)
    run.train()
    with pytest.raises(RunStateError, match="`end_weight: 0`"):
        run.front()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_rounds": 2}, "run.num_rounds: 1 -> 2"),
        ({"objectives": ["dpo", "sft"]}, "run.objectives: "),
        ({"case": "lora"}, "parameters."),
    ],
    ids=["rounds", "objectives", "model"],
)
def test_another_run_is_named(options, named, trained):
    with pytest.raises(RunStateError, match=rf"holds another run: .*{re.escape(named)}"):
        build(trained().args.output_dir, **options).front()


def test_damaged_weights_are_named(trained, folder_of):
    folder = folder_of(trained())
    (folder / "state" / "weights-001.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunStateError, match=r"weights-001\.safetensors has 7 bytes instead of"):
        build(folder).front()


@pytest.mark.filterwarnings("ignore::hbat.model.load.PrecisionWarning")
def test_half_precision_is_averaged_in_single_precision(tmp_path):
    run = build(tmp_path, model=cases.bf16_llama())
    run.train()
    start, end = ({name: each.float() for name, each in weights.items()} for weights in weights_on_disk(tmp_path))
    run.move_to(0.5)
    expected = {name: ((start[name] + end[name]) / 2).bfloat16() for name in start}
    assert runs.same(cases.weights(run.model), expected)
