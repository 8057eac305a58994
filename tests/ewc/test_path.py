import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from hbat.ewc import kernels
from hbat.ewc.path import add_path_

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": (), "one": (1,), "empty": (0, 3), "cube": (2, 3, 4)}


def walk(steps=3, dtype=torch.float32, frozen=()):
    """(path integral, its oracle) of random steps with random gradients, near an anchor that is not their start."""
    shapes = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    parameters = {name: nn.Parameter(each.to(dtype)) for name, each in cases.random_like(shapes, 0, std=1.0).items()}
    anchor = {name: each.detach() + 0.1 for name, each in parameters.items()}
    path = {name: torch.zeros(each.shape) for name, each in parameters.items()}
    expected = oracle.arrays(path)
    for step in range(steps):
        gradients, change = (cases.random_like(shapes, 10 * step + seed, std=1e-2) for seed in (1, 2))
        gradients = {name: each.to(dtype) for name, each in gradients.items() if name not in frozen}
        before = oracle.arrays(parameters)
        add_path_(path, parameters, anchor, gradients, after_step=False)
        with torch.no_grad():
            for name, each in parameters.items():
                each.add_(change[name].to(dtype))
        add_path_(path, parameters, anchor, gradients, after_step=True)
        for name, gradient in gradients.items():
            expected[name] -= oracle.array(gradient) * (oracle.array(parameters[name]) - before[name])
    return path, expected


@pytest.mark.parametrize("size", [1 << 18, 1, 5, 35])
def test_the_path_integral_is_minus_the_sum_of_gradient_times_step(size, monkeypatch):
    monkeypatch.setattr(kernels, "_CPU_BATCH", size)
    path, expected = walk()
    for name, each in path.items():
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=1e-4, atol=1e-8)


def test_weights_and_gradients_in_bfloat16_are_multiplied_in_float32():
    path, expected = walk(dtype=torch.bfloat16)
    for name, each in path.items():
        assert each.dtype == torch.float32
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=1e-4, atol=1e-8)


def test_parameters_without_a_gradient_have_no_path():
    path, expected = walk(frozen={"matrix"})
    assert not path["matrix"].any()
    np.testing.assert_allclose(oracle.array(path["vector"]), expected["vector"], rtol=1e-4, atol=1e-8)


def test_a_step_worked_by_hand():
    path, weight, anchor, gradient = (
        torch.tensor([1.0]),
        torch.tensor([2.0]),
        torch.tensor([1.5]),
        torch.tensor([-4.0]),
    )
    add_path_({"w": path}, {"w": weight}, {"w": anchor}, {"w": gradient}, after_step=False)
    weight += 0.25  # downhill: the loss falls by 4 * 0.25 to first order
    add_path_({"w": path}, {"w": weight}, {"w": anchor}, {"w": gradient}, after_step=True)
    assert path.item() == 2.0
