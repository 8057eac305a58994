"""A stage whose loss is not finite stops, and the run goes on from its start."""

import functools

import cases
import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback


class Poison(TrainerCallback):
    """Sets a weight to NaN or infinity after the first step of one stage."""

    def __init__(self, stage, value):
        self.stage, self.value, self.current = stage, value, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.current == self.stage and state.global_step == 1:
            with torch.no_grad():
                cases.trainable(model)[WEIGHTS[hasattr(model, "peft_config")]].fill_(self.value)


#: One weight, without an adapter and with one, from which no number comes out whole.
WEIGHTS = [
    "model.norm.weight",
    "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights at the end of a run in which all is finite, trained once for a case."""

    @functools.cache
    def train(case):
        return cases.weights(runs.train(cases.MODEL_CASES[case](0), tmp_path_factory.mktemp("whole")).model)

    return train


@pytest.mark.parametrize(
    ("case", "stage", "name"),
    [
        ("full", 0, "round 1 of 2, sft"),
        ("lora", 3, "round 2 of 2, dpo"),
        pytest.param("lora", 0, "round 1 of 2, sft", marks=pytest.mark.slow),
        pytest.param("full", 3, "round 2 of 2, dpo", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_a_number_stops_the_stage_and_the_run_resumes_from_its_start(
    case, stage, name, whole, tmp_path
):
    build = cases.MODEL_CASES[case]
    with pytest.raises(FloatingPointError, match=rf"not finite in stage {stage} \({name}\) at its step 2"):
        runs.train(build(0), tmp_path / "run", callbacks=[Poison(stage, float("nan"))])
    on_disk = load_file(tmp_path / "run" / "state" / f"weights-{stage:03d}.safetensors")
    assert all(torch.isfinite(each).all() for each in on_disk.values())
    resumed = runs.train(build(0), tmp_path / "run", resume=True)
    assert runs.same(cases.weights(resumed.model), whole(case))


def test_one_bad_micro_batch_of_a_step_is_seen(tmp_path):
    class PoisonOne(TrainerCallback):
        """The weight is bad for the first of two micro-batches only."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.kept = model.model.norm.weight.detach().clone()
            model.model.norm.weight.data.fill_(float("inf"))

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.model.norm.weight.data.copy_(self.kept)

    with pytest.raises(FloatingPointError, match=r"stage 0 .* at its step 1"):
        runs.train(cases.tiny_llama(), tmp_path, callbacks=[PoisonOne()], sft={"gradient_accumulation_steps": 2})


@pytest.mark.parametrize("case", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_weights_that_are_not_finite_at_the_end_of_a_stage_do_not_become_its_result(case, whole, tmp_path):
    """The gradient of the last step is infinite, its loss was not."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == args.max_steps - 1:
                next(iter(cases.trainable(model).values())).grad.fill_(float("inf"))

    build = cases.MODEL_CASES[case]
    with pytest.raises(FloatingPointError, match=r"^The weight '.*' is not finite at the end of stage 0 .*sft"):
        runs.train(build(0), tmp_path / "run", callbacks=[Overflow()])
    resumed = runs.train(build(0), tmp_path / "run", resume=True)
    assert runs.same(cases.weights(resumed.model), whole(case))


class PoisonGradient(TrainerCallback):
    """Makes one gradient NaN in one step of one stage, where the loss is a number; `times` only."""

    def __init__(self, stage, times=1, tensor=0, after=0):
        self.stage, self.times, self.tensor, self.after, self.current, self.rates = stage, times, tensor, after, -1, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.current += 1
        self.rates.append(args.learning_rate)
        self._poison(model, step=0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._poison(model, state.global_step)

    def _poison(self, model, step):
        if self.stage <= self.current < self.stage + self.times and step == self.after:
            parameter = list(cases.trainable(model).values())[self.tensor]
            self.handle = parameter.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    def remove(self):
        handle = self.__dict__.pop("handle", None)
        if handle is not None:
            handle.remove()


class RemoveAtStart(TrainerCallback):
    """Takes the hook of a stage that failed off the parameter before the stage begins anew."""

    def __init__(self, poison):
        self.poison = poison

    def on_train_begin(self, args, state, control, **kwargs):
        self.poison.remove()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_a_number_stops_before_the_step_and_is_named(max_grad_norm, tmp_path):
    poison = PoisonGradient(1, tensor=5)
    model = cases.tiny_llama()
    name = list(cases.trainable(model))[5]
    options = {"max_grad_norm": max_grad_norm}
    with pytest.raises(
        FloatingPointError, match=rf"^The gradient of '{name}' is not finite in stage 1 .* at its step 1"
    ):
        runs.train(model, tmp_path / "run", callbacks=[poison], sft=options, dpo=options)
    poison.remove()
    assert all(torch.isfinite(each).all() for each in cases.weights(model).values())


@pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stage_is_rolled_back_and_trained_with_half_the_learning_rate(case, tmp_path):
    poison = PoisonGradient(1, times=2, after=1)  # each try has logged a step
    options = {"on_nan": "rollback", "optimizer_state": "carry"}
    run = runs.train(
        cases.MODEL_CASES[case](0), tmp_path / "run", callbacks=[RemoveAtStart(poison), poison], **options
    )
    assert poison.rates == [0.1, 0.1, 0.05, 0.025, 0.1, 0.1]
    same = runs.train(cases.MODEL_CASES[case](0), tmp_path / "same", callbacks=[SetRate(1, 0.025)], **options)
    assert runs.same(cases.weights(run.model), cases.weights(same.model))
    steps = [each["step"] for each in run.state.log_history if "dpo/loss" in each or "sft/loss" in each]
    assert steps == sorted(steps)
    assert len(set(steps)) == len(steps)


class SetRate(TrainerCallback):
    """Trains one stage with another learning rate, from its first step."""

    def __init__(self, stage, rate):
        self.stage, self.rate, self.current = stage, rate, -1

    def on_train_begin(self, args, state, control, **kwargs):
        self.current += 1
        if self.current == self.stage:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = group["initial_lr"] = self.rate
            kwargs["lr_scheduler"].base_lrs = [self.rate for _ in kwargs["lr_scheduler"].base_lrs]


def test_a_stage_is_rolled_back_so_often_and_no_more(tmp_path):
    poison = PoisonGradient(1, times=9)
    with pytest.raises(FloatingPointError, match="gradient"):
        runs.train(
            cases.tiny_llama(),
            tmp_path,
            callbacks=[RemoveAtStart(poison), poison],
            on_nan="rollback",
            max_rollbacks=2,
        )
    poison.remove()
    assert poison.rates == [0.1, 0.1, 0.05, 0.025]


def test_a_run_that_resumes_remembers_the_smaller_learning_rate(tmp_path):
    poison = PoisonGradient(1)

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if poison.current == 2:
                raise KeyError("cut off")

    options = {"on_nan": "rollback"}
    with pytest.raises(KeyError):
        runs.train(cases.tiny_llama(), tmp_path / "run", callbacks=[RemoveAtStart(poison), poison, Gone()], **options)
    after = PoisonGradient(99)
    resumed = runs.train(cases.tiny_llama(), tmp_path / "run", resume=True, callbacks=[after], **options)
    assert after.rates == [0.05, 0.1, 0.1]
    other = PoisonGradient(1)
    whole = runs.train(cases.tiny_llama(), tmp_path / "whole", callbacks=[RemoveAtStart(other), other], **options)
    assert runs.same(cases.weights(resumed.model), cases.weights(whole.model))


def test_importance_that_is_not_finite_is_named():
    from hbat.stages.nonfinite import require_finite
    from hbat.state.plan import plan

    stage = plan(2, ["sft", "dpo"])[1]
    require_finite({"a": torch.ones(2)}, "importance of", stage)
    with pytest.raises(FloatingPointError, match=r"The importance of 'b' is not finite at the end of stage 1 .*dpo"):
        require_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}, "importance of", stage)
