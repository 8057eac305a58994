"""What an engine rounds comes back as precise as it was. With DeepSpeed: `distributed/test_deepspeed_bf16.py`."""

from types import MethodType, SimpleNamespace

import cases
import pytest
import torch

from hbat.engines.deepspeed.bf16 import FullPrecision, rounds_weights


class Engine:
    """Does to a model what DeepSpeed's engine does, in one process: rounds it, and steps weights of its own."""

    def __init__(self, model):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.own = {
            parameter: parameter.detach().float() for parameter in model.parameters() if parameter.requires_grad
        }
        for parameter in self.own:
            parameter.get_full_hp_param = MethodType(lambda own: self.own[own], parameter)
            parameter.set_full_hp_param = MethodType(lambda own, value: self.own[own].copy_(value), parameter)

    def step(self, by):
        for tensor, own in self.own.items():
            own.add_(by)
            tensor.data.copy_(own)


def trainer_of(model, *, precision="bf16", enabled=True):
    """What is used of a trainer that prepares a model, then batches."""
    accelerator = SimpleNamespace(mixed_precision=precision, deepspeed_engine_wrapped=None)

    def prepare(*objects):
        if model in objects and precision == "bf16" and enabled:
            accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=Engine(model))
        return objects

    accelerator.prepare = prepare
    callbacks = []
    return SimpleNamespace(
        accelerator=accelerator, is_deepspeed_enabled=enabled, add_callback=callbacks.append, callbacks=callbacks
    )


def run(model, *, by, ends=True, others=()):
    precision, trainer = FullPrecision([model, *others]), trainer_of(model)
    precision.attach(trainer)
    trainer.accelerator.prepare(model)
    engine = trainer.accelerator.deepspeed_engine_wrapped.engine
    engine.step(by)
    trainer.accelerator.prepare("batches for evaluation")
    if ends:
        for callback in trainer.callbacks:
            callback.on_train_end(None, None, None)
    precision.give_back()
    return engine


@pytest.mark.parametrize(("precision", "enabled"), [("no", True), ("fp16", True), ("bf16", False)])
def test_nothing_is_kept_where_nothing_is_rounded(precision, enabled):
    model = cases.tiny_llama()
    trainer = trainer_of(model, precision=precision, enabled=enabled)
    before, prepare = [parameter.data_ptr() for parameter in model.parameters()], trainer.accelerator.prepare
    kept = FullPrecision([model])
    kept.attach(trainer)
    assert not rounds_weights(trainer)
    assert trainer.accelerator.prepare is prepare
    assert trainer.callbacks == []
    kept.give_back()
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize("case", ["full", "lora", "tied"])
def test_a_stage_that_moves_nothing_leaves_every_bit(case):
    model = cases.MODEL_CASES[case](0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values())
    run(model, by=0.0)
    after = dict(model.named_parameters())
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


@pytest.mark.parametrize("case", ["full", "lora"])
def test_weights_end_as_the_engine_stepped_them(case):
    """By less than bfloat16 can hold."""
    model = cases.MODEL_CASES[case](0)
    before = cases.weights(model)
    run(model, by=1e-5)
    assert all(torch.equal(tensor, before[name] + 1e-5) for name, tensor in cases.weights(model).items())


def test_a_stage_that_was_cut_off_gives_back_its_start():
    model = cases.tiny_llama(0)
    before = cases.weights(model)
    run(model, by=0.1, ends=False)
    assert cases.largest_difference(cases.weights(model), before) == 0.0
    assert next(model.parameters()).dtype == torch.float32


def test_a_reference_that_its_trainer_rounded_comes_back():
    reference = cases.tiny_llama(1)
    before = cases.weights(reference)
    kept = FullPrecision([reference])
    reference.bfloat16()
    kept.give_back()
    assert all(torch.equal(tensor, before[name]) for name, tensor in cases.weights(reference).items())


def test_a_model_in_bfloat16_stays_what_the_engine_makes_of_it():
    model = cases.tiny_llama(0).bfloat16()
    engine = run(model, by=1e-3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, own.bfloat16()) for tensor, own in engine.own.items())
