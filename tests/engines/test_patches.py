"""Patches act, let the method below do its work, and can be undone in any order."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import Accelerator
from torch import nn

from hbat.engines.patches import (
    after_backward,
    after_prepare,
    at_add_adapter,
    at_checkpoint,
    at_clipping,
    at_scheduler,
    before_engine_step,
    given_reference,
    keep_models,
    let_epochs_grow,
    undo_all,
    without_empty_groups,
)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def backward(accelerator, weight):
    accelerator.backward((weight**2).sum())


def test_action_runs_once_after_each_backward_pass_with_the_loss(accelerator):
    weight, seen = torch.tensor([3.0], requires_grad=True), []
    after_backward(accelerator, lambda loss: seen.append((loss.item(), loss.requires_grad, weight.grad.item())))
    backward(accelerator, weight)
    backward(accelerator, weight)
    assert seen == [(9.0, False, 6.0), (9.0, False, 12.0)]  # the gradient was there already


def test_arguments_of_the_backward_pass_go_through(accelerator):
    after_backward(accelerator, lambda loss: None)
    weight = torch.tensor([3.0], requires_grad=True)
    loss = (weight**2).sum()
    accelerator.backward(loss, retain_graph=True)
    accelerator.backward(loss)
    assert weight.grad.item() == 12.0


def test_undone_the_accelerator_is_as_it_was(accelerator):
    before, seen = dict(accelerator.__dict__), []
    undo = after_backward(accelerator, seen.append)
    undo()
    undo()
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert accelerator.__dict__ == before
    assert seen == []


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_nested_actions_can_be_undone_in_any_order(accelerator, order):
    before, seen = dict(accelerator.__dict__), []
    undos = [after_backward(accelerator, lambda loss, index=index: seen.append(index)) for index in range(3)]
    remaining = {0, 1, 2}
    for index in order:
        undos[index]()
        remaining.remove(index)
        seen.clear()
        weight = torch.tensor([1.0], requires_grad=True)
        backward(accelerator, weight)
        assert seen == sorted(remaining)
        assert weight.grad.item() == 2.0
    assert accelerator.__dict__ == before


def test_a_foreign_wrapper_beneath_is_put_back(accelerator):
    original, seen = accelerator.backward, []

    def foreign(loss, **kwargs):
        seen.append("foreign")
        original(loss, **kwargs)

    accelerator.backward = foreign
    after_backward(accelerator, lambda loss: seen.append("ours"))()
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert accelerator.backward is foreign
    assert seen == ["foreign"]


def test_an_action_can_be_set_again_after_it_was_undone(accelerator):
    seen = []
    after_backward(accelerator, lambda loss: seen.append("first"))()
    after_backward(accelerator, lambda loss: seen.append("second"))
    backward(accelerator, torch.tensor([1.0], requires_grad=True))
    assert seen == ["second"]


class Owner:
    """Notes its calls: the methods of trainers, accelerators and samplers that are patched."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__") or name == "calls":
            raise AttributeError(name)

        def method(*args, **kwargs):
            self.calls.append((name, *args))
            return name

        return method


PATCHES = {
    "step": lambda owner: before_engine_step(owner, lambda: None),
    "clip_grad_norm_": lambda owner: at_clipping(owner, lambda *args: None),
    "prepare": lambda owner: after_prepare(owner, lambda: None),
    "create_scheduler": lambda owner: at_scheduler(owner, lambda inner, *args: None),
    "_load_from_checkpoint": lambda owner: at_checkpoint(owner, lambda inner, *args: None),
    "add_adapter": lambda owner: at_add_adapter(owner, lambda inner, *args: None),
    "set_epoch": let_epochs_grow,
}


@pytest.mark.parametrize("name", PATCHES)
def test_undone_a_patch_is_gone(name):
    owner = SimpleNamespace(**{name: lambda *args: "as it was"})
    before = owner.__dict__[name]
    undo = PATCHES[name](owner)
    assert owner.__dict__[name] is not before
    undo()
    assert owner.__dict__[name] is before


@pytest.mark.parametrize("last", [False, True])
def test_an_engines_step_is_preceded_at_the_boundary_of_accumulation(last):
    engine = Owner()
    engine.is_gradient_accumulation_boundary = lambda: last
    before_engine_step(engine, lambda: engine.calls.append("action"))
    assert engine.step(1) == "step"
    assert engine.calls == (["action", ("step", 1)] if last else [("step", 1)])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_actions_before_an_engines_step_run_in_the_order_in_which_they_were_laid(order):
    engine, remaining = SimpleNamespace(is_gradient_accumulation_boundary=lambda: True), {0, 1, 2}
    seen = []
    before = engine.step = lambda: seen.append("step")
    undos = [before_engine_step(engine, lambda index=index: seen.append(index)) for index in range(3)]
    for index in (None, *order):
        if index is not None:
            undos[index]()
            remaining.remove(index)
        seen.clear()
        engine.step()
        assert seen == [*sorted(remaining), "step"]
    assert engine.step is before


def test_clipping_scheduler_and_checkpoint_are_done_by_what_is_given():
    owner = Owner()
    at_clipping(owner, lambda parameters, norm: (parameters, norm))
    assert owner.clip_grad_norm_("parameters", 1.0) == ("parameters", 1.0)
    at_scheduler(owner, lambda inner, steps: ("ours", inner(steps)))
    assert owner.create_scheduler(3) == ("ours", "create_scheduler")
    at_checkpoint(owner, lambda inner, checkpoint: checkpoint)
    assert owner._load_from_checkpoint("folder") == "folder"  # noqa: SLF001
    assert owner.calls == [("create_scheduler", 3)]


def test_an_action_follows_the_preparation():
    owner = Owner()
    after_prepare(owner, lambda: owner.calls.append("action"))
    assert owner.prepare("model") == "prepare"
    assert owner.calls == [("prepare", "model"), "action"]


def test_kept_models_are_prepared_by_nobody_and_their_optimizer_alone():
    owner, kept, other = Owner(), nn.Linear(1, 1), nn.Linear(1, 1)
    keep_models(owner, lambda model: model is kept)
    assert owner.prepare(kept) is kept
    assert owner.prepare(kept, "optimizer") == (kept, "prepare_optimizer")
    assert owner.prepare(other) == "prepare"
    assert owner.calls == [("prepare_optimizer", "optimizer"), ("prepare", other)]


def test_an_optimizer_has_no_empty_group():
    weight = nn.Parameter(torch.ones(1))
    groups = [{"params": [weight]}, {"params": []}]
    trainer = SimpleNamespace(create_optimizer=lambda: torch.optim.SGD(groups, lr=0.1))
    without_empty_groups(trainer)
    assert [group["params"] for group in trainer.create_optimizer().param_groups] == [[weight]]


def test_an_adapter_is_added_in_another_way_until_undone():
    model = Owner()
    undo = at_add_adapter(model, lambda inner, name: None)
    model.add_adapter("ref")
    undo()
    model.add_adapter("ref")
    assert model.calls == [("add_adapter", "ref")]


def test_a_samplers_epoch_only_grows():
    sampler = Owner()
    let_epochs_grow(sampler)
    for epoch in (1, 2, 0, 3):
        sampler.set_epoch(epoch)
    assert [epoch for _, epoch in sampler.calls] == [1, 2, 2, 3]


def test_online_trainers_get_the_reference_inside_the_block():
    loader = "create_model_from_path"
    module = __import__(trl.GRPOTrainer.__module__, fromlist=[loader])
    before, reference = getattr(module, loader), nn.Linear(1, 1)
    with given_reference(trl.GRPOTrainer, reference):
        assert getattr(module, loader)("name on disk", dtype="auto") is reference
    assert getattr(module, loader) is before
    with given_reference(trl.GRPOTrainer, None), given_reference(object, reference):
        assert getattr(module, loader) is before


def test_all_patches_of_an_accelerator_are_undone_together(accelerator):
    before = dict(accelerator.__dict__)
    after_backward(accelerator, lambda loss: None)
    after_prepare(accelerator, lambda: None)
    at_clipping(accelerator, lambda *args: None)
    undo_all(accelerator)
    assert accelerator.__dict__ == before
