import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.config.ewc import EWCConfig
from hbat.state.consolidation import Consolidation, SaturationWarning
from hbat.state.plan import Stage, plan

STAGES = plan(3, ["sft", "dpo", "kto"])
SFT, DPO, KTO = STAGES[:3]


def tensors(**values):
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def consolidation(**options):
    return Consolidation(EWCConfig(**options), seed=3)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- whose importance holds a stage ----------------------------------------------------------------------------------


def test_nothing_holds_the_first_stage():
    found = consolidation(freeze=0.9)
    assert found.importance(SFT) is None
    assert found.frozen(SFT) == set()


def test_an_objective_alone_is_never_held_by_itself():
    found = consolidation(freeze=0.9)
    found.add("sft", tensors(a=[1.0, 3.0]))
    assert found.importance(SFT) is None
    assert found.frozen(SFT) == set()


def test_a_stage_is_held_by_what_the_other_objective_yielded():
    found = consolidation()
    found.add("sft", tensors(a=[1.0, 3.0], b=[0.0, 0.0]))
    found.add("dpo", tensors(a=[9.0, 9.0], b=[9.0, 9.0]))
    # K = 2 tensors, mean over the four elements is 1: F = A / (2 * 1).
    assert same(found.importance(DPO), tensors(a=[0.5, 1.5], b=[0.0, 0.0]))


def test_what_several_other_objectives_yielded_is_summed():
    found = consolidation(normalization="max")
    found.add("sft", tensors(a=[1.0, 0.0]))
    found.add("dpo", tensors(a=[3.0, 2.0]))
    found.add("kto", tensors(a=[50.0, 50.0]))
    assert same(found.importance(KTO), tensors(a=[1.0, 0.5]))


def test_the_stages_of_an_objective_are_summed():
    found = consolidation(normalization="max")
    for raw in ([1.0, 0.0], [0.0, 3.0], [1.0, 1.0]):
        found.add("sft", tensors(a=raw))
    assert same(found.accumulated["sft"], tensors(a=[2.0, 4.0]))
    assert same(found.importance(DPO), tensors(a=[0.5, 1.0]))


def test_reading_importance_changes_no_sum():
    found = consolidation(normalization="max")
    found.add("sft", tensors(a=[1.0, 2.0]))
    found.add("dpo", tensors(a=[4.0, 4.0]))
    first, second = found.importance(KTO), found.importance(KTO)
    assert same(first, second)
    first["a"].zero_()
    assert same(found.accumulated["sft"], tensors(a=[1.0, 2.0]))
    assert same(found.accumulated["dpo"], tensors(a=[4.0, 4.0]))


# --- controls --------------------------------------------------------------------------------------------------------

PARAMETERS = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_uniform_importance_is_the_same_everywhere_and_sums_to_one_over_tensors(granularity):
    found = consolidation(source="uniform", granularity=granularity)
    found.add("sft", found.control(PARAMETERS, SFT))
    assert same(found.importance(DPO), tensors(a=0.5, b=0.5))


@pytest.mark.parametrize(("granularity", "shapes"), [("tensor", [(), ()]), ("element", [(3, 4), (5,)])])
def test_random_importance_has_the_shapes_that_were_asked_for(granularity, shapes):
    drawn = consolidation(source="random", granularity=granularity).control(PARAMETERS, SFT)
    assert [tuple(tensor.shape) for tensor in drawn.values()] == shapes
    assert all(bool(((tensor >= 0) & (tensor < 1)).all()) for tensor in drawn.values())


def test_random_importance_depends_on_seed_and_stage_alone():
    config = EWCConfig(source="random")
    drawn = Consolidation(config, 3).control(PARAMETERS, SFT)
    torch.rand(7)  # the global generator plays no part
    assert same(drawn, Consolidation(config, 3).control(PARAMETERS, SFT))
    assert not same(drawn, Consolidation(config, 3).control(PARAMETERS, DPO))
    assert not same(drawn, Consolidation(config, 9).control(PARAMETERS, SFT))
    assert not torch.equal(drawn["a"].flatten()[:5], drawn["b"])


def test_the_softmax_scale_does_not_touch_random_importance():
    found = consolidation(source="random", granularity="tensor", normalization="softmax")
    found.add("sft", tensors(a=0.2, b=0.9))
    expected = torch.softmax(torch.tensor([0.2, 0.9]), dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        assert torch.allclose(torch.stack(list(found.importance(DPO).values())), expected)


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "names"), [(0.0, set()), (0.2, set()), (0.25, {"c"}), (0.5, {"b", "c"}), (0.9, set("abc"))]
)
def test_the_tensors_with_the_largest_mean_are_frozen(share, names):
    found = consolidation(freeze=share)
    found.add("sft", tensors(a=[1.0, 1.0, 1.0], b=[2.0, 2.0], c=[0.0, 9.0], d=[0.5]))
    assert found.frozen(DPO) == names
    assert found.frozen(SFT) == set()


# --- saturation ------------------------------------------------------------------------------------------------------

REAL = {f"layer.{index}": torch.tensor(1e-8 * (index + 1)) for index in range(8)}  # squared change of a real stage


def test_the_authors_softmax_says_that_it_holds_a_single_tensor():
    found = consolidation(preset="authors")
    found.add("sft", REAL)
    with pytest.warns(SaturationWarning, match=r"holds 1\.00 effective tensors of 8.*`ewc\.normalization: mean`"):
        importance = found.importance(DPO)
    assert [float(share) for share in importance.values()] == [0.0] * 7 + [1.0]


def test_the_saturation_warning_can_be_silenced():
    found = consolidation(preset="authors")
    found.add("sft", REAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        found.importance(DPO)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "tensor"},
        {"granularity": "tensor", "normalization": "max"},
        {"granularity": "tensor", "normalization": "softmax", "importance_scale": 1.0},
        {"preset": "authors", "strength": 0.0},
    ],
    ids=["element", "mean", "max", "small scale", "no penalty"],
)
def test_nothing_is_said_where_importance_is_shared_or_there_is_no_penalty(options):
    found = consolidation(**options)
    found.add("sft", REAL)
    found.importance(DPO)  # a warning is an error here


# --- any numbers -----------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 2.0**100, width=32)
RAW = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(RAW, min_size=1, max_size=3), normalization=st.sampled_from(["mean", "max"]))
def test_importance_is_finite_and_not_negative_for_any_raw_numbers(raw, normalization):
    found = consolidation(normalization=normalization)
    stages = [Stage(index=index, round=0, objective=f"own-{index}", num_rounds=1) for index in range(len(raw))]
    shapes = raw[0]
    for stage, values in zip(stages, raw, strict=True):
        numbers = [each for row in values for each in row]
        addition = {
            str(index): torch.tensor([numbers[(index + k) % len(numbers)] for k in range(len(row))])
            for index, row in enumerate(shapes)
        }
        found.add(stage.objective, addition)
    _check(found.importance(DPO), largest=None if normalization == "mean" else 1.0)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(NUMBERS, min_size=1, max_size=6), scale=st.sampled_from([0.0, 1.0, 1e5, 1e10]))
def test_the_softmax_shares_exactly_one_for_any_raw_numbers(raw, scale):
    found = consolidation(granularity="tensor", normalization="softmax", importance_scale=scale)
    found.add("sft", {str(index): torch.tensor(each) for index, each in enumerate(raw)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        importance = found.importance(DPO)
    _check(importance, largest=1.0)
    assert sum(map(float, importance.values())) == pytest.approx(1.0, abs=1e-5)


def test_importance_of_nothing_but_zeros_is_zero():
    found = consolidation()
    found.add("sft", tensors(a=[0.0, 0.0], b=0.0))
    assert same(found.importance(DPO), tensors(a=[0.0, 0.0], b=0.0))


def _check(importance, *, largest):
    for each in importance.values():
        assert each.dtype == torch.float32
        assert bool(torch.isfinite(each).all())
        assert bool((each >= 0).all())
        assert largest is None or bool((each <= largest).all())
