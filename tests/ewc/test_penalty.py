import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from hbat.ewc import kernels
from hbat.ewc.penalty import add_penalty_gradient_, ewc_penalty, measure_penalty, proximal_step_

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": (), "one": (1,), "cube": (2, 3, 4)}


def build(granularity, seed=0, dtype=torch.float32):
    """Parameters with gradients, an anchor nearby and an importance."""
    shapes = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    start = cases.random_like(shapes, seed, std=1.0)
    step = cases.random_like(shapes, seed + 1, std=0.1)
    gradient = cases.random_like(shapes, seed + 2, std=1.0)
    parameters = {name: nn.Parameter((start[name] + step[name]).to(dtype)) for name in shapes}
    for name, each in parameters.items():
        each.grad = gradient[name].to(dtype)
    importance = cases.random_like(shapes, seed + 3)
    if granularity == "tensor":
        importance = {name: each.mean() for name, each in importance.items()}
    elif granularity == "number":
        importance = {name: float(each.mean()) for name, each in importance.items()}
    return parameters, {name: each.to(dtype) for name, each in start.items()}, importance


def gradients(parameters):
    return {name: each.grad.clone() for name, each in parameters.items()}


every_granularity = pytest.mark.parametrize("granularity", ["element", "tensor", "number"])


@pytest.fixture(params=[1 << 18, 1, 5, 35], ids="batch of {}".format)
def _batch(request, monkeypatch):
    """Sizes of a batch: all tensors, one element, one that cuts inside and between tensors, a whole tensor."""
    monkeypatch.setattr(kernels, "_CPU_BATCH", request.param)


# --- value and gradient ----------------------------------------------------------------------------------------------


def test_value_and_gradient_of_an_example_worked_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    weight.grad = torch.tensor([10.0, 0.0, -1.0])
    anchor, importance = {"w": torch.tensor([0.0, 2.0, 1.0])}, {"w": torch.tensor([1.0, 5.0, 2.0])}
    # 1 * 1^2 + 5 * 0^2 + 2 * 3^2 = 19; derivatives 2 * 1 * 1, 0, 2 * 2 * 3; times the strength 0.5.
    assert ewc_penalty({"w": weight}, anchor, importance).detach() == 19.0
    measured = add_penalty_gradient_({"w": weight}, anchor, importance, strength=0.5, measure=True)
    assert weight.grad.tolist() == [11.0, 0.0, 5.0]
    assert float(measured.penalty) == 9.5


@every_granularity
def test_value_equals_the_oracle(granularity):
    parameters, anchor, importance = build(granularity)
    expected = oracle.penalty(parameters, anchor, importance)
    assert float(ewc_penalty(parameters, anchor, importance).detach()) == pytest.approx(expected, rel=1e-6)


@every_granularity
def test_autograd_through_the_value_equals_the_oracle(granularity):
    parameters, anchor, importance = build(granularity)
    found = torch.autograd.grad(ewc_penalty(parameters, anchor, importance), list(parameters.values()))
    expected = oracle.penalty_gradient(parameters, anchor, importance)
    for each, name in zip(found, parameters, strict=True):
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=1e-6, atol=1e-7)


@every_granularity
@pytest.mark.usefixtures("_batch")
def test_added_gradient_equals_the_oracle(granularity):
    parameters, anchor, importance = build(granularity)
    before = gradients(parameters)
    add_penalty_gradient_(parameters, anchor, importance, strength=3.0)
    expected = oracle.penalty_gradient(parameters, anchor, importance, 3.0)
    for name, each in parameters.items():
        np.testing.assert_allclose(
            oracle.array(each.grad), oracle.array(before[name]) + expected[name], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_bf16_gradient_is_right_to_its_rounding(granularity):
    shapes = {"w": torch.empty(64, 64)}
    anchor = {"w": cases.random_like(shapes, 0, std=0.05)["w"].bfloat16()}
    weight = nn.Parameter(anchor["w"] * (1 + cases.random_like(shapes, 1, std=0.01)["w"].bfloat16()))
    weight.grad = torch.zeros_like(weight)
    importance = cases.random_like(shapes, 2)
    if granularity == "tensor":
        importance = {"w": importance["w"].mean()}
    expected = oracle.penalty_gradient({"w": weight}, anchor, importance, 0.5)["w"]
    add_penalty_gradient_({"w": weight}, anchor, importance, strength=0.5)
    error = np.linalg.norm(oracle.array(weight.grad) - expected) / np.linalg.norm(expected)
    assert weight.grad.dtype == torch.bfloat16
    assert error < 2.0**-8  # half a unit in the last of bfloat16's 8 digits
    # Beside a gradient of the task of the same size, `grad + parameter - anchor` in bfloat16 would be far off.
    task = torch.full_like(weight, float(np.abs(expected).max()))
    weight.grad = task.clone()
    add_penalty_gradient_({"w": weight}, anchor, importance, strength=0.5)
    total = oracle.array(task) + expected
    assert np.abs(oracle.array(weight.grad) - total).max() <= 2.0**-8 * np.abs(total).max()


def test_bf16_value_is_computed_in_float32():
    parameters, anchor, importance = build("element", dtype=torch.bfloat16)
    value = ewc_penalty(parameters, anchor, importance)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(oracle.penalty(parameters, anchor, importance), rel=1e-5)


def test_bf16_weights_far_from_their_anchor_are_subtracted_in_float32():
    parameters, _, importance = build("element", dtype=torch.bfloat16)
    far = {name: each.bfloat16() for name, each in cases.random_like(parameters, 9, std=30.0).items()}
    measured = measure_penalty(parameters, far, importance)
    assert float(measured.penalty) == pytest.approx(oracle.penalty(parameters, far, importance), rel=1e-5)
    assert float(measured.drift) == pytest.approx(oracle.drift(parameters, far), rel=1e-5)


@pytest.mark.usefixtures("_batch")
def test_gradients_that_carry_a_loss_scale_get_the_scaled_penalty():
    parameters, anchor, importance = build("element")
    before = gradients(parameters)
    expected = oracle.penalty_gradient(parameters, anchor, importance, 2.0)
    for each in parameters.values():
        each.grad.mul_(1024.0)
    measured = add_penalty_gradient_(parameters, anchor, importance, strength=2.0, scale=1024.0, measure=True)
    for name, each in parameters.items():
        np.testing.assert_allclose(
            oracle.array(each.grad) / 1024.0, oracle.array(before[name]) + expected[name], rtol=1e-5, atol=1e-5
        )
    assert float(measured.task_gradient_norm) == pytest.approx(oracle.norm(before), rel=1e-5)
    assert float(measured.gradient_norm) == pytest.approx(oracle.norm(expected), rel=1e-5)
    assert float(measured.inner_product) == pytest.approx(oracle.inner(before, expected), rel=1e-4)


def test_parameters_without_a_gradient_are_skipped():
    parameters, anchor, importance = build("element")
    parameters["matrix"].grad = None
    others = {name: each for name, each in parameters.items() if name != "matrix"}
    expected = oracle.penalty(others, anchor, importance)
    measured = add_penalty_gradient_(parameters, anchor, importance, measure=True)
    assert parameters["matrix"].grad is None
    assert measured.count == sum(each.numel() for each in others.values())
    assert float(measured.penalty) == pytest.approx(expected, rel=1e-6)


def test_parameters_and_anchor_are_not_changed():
    parameters, anchor, importance = build("element")
    copies = [{name: each.detach().clone() for name, each in group.items()} for group in (parameters, anchor)]
    add_penalty_gradient_(parameters, anchor, importance, measure=True)
    assert cases.largest_difference(parameters, copies[0]) == 0.0
    assert cases.largest_difference(anchor, copies[1]) == 0.0


def test_an_anchor_or_importance_that_is_not_contiguous_is_read_right():
    parameters, anchor, importance = build("element")
    before = oracle.arrays(gradients(parameters))
    for group in (anchor, importance):
        group["matrix"] = group["matrix"].t().contiguous().t()
    assert not anchor["matrix"].is_contiguous()
    add_penalty_gradient_(parameters, anchor, importance)
    expected = oracle.penalty_gradient(parameters, anchor, importance)["matrix"]
    np.testing.assert_allclose(oracle.array(parameters["matrix"].grad), before["matrix"] + expected, atol=1e-6)


def test_missing_names_are_named():
    parameters, anchor, importance = build("tensor")
    with pytest.raises(KeyError, match=r"5 of 5 parameters have no importance, first 'matrix'"):
        ewc_penalty(parameters, anchor, {})
    del anchor["vector"]
    with pytest.raises(KeyError, match=r"1 of 5 parameters have no anchor, first 'vector'"):
        ewc_penalty(parameters, anchor, importance)


def test_no_parameters_have_no_penalty():
    assert float(ewc_penalty({}, {}, {})) == 0.0
    assert float(measure_penalty({}, {}, {}).drift) == 0.0


# --- statistics ------------------------------------------------------------------------------------------------------


@every_granularity
@pytest.mark.usefixtures("_batch")
def test_statistics_equal_the_oracle(granularity):
    parameters, anchor, importance = build(granularity)
    task = gradients(parameters)
    pull = oracle.penalty_gradient(parameters, anchor, importance, 0.7)
    measured = add_penalty_gradient_(parameters, anchor, importance, strength=0.7, measure=True)
    assert float(measured.penalty) == pytest.approx(oracle.penalty(parameters, anchor, importance, 0.7), rel=1e-5)
    assert float(measured.drift) == pytest.approx(oracle.drift(parameters, anchor), rel=1e-5)
    assert float(measured.gradient_norm) == pytest.approx(oracle.norm(pull), rel=1e-5)
    assert float(measured.task_gradient_norm) == pytest.approx(oracle.norm(task), rel=1e-5)
    assert float(measured.inner_product) == pytest.approx(oracle.inner(task, pull), rel=1e-4)
    assert measured.count == sum(each.numel() for each in parameters.values())


@every_granularity
@pytest.mark.usefixtures("_batch")
def test_measuring_changes_nothing_and_agrees(granularity):
    parameters, anchor, importance = build(granularity)
    task, theta = gradients(parameters), {name: each.detach().clone() for name, each in parameters.items()}
    alone = measure_penalty(parameters, anchor, importance, strength=2.0)
    with_gradient = measure_penalty(parameters, anchor, importance, strength=2.0, gradient_scale=1.0)
    assert cases.largest_difference(gradients(parameters), task) == 0.0
    assert cases.largest_difference(parameters, theta) == 0.0
    assert float(alone.penalty) == float(with_gradient.penalty)
    assert float(alone.gradient_norm) == float(with_gradient.gradient_norm)
    assert float(alone.task_gradient_norm) == 0.0
    assert float(with_gradient.task_gradient_norm) == pytest.approx(oracle.norm(task), rel=1e-5)


def test_importance_in_another_precision_can_be_measured():
    parameters, anchor, importance = build("element")
    expected = oracle.penalty(parameters, anchor, importance)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 1e-2)):
        converted = {name: each.to(dtype) for name, each in importance.items()}
        measured = add_penalty_gradient_(parameters, anchor, converted, measure=True)
        assert float(measured.penalty) == pytest.approx(expected, rel=tolerance)


def test_nothing_is_measured_unless_asked():
    assert add_penalty_gradient_(*build("tensor")) is None


# --- proximal step ---------------------------------------------------------------------------------------------------


@every_granularity
@pytest.mark.usefixtures("_batch")
def test_proximal_step_equals_the_oracle(granularity):
    parameters, anchor, importance = build(granularity)
    rates = {name: 0.1 * (index + 1) for index, name in enumerate(parameters)}
    expected = oracle.proximal(parameters, anchor, importance, 4.0, rates)
    proximal_step_(parameters, anchor, importance, strength=4.0, learning_rates=rates)
    for name, each in parameters.items():
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=1e-6, atol=1e-6)


def test_proximal_step_minimises_what_it_says():
    parameters, anchor, importance = build("element")
    theta = oracle.arrays(parameters)
    proximal_step_(parameters, anchor, importance, strength=2.0, learning_rates=dict.fromkeys(parameters, 0.3))
    for name, each in parameters.items():
        x = oracle.array(each)  # the derivative of |x - theta|^2 / (2 eta) + c |x - anchor|^2 is zero there
        slope = (x - theta[name]) / 0.3 + 2 * 2.0 * oracle.array(importance[name]) * (x - oracle.array(anchor[name]))
        np.testing.assert_allclose(slope, 0.0, atol=1e-5)


def test_proximal_step_is_stable_at_any_strength():
    parameters, anchor, importance = build("element")
    importance = {name: each + 0.1 for name, each in importance.items()}
    proximal_step_(parameters, anchor, importance, strength=1e12, learning_rates=dict.fromkeys(parameters, 0.1))
    assert cases.largest_difference({name: each.detach() for name, each in parameters.items()}, anchor) < 1e-6


def test_proximal_step_leaves_parameters_without_a_learning_rate():
    parameters, anchor, importance = build("tensor")
    before = {name: each.detach().clone() for name, each in parameters.items()}
    proximal_step_(parameters, anchor, importance, strength=1.0, learning_rates={"vector": 0.5})
    changed = [name for name, each in parameters.items() if not torch.equal(each, before[name])]
    assert changed == ["vector"]


def test_proximal_step_needs_no_gradient():
    parameters, anchor, importance = build("tensor")
    for each in parameters.values():
        each.grad = None
    before = {name: each.detach().clone() for name, each in parameters.items()}
    proximal_step_(parameters, anchor, importance, strength=1.0, learning_rates=dict.fromkeys(parameters, 0.5))
    assert all(not torch.equal(each, before[name]) for name, each in parameters.items())
