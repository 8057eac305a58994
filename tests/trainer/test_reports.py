"""What a run shows: callbacks, log, reporters and the scores after every stage."""

import json
import math
from typing import ClassVar

import cases
import pytest
import runs
from transformers import TrainerCallback

EVALUATION = runs.rows(4, sft=8, dpo=9)


class Witness(TrainerCallback):
    """Notes what a user's callback is called for."""

    def __init__(self):
        self.events = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append((type(args).__name__, args.seed, "begin"))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append((type(args).__name__, args.seed, state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append((type(args).__name__, args.seed, "end"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(run, folder, callback, result) of two rounds with evaluation and TensorBoard."""
    folder, witness = tmp_path_factory.mktemp("evaluated"), Witness()
    run = runs.build_run(
        cases.tiny_llama(),
        folder,
        evaluation=EVALUATION,
        callbacks=[witness],
        ewc={"strength": 0.5},
        report_to="tensorboard",
        sft={"seed": 20},
        dpo={"seed": 40},
    )
    return run, folder, witness, run.train()


def test_a_callback_of_the_user_sees_every_stage(evaluated):
    _, _, witness, _ = evaluated
    stages = [("SFTConfig", 20), ("DPOConfig", 41), ("SFTConfig", 22), ("DPOConfig", 43)]
    assert witness.events == [(*stage, event) for stage in stages for event in ("begin", 1, 2, "end")]


def test_a_callback_of_one_objective_sees_its_stages_alone(tmp_path):
    class Seen(TrainerCallback):
        stages: ClassVar = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.stages.append(type(args).__name__)

    runs.train(cases.tiny_llama(), tmp_path, callbacks={"dpo": [Seen()]}, ewc=None)
    assert Seen.stages == ["DPOConfig"] * 2


def test_the_log_has_one_step_axis_with_both_objectives(evaluated):
    run, folder, _, _ = evaluated
    log = run.state.log_history
    steps = {name: [each["step"] for each in log if f"{name}/loss" in each] for name in ("sft", "dpo")}
    assert steps == {"sft": [1, 2, 5, 6], "dpo": [3, 4, 7, 8]}
    assert [each["step"] for each in log] == sorted(each["step"] for each in log)
    assert run.state.global_step == 8
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == log
    places = [(each["hbat/stage"], each["hbat/round"]) for each in log if "sft/loss" in each]
    assert places == [(0, 1), (0, 1), (2, 2), (2, 2)]


def test_tensorboard_gets_one_file_with_steps_that_only_grow(evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, _, _ = evaluated
    files = list((folder / "runs").rglob("events.out.*"))
    assert len(files) == 1
    assert list(folder.rglob("events.out.*")) == files
    events = EventAccumulator(str(files[0])).Reload()
    tags = {"train/sft/loss", "train/dpo/loss", "train/dpo/rewards/accuracies", "train/dpo/ewc/penalty"}
    assert tags | {"eval/sft/loss", "eval/dpo/loss"} <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        steps = [each.step for each in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [each.step for each in events.Scalars("train/sft/loss")] == [1, 2, 5, 6]
    assert [each.step for each in events.Scalars("train/dpo/ewc/penalty")] == [3, 4, 7, 8]
    assert [each.step for each in events.Scalars("eval/dpo/loss")] == [0, 2, 4, 6, 8]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_every_objective_is_evaluated_at_the_start_and_after_every_stage(evaluated):
    run, folder, _, result = evaluated
    rows = run.matrix.rows
    assert [(each["stage"], each["objective"]) for each in rows] == [
        (-1, None), (0, "sft"), (1, "dpo"), (2, "sft"), (3, "dpo")
    ]  # fmt: skip
    assert all(each["scores"].keys() == {"sft", "dpo"} for each in rows)
    assert json.loads((folder / "evaluation.json").read_text())["rows"] == rows
    assert result.global_step == 8
    assert result.metrics["eval_sft/loss"] == rows[-1]["scores"]["sft"]["loss"]


def test_backward_transfer_is_what_came_after_an_objectives_last_own_stage(evaluated):
    run, folder, _, _ = evaluated
    losses = run.matrix.series("sft")
    assert run.matrix.backward_transfer() == {"sft": losses[3] - losses[4]}
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["backward_transfer"] == run.matrix.backward_transfer()
    assert written["forgetting"] == run.matrix.forgetting()
    assert written["forgetting"].keys() == {"sft", "dpo"}


def test_scores_equal_those_of_a_plain_trainer_on_the_same_weights(evaluated, tmp_path):
    import trl

    run, _, _, _ = evaluated
    weights = cases.weights(run.model)
    arguments = cases.CHEAP_ARGS | {"output_dir": str(tmp_path)}
    shared = {"processing_class": cases.tiny_tokenizer()}
    sft = trl.SFTTrainer(
        runs.loaded(cases.tiny_llama, weights),
        args=trl.SFTConfig(**arguments),
        train_dataset=EVALUATION["sft"],
        eval_dataset=EVALUATION["sft"],
        **shared,
    )
    expected = sft.evaluate()["eval_loss"]
    dpo = trl.DPOTrainer(
        runs.loaded(cases.tiny_llama, weights),
        cases.tiny_llama(),
        args=trl.DPOConfig(**arguments),
        train_dataset=EVALUATION["dpo"],
        eval_dataset=EVALUATION["dpo"],
        **shared,
    )
    scores = run.matrix.rows[-1]["scores"]
    assert scores["sft"]["loss"] == pytest.approx(expected, abs=1e-6)
    assert scores["dpo"]["loss"] == pytest.approx(dpo.evaluate()["eval_loss"], abs=1e-6)


def check_reference_is_the_start(run):
    losses = run.matrix.series("dpo")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in losses[1:])
    assert run.evaluate()["dpo"]["loss"] == losses[-1]


def test_preference_scores_compare_with_the_start_of_the_run(evaluated):
    check_reference_is_the_start(evaluated[0])


def test_preference_scores_of_an_adapter_compare_with_the_start_of_the_run(tmp_path):
    evaluation = {"dpo": EVALUATION["dpo"]}
    check_reference_is_the_start(runs.train(cases.lora_llama(), tmp_path, num_rounds=1, evaluation=evaluation))


def test_the_training_loss_is_the_mean_of_training_losses(evaluated):
    run, _, _, output = evaluated
    own = [value for entry in run.state.log_history for key, value in entry.items() if key in {"sft/loss", "dpo/loss"}]
    assert output.training_loss == pytest.approx(sum(own) / len(own))


@pytest.mark.parametrize("case", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_evaluation_alone_before_training_changes_nothing(case, tmp_path):
    model = cases.MODEL_CASES[case](0)
    before = cases.weights(model)
    run = runs.build_run(model, tmp_path / "run", evaluation=EVALUATION)
    found = run.evaluate()
    assert found["dpo"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found == run.evaluate()
    assert runs.same(cases.weights(model), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.parametrize(
    "build", [cases.tiny_llama, cases.embedding_lora, pytest.param(cases.lora_llama, marks=pytest.mark.slow)]
)
def test_evaluation_between_stages_does_not_change_what_is_trained(build, tmp_path):
    options = {"num_rounds": 1, "ewc": {"strength": 1.0}}
    with_scores = runs.train(build(0), tmp_path / "with", evaluation=EVALUATION, **options)
    without = runs.train(build(0), tmp_path / "without", **options)
    assert runs.same(cases.weights(with_scores.model), cases.weights(without.model))


def test_the_trainers_own_evaluation_inside_a_stage_is_logged_with_its_objective(tmp_path):
    run = runs.train(
        cases.tiny_llama(),
        tmp_path,
        num_rounds=1,
        evaluation={"sft": EVALUATION["sft"]},
        sft={"eval_strategy": "steps", "eval_steps": 1},
    )
    inside = [each["step"] for each in run.state.log_history if "eval_sft_stage/loss" in each]
    assert inside == [1, 2]


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_saved_model_is_the_trained_one(case, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = runs.train(cases.MODEL_CASES[case](0), tmp_path / "run", num_rounds=1)
    run.save_model(str(tmp_path / "saved"))
    if case == "lora":
        loaded = PeftModel.from_pretrained(cases.tiny_llama(), tmp_path / "saved", is_trainable=True)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert runs.same(cases.weights(loaded), cases.weights(run.model))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == "<pad>"  # noqa: S105 - no password
    assert "* sft: 8 rows, 2 steps a stage, learning rate 0.1\n" in (tmp_path / "saved" / "README.md").read_text()
    assert "hybrid alignment training" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_a_stage_shorter_than_its_logging_steps_leaves_its_last_step_in_the_log(tmp_path):
    sections = {name: {"logging_steps": 10} for name in ("sft", "dpo")}
    run = runs.build_run(cases.tiny_llama(), tmp_path, num_rounds=1, ewc={"strength": 0.5}, **sections)
    result = run.train()
    losses = [entry for entry in run.state.log_history if any(name.endswith("/loss") for name in entry)]
    assert [entry["step"] for entry in losses] == [2, 4]
    assert result.training_loss > 0
    assert "dpo/ewc/grad_norm_ratio" in losses[1]


def test_the_state_names_the_model_and_its_adapter(tmp_path):
    model = cases.lora_llama()
    model.config._name_or_path = "some/model"  # noqa: SLF001 - where transformers keeps it
    runs.train(model, tmp_path, num_rounds=1)
    assert json.loads((tmp_path / "hbat_state.json").read_text())["model"] == "some/model with LoRA of rank 4"


@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama])  # PEFT writes a README.md itself
def test_a_readme_of_the_users_own_is_left_as_it_is_and_a_card_is_replaced(build, tmp_path, caplog):
    run, file = runs.build_run(build(), tmp_path, num_rounds=1), tmp_path / "README.md"
    run.save_model()
    card = file.read_text()
    assert "hybrid alignment training" in card
    run.save_model()
    assert file.read_text() == card
    assert "it was kept" not in caplog.text
    for header in ("", "tags: [llama]", "tags:", "tags: 5", "tags: [{a: b}]", "tags: [", "library_name: peft"):
        caplog.clear()
        file.write_text(f"---\n{header}\n---\nMine.\n")
        run.save_model()
        assert file.read_text() == f"---\n{header}\n---\nMine.\n"
        assert "it was kept" in caplog.text
