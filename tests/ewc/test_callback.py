import functools
import itertools
import math

import cases
import oracle
import pytest
import torch
import trl
from peft import LoraConfig
from transformers import TrainerCallback

from hbat.ewc.callback import EWCCallback
from hbat.ewc.log import EWCWarning

STRENGTH = 0.5
KEYS = ("ewc/penalty", "ewc/drift", "ewc/grad_norm_ratio")


@functools.cache
def rows(objective):
    # Four batches of two: with three of them to a step, the last step of an epoch has a single one.
    return {"sft": cases.sft_rows, "dpo": cases.preference_rows}[objective](8)


def build_trainer(objective, model, folder, *, trainer_class=None, build=cases.tiny_llama, **options):
    """A real TRL trainer; the reference of DPO is TRL's own for LoRA, else a second model."""
    callbacks = options.pop("callbacks", None)
    train_dataset = options.pop("train_dataset", None) or rows(objective)
    arguments = cases.CHEAP_ARGS | {"output_dir": str(folder)} | options
    shared = {"train_dataset": train_dataset, "processing_class": cases.tiny_tokenizer(), "callbacks": callbacks}
    if objective == "sft":
        return (trainer_class or trl.SFTTrainer)(model, args=trl.SFTConfig(**arguments), **shared)
    reference = None if hasattr(model, "peft_config") else cases.twin(model, build)
    return (trainer_class or trl.DPOTrainer)(model, reference, args=trl.DPOConfig(**arguments), **shared)


def with_autograd_penalty(objective, anchor, importance, strength):
    """The trainer with the penalty in its loss, so that autograd does all the work.

    The loss of SFT is already divided by the tokens of all micro-batches of a step, that of DPO is divided by the
    trainer: the penalty takes its share of either.
    """

    class WithPenalty(trl.SFTTrainer if objective == "sft" else trl.DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            penalty = sum(
                strength * (importance[name] * (each - anchor[name]) ** 2).sum()
                for name, each in cases.trainable(self.model).items()
            )
            return loss + penalty / (self.current_gradient_accumulation_steps if objective == "sft" else 1)

    return WithPenalty


def anchor_and_importance(model):
    """Anchors away from the start, so that the penalty acts from the first step, and importance by element."""
    start = cases.weights(model)
    noise = cases.random_like(start, 11, std=0.05)
    return {name: each + noise[name] for name, each in start.items()}, cases.random_like(start, 12)


def logs(trainer):
    return [each for each in trainer.state.log_history if "loss" in each]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(weights, logs of the steps) after training in one way; trained once and kept."""

    @functools.cache
    def train(objective, case, clip, accumulation, how):
        model = cases.MODEL_CASES[case](0)
        anchor, importance = anchor_and_importance(model)
        options = {"max_grad_norm": clip, "gradient_accumulation_steps": accumulation}
        if how == "autograd":
            options["trainer_class"] = with_autograd_penalty(objective, anchor, importance, STRENGTH)
        callback = EWCCallback(importance, anchor, strength=STRENGTH)
        if how == "unbound":
            options["callbacks"] = [callback]
        trainer = build_trainer(
            objective, model, tmp_path_factory.mktemp("run"), build=cases.MODEL_CASES[case], **options
        )
        if how == "bound":
            callback.bind(trainer)
        trainer.train()
        return cases.weights(model), logs(trainer)

    return train


SETTINGS = list(itertools.product(("sft", "dpo"), ("full", "lora"), (0.0, 0.3), (1, 3)))


#: Every pair of two values is in one of these; the other settings are slow.
PAIRS = {
    ("sft", "full", 0.0, 1), ("sft", "lora", 0.3, 3), ("dpo", "full", 0.3, 3), ("dpo", "lora", 0.0, 3),
    ("dpo", "lora", 0.3, 1),
}  # fmt: skip
every_setting = pytest.mark.parametrize(
    ("objective", "case", "clip", "accumulation"),
    [pytest.param(*setting, marks=() if setting in PAIRS else pytest.mark.slow) for setting in SETTINGS],
)
bound_or_not = pytest.mark.parametrize("how", ["bound", "unbound"])


# --- the contract: the closed form is the gradient of loss + penalty -------------------------------------------------


@every_setting
@bound_or_not
def test_training_equals_autograd_through_loss_plus_penalty(outcome, objective, case, clip, accumulation, how):
    setting = (objective, case, clip, accumulation)
    expected, reference_logs = outcome(*setting, "autograd")
    found, found_logs = outcome(*setting, how)
    assert cases.largest_difference(found, expected) < 1e-6
    for mine, reference in zip(found_logs, reference_logs, strict=True):
        if "grad_norm" in reference:  # without clipping, transformers 4.57 logs none
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


@every_setting
def test_the_penalty_and_the_clipping_of_these_settings_are_felt(outcome, objective, case, clip, accumulation):
    without, plain_logs = outcome(objective, case, clip, accumulation, "plain")
    held, held_logs = outcome(objective, case, clip, accumulation, "autograd")
    assert cases.largest_difference(held, without) > 1e-3
    if clip:
        assert all(each["grad_norm"] > 1.2 * clip for each in held_logs)
        unclipped, _ = outcome(objective, case, 0.0, accumulation, "autograd")
        assert cases.largest_difference(held, unclipped) > 1e-3
    assert len(plain_logs) == cases.CHEAP_ARGS["max_steps"]


@pytest.mark.parametrize("case", ["tied", "frozen"])
@pytest.mark.parametrize("how", ["bound", pytest.param("unbound", marks=pytest.mark.slow)])
def test_tied_and_frozen_models_equal_autograd_too(outcome, case, how):
    expected, _ = outcome("sft", case, 0.3, 1, "autograd")
    found, _ = outcome("sft", case, 0.3, 1, how)
    assert cases.largest_difference(found, expected) < 1e-6


def test_a_gradient_scaler_does_not_change_the_result(outcome, tmp_path):
    expected, _ = outcome("sft", "full", 0.0, 1, "autograd")
    for bound in (True, False):
        model = cases.tiny_llama()
        anchor, importance = anchor_and_importance(model)
        callback = EWCCallback(importance, anchor, strength=STRENGTH)
        trainer = build_trainer(
            "sft", model, tmp_path, max_grad_norm=0.0, callbacks=None if bound else [callback], logging_steps=50
        )
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if bound:
            callback.bind(trainer)
        trainer.train()
        assert trainer.accelerator.scaler.get_scale() == 2.0**10  # it was used and nothing overflowed
        assert cases.largest_difference(cases.weights(model), expected) < 1e-6


@bound_or_not
def test_a_strength_of_zero_is_bit_identical_to_no_callback(outcome, tmp_path, how):
    expected, expected_logs = outcome("sft", "full", 0.3, 1, "plain")
    model = cases.tiny_llama()
    callback = EWCCallback({}, strength=0.0)  # not even the names are looked at
    trainer = build_trainer(
        "sft", model, tmp_path, max_grad_norm=0.3, callbacks=[callback] if how == "unbound" else None
    )
    if how == "bound":
        callback.bind(trainer)
    trainer.train()
    assert cases.largest_difference(cases.weights(model), expected) == 0.0
    assert [each["loss"] for each in logs(trainer)] == [each["loss"] for each in expected_logs]
    assert not any(key in each for each in logs(trainer) for key in KEYS)


# --- anchor and life of an instance ----------------------------------------------------------------------------------


@bound_or_not
def test_without_an_anchor_the_penalty_pulls_to_the_start(tmp_path, how):
    model = cases.tiny_llama()
    importance = dict.fromkeys(cases.weights(model), 1.0)
    callback = EWCCallback(importance)
    trainer = build_trainer("sft", model, tmp_path, callbacks=[callback] if how == "unbound" else None)
    if how == "bound":
        callback.bind(trainer)
    trainer.train()
    first, second, *_ = logs(trainer)
    assert (first["ewc/penalty"], first["ewc/drift"], first["ewc/grad_norm_ratio"]) == (0.0, 0.0, 0.0)
    assert min(second[key] for key in KEYS) > 0.0


@bound_or_not
def test_one_instance_serves_several_trainings_as_a_fresh_one_would(tmp_path, how):
    def train(callback, seed):
        model = cases.tiny_llama(seed)
        trainer = build_trainer("sft", model, tmp_path, callbacks=[callback] if how == "unbound" else None)
        if how == "bound":
            callback.bind(trainer)
        trainer.train()
        assert "backward" not in trainer.accelerator.__dict__
        return cases.weights(model), logs(trainer)

    importance = dict.fromkeys(cases.weights(cases.tiny_llama()), 1.0)
    used = EWCCallback(importance)
    train(used, 0)
    (found, found_logs), (expected, expected_logs) = train(used, 1), train(EWCCallback(importance), 1)
    assert cases.largest_difference(found, expected) == 0.0
    for key in KEYS:
        assert [each[key] for each in found_logs] == [each[key] for each in expected_logs]


def test_the_same_trainer_can_train_again(tmp_path):
    model = cases.tiny_llama()
    trainer = build_trainer("sft", model, tmp_path)
    EWCCallback(dict.fromkeys(cases.weights(model), 1.0)).bind(trainer)
    for _ in range(2):
        trainer.train()
        assert [each["ewc/penalty"] == 0.0 for each in logs(trainer)] == [True, False, False, False]


def test_binding_twice_adds_the_penalty_once(outcome, tmp_path):
    expected, _ = outcome("sft", "full", 0.3, 1, "autograd")
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    callback = EWCCallback(importance, anchor, strength=STRENGTH)
    trainer = build_trainer("sft", model, tmp_path, max_grad_norm=0.3, callbacks=[callback])
    assert callback.bind(trainer).bind(trainer) is callback
    trainer.train()
    assert cases.largest_difference(cases.weights(model), expected) < 1e-6


@bound_or_not
def test_resuming_without_an_anchor_is_refused_and_with_one_goes_on_exactly(tmp_path, how):
    def trainer_with(callback, folder, **options):
        model = cases.tiny_llama()
        trainer = build_trainer("sft", model, folder, callbacks=[callback] if how == "unbound" else None, **options)
        if how == "bound":
            callback.bind(trainer)
        return trainer, model

    anchor, importance = anchor_and_importance(cases.tiny_llama())
    trainer, whole = trainer_with(
        EWCCallback(importance, anchor, strength=STRENGTH), tmp_path, save_strategy="steps", save_steps=2
    )
    trainer.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer, _ = trainer_with(EWCCallback(importance, strength=STRENGTH), tmp_path)
    with pytest.raises(ValueError, match=r"no `anchor` and training resumes at step 2"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer, resumed = trainer_with(EWCCallback(importance, anchor, strength=STRENGTH), tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert cases.largest_difference(cases.weights(resumed), cases.weights(whole)) == 0.0


def test_anchor_and_importance_are_not_changed(tmp_path):
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    callback = EWCCallback(importance, anchor)
    build_trainer("sft", model, tmp_path, callbacks=[callback], max_steps=2).train()
    expected_anchor, expected_importance = anchor_and_importance(cases.tiny_llama())
    assert cases.largest_difference(callback.anchor, expected_anchor) == 0.0
    assert cases.largest_difference(callback.importance, expected_importance) == 0.0


# --- logs ------------------------------------------------------------------------------------------------------------


@every_setting
@bound_or_not
def test_the_logged_loss_is_the_tasks_and_the_rest_equals_the_oracle(
    outcome, objective, case, clip, accumulation, how
):
    _, plain = outcome(objective, case, clip, accumulation, "plain")
    _, held = outcome(objective, case, clip, accumulation, how)
    assert held[0]["loss"] == plain[0]["loss"]
    start = cases.weights(cases.MODEL_CASES[case](0))
    anchor, importance = anchor_and_importance(cases.MODEL_CASES[case](0))
    pull = oracle.norm(oracle.penalty_gradient(start, anchor, importance, STRENGTH))
    assert held[0]["ewc/drift"] == pytest.approx(oracle.drift(start, anchor), rel=1e-5)
    task_norm = plain[0].get("grad_norm")
    if task_norm is None:  # transformers 4.57 logs none without clipping; with clipping it is the same
        task_norm = outcome(objective, case, 0.3, accumulation, "plain")[1][0]["grad_norm"]
    assert held[0]["ewc/grad_norm_ratio"] == pytest.approx(pull / task_norm, rel=1e-4)


def test_the_logged_penalty_equals_the_oracle(outcome):
    start = cases.weights(cases.lora_llama())
    anchor, importance = anchor_and_importance(cases.lora_llama())
    expected = oracle.penalty(start, anchor, importance, STRENGTH)
    for how in ("bound", "unbound"):
        assert outcome("sft", "lora", 0.3, 3, how)[1][0]["ewc/penalty"] == pytest.approx(expected, rel=1e-5)


@every_setting
def test_bound_and_unbound_log_the_same(outcome, objective, case, clip, accumulation):
    bound, unbound = (outcome(objective, case, clip, accumulation, how)[1] for how in ("bound", "unbound"))
    for first, second in zip(bound, unbound, strict=True):
        for key in (*KEYS, "loss", *({"grad_norm"} & second.keys())):
            assert first[key] == pytest.approx(second[key], rel=1e-4)


@bound_or_not
def test_logging_every_other_step_logs_the_same_numbers(outcome, tmp_path, how):
    _, every = outcome("sft", "full", 0.3, 1, how)
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    callback = EWCCallback(importance, anchor, strength=STRENGTH)
    trainer = build_trainer(
        "sft", model, tmp_path, max_grad_norm=0.3, logging_steps=2, callbacks=[callback] if how == "unbound" else None
    )
    if how == "bound":
        callback.bind(trainer)
    trainer.train()
    found = logs(trainer)
    assert [each["step"] for each in found] == [2, 4]
    for key in KEYS:
        assert [each[key] for each in found] == pytest.approx([each[key] for each in every[1::2]], rel=1e-6)


def test_reporters_see_the_added_entries(tmp_path):
    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    seen, model = [], cases.tiny_llama()
    trainer = build_trainer("sft", model, tmp_path, callbacks=[Reporter()], max_steps=2)
    EWCCallback(dict.fromkeys(cases.weights(model), 1.0)).bind(trainer)
    trainer.train()
    assert [set(KEYS) <= each for each in seen] == [True, True, False]  # not in the summary at the end


# --- verdict ---------------------------------------------------------------------------------------------------------


@bound_or_not
@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (1e-9, r"did nothing.*Raise `strength` \(now 1e-09\)"),
        (1e3, r"dominated.*times the task's.*Lower `strength` \(now 1000\)"),
    ],
)
def test_a_penalty_that_is_dead_or_dominates_is_warned_of(tmp_path, how, strength, message):
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    callback = EWCCallback(importance, anchor, strength=strength)
    trainer = build_trainer(
        "sft", model, tmp_path, learning_rate=1e-7, callbacks=[callback] if how == "unbound" else None
    )
    if how == "bound":
        callback.bind(trainer)
    with pytest.warns(EWCWarning, match=message):
        trainer.train()


def test_two_measured_steps_are_too_few_for_a_verdict_in_each_training_anew(tmp_path):
    anchor, importance = anchor_and_importance(cases.tiny_llama())
    callback = EWCCallback(importance, anchor, strength=1e-9)
    for _ in range(2):  # a warning would be an error
        build_trainer("sft", cases.tiny_llama(), tmp_path, max_steps=2, callbacks=[callback]).train()


# --- proximal method -------------------------------------------------------------------------------------------------


@bound_or_not
def test_proximal_training_equals_a_loop_by_hand(tmp_path, how):
    two = cases.sft_rows(2)  # every step sees both rows, in whatever order
    model, own = cases.tiny_llama(), cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    callback = EWCCallback(importance, anchor, strength=40.0, method="proximal")
    trainer = build_trainer(
        "sft", model, tmp_path, max_grad_norm=0.0, lr_scheduler_type="linear", train_dataset=two,
        callbacks=[callback] if how == "unbound" else None,
    )  # fmt: skip
    if how == "bound":
        callback.bind(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    parameters = cases.trainable(own)
    for step in range(4):
        logits = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rate = 0.1 * (1 - step / 4)
        stepped = {
            name: each - rate * gradient for (name, each), gradient in zip(parameters.items(), gradients, strict=True)
        }
        pulled = oracle.proximal(stepped, anchor, importance, 40.0, dict.fromkeys(parameters, rate))
        with torch.no_grad():
            for name, each in parameters.items():
                each.copy_(torch.from_numpy(pulled[name]))
    assert cases.largest_difference(cases.weights(model), cases.weights(own)) < 1e-6
    assert cases.largest_difference(cases.weights(model), cases.weights(cases.tiny_llama())) > 1e-3
    assert all("ewc/penalty" in each and "ewc/grad_norm_ratio" not in each for each in logs(trainer))


def test_a_large_proximal_strength_keeps_training_stable(tmp_path):
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    importance = {name: each + 0.1 for name, each in importance.items()}
    callback = EWCCallback(importance, anchor, strength=1e12, method="proximal")
    build_trainer("sft", model, tmp_path, callbacks=[callback]).train()
    assert cases.largest_difference(cases.weights(model), anchor) < 1e-6


# --- measuring before ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hbat.ewc.log.EWCWarning")
@pytest.mark.parametrize("case", ["full", "adapter of the trainer"])
def test_the_training_before_is_measured_from_its_own_start(case, tmp_path):
    measured = EWCCallback.measure()
    trainer = build_trainer("sft", cases.tiny_llama(), tmp_path, callbacks=[measured])
    if case != "full":
        trainer = trl.SFTTrainer(
            cases.tiny_llama(), args=trainer.args, train_dataset=rows("sft"), callbacks=[measured],
            processing_class=cases.tiny_tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
    start = cases.weights(trainer.model)
    trainer.train()
    moved = {name: (each - start[name]).double() ** 2 for name, each in cases.weights(trainer.model).items()}
    raw = {name: 1 / (squares + squares.mean()) for name, squares in moved.items() if squares.any()}
    total = sum(float((raw[name] * moved[name]).sum()) for name in raw)
    for name, squares in moved.items():
        expected = raw[name] / total if name in raw else 0 * squares
        assert torch.allclose(measured.importance[name].double(), expected, rtol=1e-4)
    build_trainer("sft", trainer.model, tmp_path, callbacks=[EWCCallback(measured.importance)]).train()


def test_a_training_that_resumes_cannot_be_measured(tmp_path):
    build_trainer("sft", cases.tiny_llama(), tmp_path, save_strategy="steps", save_steps=2).train()
    trainer = build_trainer("sft", cases.tiny_llama(), tmp_path, callbacks=[EWCCallback.measure()])
    with pytest.raises(
        ValueError, match=r"^`EWCCallback.measure` cannot measure a training that resumes, here at step 2"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_names_are_counted_and_the_first_is_named(tmp_path):
    model = cases.tiny_llama()
    anchor, importance = anchor_and_importance(model)
    number = len(importance)
    del importance["model.norm.weight"], importance["lm_head.weight"]
    trainer = build_trainer("sft", model, tmp_path, callbacks=[EWCCallback(importance, anchor)])
    with pytest.raises(KeyError, match=rf"2 of {number} parameters have no importance, first 'model\.norm\.weight'"):
        trainer.train()
    trainer = build_trainer("sft", cases.tiny_llama(), tmp_path, callbacks=[EWCCallback(importance, {})])
    with pytest.raises(KeyError, match=rf"{number} of {number} parameters have no anchor, first 'model\.embed_tokens"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, r"`strength` is -1\.0; it must be at least 0"),
        ({"strength": math.nan}, r"`strength` is nan"),
        ({"method": "decoupled"}, r"`method` is 'decoupled'; it must be 'gradient' or 'proximal'"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        EWCCallback({}, **options)
