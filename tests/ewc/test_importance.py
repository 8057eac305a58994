import math

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hbat.ewc import importance
from hbat.ewc.importance import (
    accumulate,
    displacement,
    effective_tensors,
    most_important,
    normalize,
    normalize_to_stage,
    relative_importance,
    weighted_sum,
)

SHAPES = {"matrix": torch.empty(6, 4), "vector": torch.empty(9), "scalar": torch.empty(())}

both_granularities = pytest.mark.parametrize("granularity", ["element", "tensor"])


def raw_importance(granularity, seed=0):
    raw = {name: each.square() for name, each in cases.random_like(SHAPES, seed, std=1e-4).items()}
    return raw if granularity == "element" else {name: each.mean() for name, each in raw.items()}


def assert_equals_oracle(found, expected, rtol=1e-6):
    assert list(found) == list(expected)
    for name, each in found.items():
        assert each.dtype == torch.float32
        assert tuple(each.shape) == np.shape(expected[name])
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=rtol)


# --- displacement ----------------------------------------------------------------------------------------------------


@both_granularities
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_displacement_equals_the_oracle(granularity, dtype):
    start = {name: each.to(dtype) for name, each in cases.random_like(SHAPES, 0, std=1.0).items()}
    end = {name: each.to(dtype) for name, each in cases.random_like(SHAPES, 1, std=1.0).items()}
    assert_equals_oracle(displacement(end, start, granularity), oracle.displacement(end, start, granularity), 1e-5)


def test_displacement_of_a_tensor_worked_by_hand():
    end, start = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([0.0, 1.0])}
    assert displacement(end, start)["w"].tolist() == [1.0, 9.0]
    assert displacement(end, start, "tensor")["w"].item() == 5.0


def test_displacement_leaves_both_weights_alone():
    start, end = cases.random_like(SHAPES, 0), cases.random_like(SHAPES, 1)
    displacement(end, start)
    assert cases.largest_difference(start, cases.random_like(SHAPES, 0)) == 0.0
    assert cases.largest_difference(end, cases.random_like(SHAPES, 1)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@both_granularities
def test_weights_that_diverged_are_named(granularity, bad):
    start, end = cases.random_like(SHAPES, 0), cases.random_like(SHAPES, 1)
    end["vector"][3] = bad
    with pytest.raises(ValueError, match=r"displacement of 'vector' is not finite.*diverged"):
        displacement(end, start, granularity)


def test_displacement_needs_an_anchor_for_every_parameter():
    with pytest.raises(KeyError, match=r"3 of 3 parameters have no anchor, first 'matrix'"):
        displacement(cases.random_like(SHAPES, 0), {})


# --- accumulation ----------------------------------------------------------------------------------------------------


@both_granularities
def test_accumulation_is_the_plain_sum(granularity):
    stages = [raw_importance(granularity, seed) for seed in range(3)]
    total = {}
    for each in stages:
        accumulate(total, each)
    assert_equals_oracle(total, {name: sum(oracle.array(each[name]) for each in stages) for name in SHAPES}, 1e-5)


def test_accumulation_does_not_change_what_it_adds():
    first, second, total = raw_importance("element", 0), raw_importance("element", 1), {}
    accumulate(total, first)
    accumulate(total, second)
    assert cases.largest_difference(first, raw_importance("element", 0)) == 0.0
    assert cases.largest_difference(second, raw_importance("element", 1)) == 0.0


def test_accumulating_over_other_names_is_refused():
    total = raw_importance("tensor")
    with pytest.raises(KeyError, match=r"1 of 3 parameters have no importance, first 'vector'"):
        accumulate(total, {name: each for name, each in raw_importance("tensor").items() if name != "vector"})


# --- normalisation ---------------------------------------------------------------------------------------------------


@both_granularities
@pytest.mark.parametrize("normalization", ["mean", "max"])
def test_normalisation_equals_the_oracle(granularity, normalization):
    raw = raw_importance(granularity)
    assert_equals_oracle(normalize(raw, normalization), oracle.normalize(raw, normalization))


@pytest.mark.parametrize("scale", [1.0, 1e3, 3e4, 1e10])
def test_softmax_equals_the_oracle(scale):
    raw = raw_importance("tensor")
    assert_equals_oracle(normalize(raw, "softmax", scale), oracle.normalize(raw, "softmax", scale), 1e-5)


def test_mean_over_tensors_sums_to_one_and_max_reaches_one():
    raw = raw_importance("tensor")
    assert sum(each.item() for each in normalize(raw, "mean").values()) == pytest.approx(1.0)
    assert max(each.item() for each in normalize(raw, "max").values()) == 1.0


@both_granularities
def test_uniform_importance_gives_one_over_the_number_of_tensors(granularity):
    raw = {name: torch.full_like(each, 0.3) for name, each in raw_importance(granularity).items()}
    for each in normalize(raw).values():
        np.testing.assert_allclose(oracle.array(each), 1 / 3, rtol=1e-6)


@st.composite
def raw_numbers(draw):
    """Raw importance of one to six tensors, not all zero."""
    numbers = draw(st.lists(st.floats(1e-8, 1e3) | st.just(0.0), min_size=1, max_size=6))
    numbers.append(draw(st.floats(1e-4, 1e3)))
    return {str(index): torch.tensor(each, dtype=torch.float32) for index, each in enumerate(numbers)}


@given(raw_numbers(), st.sampled_from(["mean", "max", "softmax"]))
def test_normalised_importance_is_finite_and_not_negative(raw, normalization):
    for each in normalize(raw, normalization, 1e10).values():
        assert 0.0 <= each.item() < math.inf


@given(raw_numbers(), st.floats(1e-20, 1e6), st.sampled_from(["mean", "max"]))
def test_mean_and_max_do_not_depend_on_the_scale(raw, factor, normalization):
    scaled = {name: (each.double() * factor) for name, each in raw.items()}
    for name, each in normalize(scaled, normalization).items():
        assert each.item() == pytest.approx(normalize(raw, normalization)[name].item(), rel=1e-5, abs=1e-30)


def test_softmax_with_the_authors_scale_is_one_hot_at_real_displacements():
    start = cases.random_like({str(index): torch.empty(32, 8) for index in range(20)}, 0, std=0.05)
    step = cases.random_like(start, 1, std=1e-6)
    raw = displacement({name: each + step[name] for name, each in start.items()}, start, "tensor")
    shares = normalize(raw, "softmax", 1e10)
    assert sorted(each.item() for each in shares.values()) == [0.0] * 19 + [1.0]
    assert effective_tensors(shares) == 1.0
    assert effective_tensors(normalize(raw, "mean")) > 15


def test_softmax_over_elements_is_refused():
    with pytest.raises(ValueError, match=r"runs over tensors but the importance is per element"):
        normalize(raw_importance("element"), "softmax", 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-12])
@both_granularities
def test_importance_that_is_not_finite_or_negative_is_named(granularity, bad):
    raw = raw_importance(granularity)
    raw["vector"] = raw["vector"].clone()
    raw["vector"].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=r"importance of 'vector' is not finite and non-negative"):
        normalize(raw)


@both_granularities
@pytest.mark.parametrize("normalization", ["mean", "max"])
def test_all_zero_importance_stays_zero(granularity, normalization):
    raw = {name: torch.zeros_like(each) for name, each in raw_importance(granularity).items()}
    assert all(not each.any() for each in normalize(raw, normalization).values())


def test_nothing_normalises_to_nothing():
    assert normalize({}) == {}


def test_normalisation_does_not_change_its_input():
    raw = raw_importance("element")
    normalize(raw)
    assert cases.largest_difference(raw, raw_importance("element")) == 0.0


class _LargestInDouble(TorchDispatchMode):
    """Records the largest float64 tensor that any operation makes or takes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("normalization", ["mean", "max"])
def test_normalisation_makes_no_copy_of_a_tensor_in_double_precision(normalization):
    raw = {"w": torch.rand(1000), "v": torch.rand(1000)}
    with _LargestInDouble() as seen:
        normalize(raw, normalization)
    assert seen.elements <= 2


@pytest.mark.parametrize("normalization", ["mean", "max"])
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_any_scale_that_float32_holds_is_normalised_like_the_oracle(normalization, scale):
    raw = {"w": torch.tensor([scale, 0.0, scale]), "v": torch.tensor([scale])}
    assert_equals_oracle(normalize(raw, normalization), oracle.normalize(raw, normalization))


@pytest.mark.parametrize("block", [1, 4, 7])
def test_sums_in_blocks_are_those_of_the_whole(block, monkeypatch):
    monkeypatch.setattr(importance, "_BLOCK", block)
    raw = raw_importance("element")
    assert_equals_oracle(normalize(raw), oracle.normalize(raw, "mean"))
    assert effective_tensors(raw) == pytest.approx(oracle.effective_tensors(raw), rel=1e-6)


# --- importance relative to the displacement -------------------------------------------------------------------------

SIZES = {name: each.numel() for name, each in SHAPES.items()}


def path_integral(granularity, seed=20):
    """Path integrals of both signs."""
    path = cases.random_like(SHAPES, seed, std=1e-3)
    return path if granularity == "element" else {name: each.mean() for name, each in path.items()}


@both_granularities
@pytest.mark.parametrize("damping", [0.0, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("with_path", [True, False])
def test_relative_importance_equals_the_oracle(with_path, damping, granularity):
    moved = raw_importance(granularity)
    path = path_integral(granularity) if with_path else None
    expected = oracle.relative_importance(moved, path, damping)
    assert_equals_oracle(relative_importance(moved, path, damping), expected, 1e-5)


def test_relative_importance_worked_by_hand():
    moved, path = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([8.0, -2.0])}
    # The mean of the displacement is 3: 1 / (1 + 3) and 1 / (5 + 3); the path ran uphill in the second element.
    assert relative_importance(moved)["w"].tolist() == [0.25, 0.125]
    assert relative_importance(moved, path)["w"].tolist() == [2.0, 0.0]
    assert relative_importance(moved, damping=0.0)["w"].tolist() == [1.0, pytest.approx(0.2)]


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_what_did_not_move_has_no_importance_unless_its_tensor_did(damping):
    moved = {"some": torch.tensor([0.0, 4.0]), "none": torch.zeros(2), "scalar": torch.tensor(0.0)}
    found = relative_importance(moved, damping=damping)
    assert found["some"].tolist() == ([0.5, pytest.approx(1 / 6)] if damping else [0.0, 0.25])
    assert found["none"].tolist() == [0.0, 0.0]
    assert found["scalar"].item() == 0.0


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_relative_importance_of_any_displacement_that_float32_holds_is_finite(damping):
    for least in (1e-45, 1e-38, 1e-30, 1e30):
        found = relative_importance({"w": torch.tensor([least, 0.0, 1.0])}, damping=damping)["w"]
        assert bool(torch.isfinite(found).all())


def test_a_path_of_other_names_is_refused():
    with pytest.raises(KeyError, match=r"1 of 1 parameters have no path integral, first 'w'"):
        relative_importance({"w": torch.ones(2)}, {"v": torch.ones(2)})


# --- the unit of a stage ---------------------------------------------------------------------------------------------


@both_granularities
@pytest.mark.parametrize("block", [1 << 22, 4, 7])
def test_the_weighted_sum_equals_the_oracle(block, granularity, monkeypatch):
    monkeypatch.setattr(importance, "_BLOCK", block)
    weights, values = raw_importance("element", 3), raw_importance(granularity, 4)
    if granularity == "tensor":
        weights = {name: each.mean() for name, each in weights.items()}
    expected = oracle.weighted_sum(weights, values, SIZES)
    assert weighted_sum(weights, values, SIZES) == pytest.approx(expected, rel=1e-6)


def test_a_number_for_a_tensor_weighs_each_of_its_elements():
    weights, values = {"w": torch.tensor(3.0)}, {"w": torch.tensor([1.0, 2.0])}
    assert weighted_sum(weights, values, {"w": 2}) == 9.0  # by element in the values alone
    assert weighted_sum(weights, {"w": torch.tensor(1.5)}, {"w": 2}) == 9.0  # in neither


@both_granularities
def test_normalising_to_a_stage_equals_the_oracle_and_makes_its_way_cost_one(granularity):
    raw, moved = raw_importance(granularity, 5), raw_importance(granularity, 6)
    found = normalize_to_stage(raw, moved, SIZES)
    assert_equals_oracle(found, oracle.normalize_to_stage(raw, moved, SIZES))
    assert oracle.weighted_sum(found, moved, SIZES) == pytest.approx(1.0, rel=1e-6)


def test_importance_per_tensor_is_that_of_equal_elements():
    raw, moved = raw_importance("tensor", 5), raw_importance("tensor", 6)
    wide = [
        {name: torch.full(SHAPES[name].shape, each.item()) for name, each in group.items()} for group in (raw, moved)
    ]
    by_element = normalize_to_stage(*wide, SIZES)
    for name, each in normalize_to_stage(raw, moved, SIZES).items():
        np.testing.assert_allclose(oracle.array(by_element[name]), each.item(), rtol=1e-6)


@both_granularities
def test_a_stage_costs_nothing_where_nothing_moved_or_matters(granularity):
    some = raw_importance(granularity)
    none = {name: torch.zeros_like(each) for name, each in some.items()}
    for raw, moved in ((some, none), (none, some), (none, none)):
        found = normalize_to_stage(raw, moved, SIZES)
        assert cases.largest_difference(found, none) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-12])
@both_granularities
def test_importance_for_a_stage_that_is_not_finite_or_negative_is_named(granularity, bad):
    raw = raw_importance(granularity)
    raw["vector"] = raw["vector"].clone()
    raw["vector"].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=r"importance of 'vector' is not finite and non-negative"):
        normalize_to_stage(raw, raw_importance(granularity), SIZES)


# --- summaries -------------------------------------------------------------------------------------------------------


@both_granularities
def test_effective_tensors_equals_the_oracle(granularity):
    raw = raw_importance(granularity)
    assert effective_tensors(raw) == pytest.approx(oracle.effective_tensors(raw), rel=1e-6)


def test_effective_tensors_of_one_of_equals_and_of_none():
    one = {str(index): torch.tensor(float(index == 0)) for index in range(5)}
    assert effective_tensors(one) == 1.0
    assert effective_tensors(dict.fromkeys("abcde", torch.ones(3))) == pytest.approx(5.0)
    assert effective_tensors(dict.fromkeys("abcde", torch.zeros(()))) == 0.0


def test_most_important_picks_by_mean_rounds_down_and_never_picks_all():
    raw = {"small but many": torch.full((100,), 1.0), "large": torch.tensor([5.0]), "middle": torch.tensor([2.0, 2.0])}
    assert most_important(raw, 0.0) == set()
    assert most_important(raw, 0.5) == {"large"}
    assert most_important(raw, 0.67) == {"large", "middle"}
    assert most_important(raw, 1.0) == {"large", "middle"}
    assert most_important({"only": torch.ones(3)}, 1.0) == set()
    assert most_important({}, 1.0) == set()
