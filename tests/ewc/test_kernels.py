import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from hbat.ewc import kernels
from hbat.ewc.kernels import gradients_of
from hbat.ewc.penalty import add_penalty_gradient_, ewc_penalty, proximal_step_

SHAPES = {f"matrix {index}": torch.empty(6, 4) for index in range(5)} | {
    "vector": torch.empty(9),
    "scalar": torch.empty(()),
    "empty": torch.empty(0, 3),
}


def build(seed=0):
    """Parameters with gradients, an anchor nearby, and importance of every kind in turn."""
    anchor, step, gradient, weights = (cases.random_like(SHAPES, seed + offset, std=1.0) for offset in range(4))
    parameters = {name: nn.Parameter(start + 0.1 * step[name]) for name, start in anchor.items()}
    importance = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        parameter.grad = gradient[name]
        importance[name] = [weights[name].abs(), torch.tensor(0.1 * (index + 1)), 0.1 * (index + 1)][index % 3]
    return parameters, anchor, importance


@pytest.mark.parametrize("size", [1 << 18, 1, 30, 48])
def test_batches_hold_every_element_once_with_what_belongs_to_it(size, monkeypatch):
    monkeypatch.setattr(kernels, "_CPU_BATCH", size)
    parameters, anchor, importance = build()
    found = {name: [] for name in SHAPES}
    for batch in kernels.batches(parameters, anchor, importance, gradients_of(parameters)):
        assert sum(difference.numel() for difference in batch.differences) <= size
        assert len({isinstance(weight, torch.Tensor) for weight in batch.importances}) == 1
        columns = (batch.parameters, batch.anchors, batch.gradients, batch.importances, batch.differences)
        for name, *own in zip(batch.names, *columns, strict=True):
            found[name].append([torch.as_tensor(value).expand(own[0].shape).reshape(-1) for value in own])
    for name, parameter in parameters.items():
        values = [torch.cat(pieces) for pieces in zip(*found[name], strict=True)]
        weight = torch.as_tensor(importance[name]).expand(parameter.shape)
        expected = [parameter.detach(), anchor[name], parameter.grad, weight, parameter.detach() - anchor[name]]
        assert all(torch.equal(value, whole.reshape(-1)) for value, whole in zip(values, expected, strict=True))


def test_small_tensors_share_a_batch():
    parameters, anchor, _ = build()
    (batch,) = kernels.batches(parameters, anchor, dict.fromkeys(SHAPES, 1.0))
    assert batch.names == list(SHAPES)


def test_tensors_without_a_gradient_are_skipped_if_gradients_are_given():
    parameters, anchor, importance = build()
    parameters["vector"].grad = None
    names = [
        {name for batch in kernels.batches(parameters, anchor, importance, gradients) for name in batch.names}
        for gradients in (gradients_of(parameters), None)
    ]
    assert names == [SHAPES.keys() - {"vector"}, SHAPES.keys()]


def test_differences_and_gradients_of_any_precision_are_computed_in_float32():
    parameters, anchor, importance = build()
    for index, dtype in enumerate((torch.bfloat16, torch.float64)):
        changed = nn.Parameter(parameters[f"matrix {index}"].detach().to(dtype))
        changed.grad = parameters[f"matrix {index}"].grad.to(dtype)
        parameters[f"matrix {index}"] = changed
    anchor["matrix 2"] = anchor["matrix 2"].bfloat16()
    importance["matrix 0"], importance["matrix 3"] = importance["matrix 0"].bfloat16(), importance["matrix 3"].double()
    before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    pull = torch.autograd.grad(0.7 * ewc_penalty(parameters, anchor, importance), list(parameters.values()))
    add_penalty_gradient_(parameters, anchor, importance, strength=0.7)
    for (name, parameter), own in zip(parameters.items(), pull, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        rounding = 2.0**-8 if parameter.dtype == torch.bfloat16 else 1e-6
        expected = oracle.array(before[name]) + oracle.array(own)
        np.testing.assert_allclose(oracle.array(parameter.grad), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("size", [12, 5])
def test_tensors_need_not_be_contiguous(size, monkeypatch):
    monkeypatch.setattr(kernels, "_CPU_BATCH", size)
    weight = nn.Parameter(torch.ones(4, 3).t())
    weight.grad = torch.zeros(4, 3).t()
    anchor, importance = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    measured = add_penalty_gradient_({"w": weight}, {"w": anchor}, {"w": importance}, measure=True)
    assert float(measured.penalty) == 66.0
    assert torch.equal(weight.grad, 2.0 * importance)
    proximal_step_({"w": weight}, {"w": anchor}, {"w": importance}, strength=1.0, learning_rates={"w": 0.5})
    assert torch.equal(weight.detach(), 1.0 / (1.0 + importance))


def test_what_is_added_does_not_depend_on_whether_the_step_is_measured():
    (plain, anchor, importance), (measured, _, _) = build(), build()
    add_penalty_gradient_(plain, anchor, importance, strength=0.7)
    assert add_penalty_gradient_(measured, anchor, importance, strength=0.7, measure=True) is not None
    assert all(torch.equal(plain[name].grad, measured[name].grad) for name in SHAPES)


def test_only_gradients_change():
    parameters, anchor, importance = build()
    add_penalty_gradient_(parameters, anchor, importance)
    for found, expected in zip((parameters, anchor, importance), build(), strict=True):
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in SHAPES)
