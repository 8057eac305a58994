import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from hbat.ewc import kernels as foreach
from hbat.ewc.penalty import add_penalty_gradient_, ewc_penalty

SHAPES = {f"matrix {index}": torch.empty(6, 4) for index in range(5)} | {
    "vector": torch.empty(9),
    "scalar": torch.empty(()),
    "empty": torch.empty(0, 3),
}

KINDS = ["element", "scalar", "number", "mixed"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, seed=0):
    """Parameters with gradients, an anchor nearby and an importance; `mixed` has some of every kind."""
    anchor, step, gradient, weights = (cases.random_like(SHAPES, seed + each, std=1.0) for each in range(4))
    parameters = {name: nn.Parameter(each + 0.1 * step[name]) for name, each in anchor.items()}
    for name, each in parameters.items():
        each.grad = gradient[name]
    importance = {}
    for index, (name, each) in enumerate(weights.items()):
        own = KINDS[index % 3] if kind == "mixed" else kind
        mean = torch.tensor(0.1 * (index + 1))
        importance[name] = {"element": each.abs(), "scalar": mean, "number": float(mean)}[own]
    return parameters, anchor, importance


@pytest.fixture(params=[1 << 18, 1, 30, 48], ids="batch of {}".format)
def _batch(request, monkeypatch):
    """Sizes of a batch: all tensors, each on its own, sizes that cut between tensors."""
    monkeypatch.setattr(foreach, "_CPU_BATCH", request.param)


@every_kind
@pytest.mark.usefixtures("_batch")
def test_small_tensors_get_the_gradient_of_the_block_loop(kind, monkeypatch):
    parameters, anchor, importance = build(kind)
    blocks = build(kind)[0]
    assert foreach.add_small_pulls_(parameters, anchor, importance, 2.0 * 0.7 * 8.0) == {}
    monkeypatch.setattr(foreach, "_SMALL", 0)
    add_penalty_gradient_(blocks, anchor, importance, strength=0.7, scale=8.0)
    for name, each in parameters.items():
        torch.testing.assert_close(each.grad, blocks[name].grad, rtol=3e-7, atol=1e-6)
        if isinstance(importance[name], torch.Tensor) and importance[name].dim() > 0:
            assert torch.equal(each.grad, blocks[name].grad)


@every_kind
@pytest.mark.usefixtures("_batch")
def test_small_tensors_get_the_gradient_of_autograd(kind):
    parameters, anchor, importance = build(kind)
    before = {name: each.grad.clone() for name, each in parameters.items()}
    pull = torch.autograd.grad(0.7 * ewc_penalty(parameters, anchor, importance), list(parameters.values()))
    add_penalty_gradient_(parameters, anchor, importance, strength=0.7)
    for (name, each), own in zip(parameters.items(), pull, strict=True):
        np.testing.assert_allclose(
            oracle.array(each.grad), oracle.array(before[name]) + oracle.array(own), rtol=1e-6, atol=1e-6
        )


@every_kind
def test_only_gradients_change(kind):
    parameters, anchor, importance = build(kind)
    add_penalty_gradient_(parameters, anchor, importance)
    again = build(kind)
    for found, expected in zip((parameters, anchor, importance), again, strict=True):
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in SHAPES)


@pytest.mark.parametrize("changed", ["parameter", "anchor", "gradient", "importance", "shape of the anchor", "large"])
def test_what_is_not_float32_of_one_shape_and_small_is_left_to_the_block_loop(changed, monkeypatch):
    parameters, anchor, importance = build("element")
    name, before = "vector", build("element")[0]["vector"].grad
    if changed == "parameter":
        parameters[name] = nn.Parameter(parameters[name].detach().bfloat16())
        parameters[name].grad = before.bfloat16()
    elif changed == "gradient":
        parameters[name] = nn.Parameter(parameters[name].detach().double())
        parameters[name].grad = before.double()
    elif changed == "anchor":
        anchor[name] = anchor[name].bfloat16()
    elif changed == "importance":
        importance[name] = importance[name].double()
    elif changed == "shape of the anchor":
        anchor[name] = anchor[name].view(3, 3)
    else:
        monkeypatch.setattr(foreach, "_SMALL", 9)
    untouched = parameters[name].grad.clone()
    left = foreach.add_small_pulls_(parameters, anchor, importance, 2.0)
    assert name in left
    assert "scalar" not in left
    assert torch.equal(parameters[name].grad, untouched)


def test_tensors_without_a_gradient_are_neither_changed_nor_left():
    parameters, anchor, importance = build("element")
    parameters["vector"].grad = None
    assert foreach.add_small_pulls_(parameters, anchor, importance, 2.0) == {}
    assert parameters["vector"].grad is None


def test_a_small_tensor_that_is_not_contiguous_is_refused_as_a_large_one_is():
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.zeros(4, 3).t()
    assert list(foreach.add_small_pulls_({"w": weight}, {"w": torch.zeros(3, 4)}, {"w": 1.0}, 2.0)) == ["w"]
    with pytest.raises(ValueError, match="not contiguous"):
        add_penalty_gradient_({"w": weight}, {"w": torch.zeros(3, 4)}, {"w": 1.0})


@every_kind
def test_scratch_memory_is_one_batch(kind, monkeypatch):
    made = []
    subtract = torch._foreach_sub  # noqa: SLF001 - torch has no public name for it

    def record(*args):
        made.append(subtract(*args))
        return made[-1]

    monkeypatch.setattr(torch, "_foreach_sub", record)
    monkeypatch.setattr(foreach, "_CPU_BATCH", 48)
    add_penalty_gradient_(*build(kind))
    assert len(made) > 1
    assert max(sum(each.numel() for each in batch) for batch in made) <= 48


@every_kind
def test_what_is_added_does_not_depend_on_whether_the_step_is_measured(kind):
    (plain, anchor, importance), measured = build(kind), build(kind)[0]
    add_penalty_gradient_(plain, anchor, importance, strength=0.7)
    assert add_penalty_gradient_(measured, anchor, importance, strength=0.7, measure=True) is not None
    assert all(torch.equal(plain[name].grad, measured[name].grad) for name in SHAPES)
