"""The base class: one process, where weights, gradients and optimizer state are whole."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from hbat.engines.engine import Engine, Local


def parameters():
    return {name: nn.Parameter(torch.full((2,), float(number))) for number, name in enumerate("ab")}


def test_local_weights_are_the_parameters_themselves():
    own = parameters()
    local = Local(own)
    assert all(local.weights[name] is weight for name, weight in own.items())
    own["a"].grad = torch.ones(2)
    local.take_gradients()
    assert local.gradients().keys() == {"a"}
    local.release_gradients()
    assert own["a"].grad is not None


def test_tensors_are_placed_as_the_weights_and_numbers_stay_numbers():
    local = Local(parameters())
    tensor = torch.ones(2)
    assert local.of({"a": tensor, "b": 2.0, "c": tensor}) == {"a": tensor, "b": 2.0}


def test_an_action_before_clipping_runs_at_the_last_micro_step():
    accelerator, weight, seen = Accelerator(cpu=True), torch.tensor([3.0], requires_grad=True), []
    trainer = SimpleNamespace(accelerator=accelerator)
    undo = Engine().before_clipping(trainer, lambda: seen.append(weight.grad.item()))
    for last in (False, True):
        accelerator.gradient_state._set_sync_gradients(last)  # noqa: SLF001 - as accelerate does
        accelerator.backward((weight**2).sum())
    assert seen == [12.0]
    undo()
    accelerator.backward((weight**2).sum())
    assert seen == [12.0]


def test_optimizer_state_is_loaded_by_parameter_name():
    """Whatever the order of the parameters; learning rates stay those of the new optimizer."""
    old, new, engine = parameters(), parameters(), Engine()
    first = torch.optim.Adam(old.values(), lr=0.1)
    old["a"].grad, old["b"].grad = torch.ones(2), 2 * torch.ones(2)
    first.step()
    saved = engine.optimizer_state(first, old)
    second = torch.optim.Adam([{"params": [new["b"]]}, {"params": [new["a"]]}], lr=0.2)
    engine.load_optimizer_state(second, new, saved | {"gone": saved["a"]})
    assert [group["lr"] for group in second.param_groups] == [0.2, 0.2]
    for name, state in engine.optimizer_state(second, new).items():
        assert torch.equal(state["exp_avg"], saved[name]["exp_avg"])


def test_a_parameter_without_saved_state_starts_fresh():
    own, engine = parameters(), Engine()
    optimizer = torch.optim.Adam(own.values())
    engine.load_optimizer_state(optimizer, own, {"a": {"step": torch.tensor(1.0)}})
    assert engine.optimizer_state(optimizer, own)["b"] == {}
