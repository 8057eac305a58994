import warnings

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.config.ewc import EWCConfig
from hbat.state.consolidation import Consolidation, SaturationWarning
from hbat.state.plan import Stage, plan

STAGES = plan(3, ["sft", "dpo", "kto"])
SFT, DPO, KTO = STAGES[:3]

both_granularities = pytest.mark.parametrize("granularity", ["tensor", "element"])


def tensors(**values):
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def consolidation(**options):
    """Importance that is the displacement over its mean, unless asked for something else."""
    plain = {} if "preset" in options else {"source": "displacement", "normalization": "mean"}
    return Consolidation(EWCConfig(**plain | options), seed=3)


def add(found, objective, moved):
    found.add(objective, {"displacement": moved})


def shapes(tensors, shape=(5,)):
    """Parameters of the shapes of importance by element, or of one shape for all."""
    return {name: torch.zeros(tensor.shape or shape) for name, tensor in tensors.items()}


def importance(found, stage):
    record = next(iter(found.accumulated.values()), {"displacement": {}})
    return found.importance(stage, shapes(record["displacement"]))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- whose importance holds a stage ----------------------------------------------------------------------------------


def test_nothing_holds_the_first_stage():
    found = consolidation(freeze=0.9)
    assert importance(found, SFT) is None
    assert found.frozen(SFT, {}) == set()


def test_an_objective_alone_is_never_held_by_itself():
    found = consolidation(freeze=0.9)
    add(found, "sft", tensors(a=[1.0, 3.0], b=[1.0]))
    assert importance(found, SFT) is None
    assert found.frozen(SFT, shapes(tensors(a=[1.0, 3.0], b=[1.0]))) == set()


def test_a_stage_is_held_by_what_the_other_objective_left():
    found = consolidation()
    add(found, "sft", tensors(a=[1.0, 3.0], b=[0.0, 0.0]))
    add(found, "dpo", tensors(a=[9.0, 9.0], b=[9.0, 9.0]))
    # K = 2 tensors, mean over the four elements is 1: F = A / (2 * 1).
    assert same(importance(found, DPO), tensors(a=[0.5, 1.5], b=[0.0, 0.0]))


def test_what_several_other_objectives_left_is_normalised_before_it_is_summed():
    found = consolidation(normalization="max")
    add(found, "sft", tensors(a=[1.0, 0.0]))
    add(found, "dpo", tensors(a=[2e-8, 4e-8]))  # far less, and counts as much
    add(found, "kto", tensors(a=[50.0, 50.0]))
    torch.testing.assert_close(importance(found, KTO), tensors(a=[1.5, 1.0]))


def test_the_stages_of_an_objective_are_summed():
    found = consolidation(normalization="max")
    for moved in ([1.0, 0.0], [0.0, 3.0], [1.0, 1.0]):
        found.add("sft", {"displacement": tensors(a=moved), "importance": tensors(a=[-moved[0], moved[1]])})
    assert same(found.accumulated["sft"]["displacement"], tensors(a=[2.0, 4.0]))
    assert same(found.accumulated["sft"]["importance"], tensors(a=[-2.0, 4.0]))
    assert same(importance(found, DPO), tensors(a=[0.5, 1.0]))


def test_reading_importance_changes_no_sum():
    found = consolidation(normalization="max")
    add(found, "sft", tensors(a=[1.0, 2.0]))
    add(found, "dpo", tensors(a=[4.0, 4.0]))
    first, second = importance(found, KTO), importance(found, KTO)
    assert same(first, second)
    first["a"].zero_()
    assert same(found.accumulated["sft"]["displacement"], tensors(a=[1.0, 2.0]))
    assert same(found.accumulated["dpo"]["displacement"], tensors(a=[4.0, 4.0]))


# --- every source, against the oracle --------------------------------------------------------------------------------

PARAMETERS = {
    "matrix": torch.zeros(6, 4),
    "vector": torch.zeros(9),
    "scalar": torch.zeros(()),
    "still": torch.zeros(3),
}
SIZES = {name: each.numel() for name, each in PARAMETERS.items()}


def left(granularity, seed, scale):
    """What an objective may leave: its displacement, with a tensor that did not move, and signed path integrals."""
    start = cases.random_like(PARAMETERS, seed, std=1.0)
    moved = {name: (scale * each).square() for name, each in start.items()}
    path = {name: scale * each for name, each in cases.random_like(PARAMETERS, seed + 1, std=1.0).items()}
    path["matrix"] += 2.0 * scale  # a path integral sums to a gain
    moved["still"], path["still"] = torch.zeros(3), torch.zeros(3)
    record = {"displacement": moved, "importance": path}
    if granularity == "element":
        return record
    return {kind: {name: each.mean() for name, each in group.items()} for kind, group in record.items()}


def trained(granularity, *, source, scales=(1e-2, 1e-5), damping=0.3, **options):
    """(consolidation, records): what sft and dpo have left, at scales of their own, before a stage of kto."""
    config = EWCConfig(source=source, granularity=granularity, damping=damping, **options)
    found, records = Consolidation(config, seed=3), []
    for number, scale in enumerate(scales):
        record = left(granularity, 10 * number, scale)
        if source == "fisher":  # which is not negative
            record["importance"] = {name: each.abs() for name, each in record["importance"].items()}
        elif source != "path":
            del record["importance"]
        records.append(record)
        found.add(("sft", "dpo")[number], record)
    return found, records


@both_granularities
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("source", ["path", "relative", "displacement", "fisher", "uniform"])
def test_importance_of_every_source_equals_the_oracle(source, number, granularity):
    found, records = trained(granularity, source=source, scales=(1e-2, 1e-5)[:number])
    expected = oracle.held_by(records, source, damping=0.3, sizes=SIZES)
    held = found.importance(KTO, PARAMETERS)
    assert held.keys() == expected.keys()
    for name, each in held.items():
        np.testing.assert_allclose(
            np.broadcast_to(oracle.array(each), expected[name].shape), expected[name], rtol=1e-5
        )


@both_granularities
@pytest.mark.parametrize("source", ["path", "relative", "displacement", "fisher", "uniform", "random"])
def test_a_stage_that_goes_as_far_as_each_of_two_others_pays_two(source, granularity):
    found, records = trained(granularity, source=source, scales=(1e-3, 1e-3))
    found.accumulated["dpo"]["displacement"] = records[0]["displacement"]  # both went equally far
    held = found.importance(KTO, PARAMETERS)
    assert oracle.weighted_sum(held, records[0]["displacement"], SIZES) == pytest.approx(2.0, rel=1e-5)


@both_granularities
def test_the_increase_that_is_predicted_equals_the_oracle(granularity):
    found, records = trained(granularity, source="path")
    moved = left(granularity, 70, 1e-3)["displacement"]
    predicted = found.predicted(KTO, moved, PARAMETERS)
    expected = [oracle.predicted(record, moved, damping=0.3, sizes=SIZES) for record in records]
    assert predicted == {"sft": pytest.approx(expected[0], rel=1e-5), "dpo": pytest.approx(expected[1], rel=1e-5)}
    assert min(expected) > 0


@both_granularities
def test_a_stage_that_goes_as_far_as_another_objective_is_predicted_to_cost_it_all_that_it_gained(granularity):
    found, (record,) = trained(granularity, source="path", scales=(1e-2,))
    ((objective, cost),) = found.predicted(KTO, record["displacement"], PARAMETERS).items()
    path = record["importance"]
    gain = oracle.weighted_sum(path, {name: torch.ones_like(each) for name, each in path.items()}, SIZES)
    assert (objective, cost) == ("sft", pytest.approx(gain, rel=1e-5))


def test_no_increase_is_predicted_where_the_path_ran_uphill_or_there_is_none():
    found, (record,) = trained("element", source="path", scales=(1e-2,))
    for each in found.accumulated["sft"]["importance"].values():
        each.neg_()
    moved = record["displacement"]
    assert found.predicted(KTO, moved, PARAMETERS) == {"sft": 0.0}
    assert found.predicted(SFT, moved, PARAMETERS) == {}
    assert trained("element", source="relative")[0].predicted(KTO, moved, PARAMETERS) == {}


# --- nothing happened ------------------------------------------------------------------------------------------------


@both_granularities
@pytest.mark.parametrize(
    ("normalization", "method"),
    [("stage", "gradient"), ("stage", "proximal"), ("mean", "gradient"), ("max", "gradient")],
)
@pytest.mark.parametrize("source", ["path", "relative", "displacement", "fisher"])
def test_an_objective_that_moved_nothing_holds_nothing(source, normalization, method, granularity):
    found = consolidation(
        source=source, normalization=normalization, method=method, granularity=granularity, damping=0.0, freeze=0.5
    )
    zero = {name: torch.zeros(each.shape if granularity == "element" else ()) for name, each in PARAMETERS.items()}
    found.add("sft", {"displacement": zero, "importance": zero})
    assert same(found.importance(DPO, PARAMETERS), zero)
    if source == "path":
        assert found.predicted(DPO, left(granularity, 0, 1.0)["displacement"], PARAMETERS) == {"sft": 0.0}


# --- controls --------------------------------------------------------------------------------------------------------


@both_granularities
def test_uniform_importance_is_the_same_everywhere_and_sums_to_one_over_tensors(granularity):
    found, _ = trained(granularity, source="uniform", scales=(1e-2,), normalization="mean")
    assert all(float(each) == 0.25 for each in found.importance(DPO, PARAMETERS).values())


def random(seed=3, stage=DPO, granularity="element"):
    found = Consolidation(EWCConfig(source="random", granularity=granularity, normalization="max"), seed)
    found.add("sft", left(granularity, 0, 1e-2))
    return found.importance(stage, PARAMETERS)


@both_granularities
def test_random_importance_has_the_shapes_that_were_asked_for(granularity):
    drawn = random(granularity=granularity)
    expected = [tuple(each.shape) if granularity == "element" else () for each in PARAMETERS.values()]
    assert [tuple(each.shape) for each in drawn.values()] == expected
    assert all(bool(((each >= 0) & (each <= 1)).all()) for each in drawn.values())


def test_random_importance_depends_on_seed_and_stage_alone():
    drawn = random()
    torch.rand(7)  # the global generator plays no part
    assert same(drawn, random())
    assert not same(drawn, random(stage=STAGES[4]))
    assert not same(drawn, random(seed=9))
    assert not torch.equal(drawn["matrix"].flatten()[:9], drawn["vector"])


def test_the_softmax_scale_does_not_touch_random_importance():
    found = consolidation(source="random", granularity="tensor", normalization="softmax")
    add(found, "sft", tensors(a=0.2, b=0.9, c=0.3))
    shares = [float(each) for each in importance(found, DPO).values()]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) / min(shares) <= np.e  # the numbers are in [0, 1)


# --- freezing --------------------------------------------------------------------------------------------------------

MEANS = {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0], "c": [0.0, 9.0], "d": [0.5]}


@pytest.mark.parametrize(
    ("share", "names"), [(0.0, set()), (0.2, set()), (0.25, {"c"}), (0.5, {"b", "c"}), (0.9, set("abc"))]
)
def test_the_tensors_with_the_largest_mean_are_frozen(share, names):
    found = consolidation(freeze=share)
    add(found, "sft", tensors(**MEANS))
    parameters = shapes(tensors(**MEANS))
    assert found.frozen(DPO, parameters) == names
    assert found.frozen(SFT, parameters) == set()


def test_of_several_others_each_counts_alike_for_what_is_frozen():
    found = consolidation(freeze=0.5)
    add(found, "sft", tensors(a=[8.0], b=[0.0], c=[8.0], d=[0.0]))
    add(found, "dpo", tensors(a=[8e-9], b=[8e-9], c=[0.0], d=[2e-9]))
    parameters = shapes(tensors(a=[0.0], b=[0.0], c=[0.0], d=[0.0]))
    assert found.frozen(DPO, parameters) == {"a", "c"}
    # Each sum of importance times displacement is one: a has 1/16 + 1e9/16.5, b 1e9/16.5, c 1/16 and d 1e9/66.
    assert found.frozen(KTO, parameters) == {"a", "b"}


def test_freezing_follows_the_source():
    found = consolidation(source="relative", freeze=0.5)
    add(found, "sft", tensors(**MEANS))
    assert found.frozen(DPO, shapes(tensors(**MEANS))) == {"a", "d"}  # those that moved least


# --- saturation ------------------------------------------------------------------------------------------------------

REAL = {f"layer.{index}": torch.tensor(1e-8 * (index + 1)) for index in range(8)}  # squared change of a real stage


def test_the_authors_softmax_says_that_it_holds_a_single_tensor():
    found = consolidation(preset="authors")
    add(found, "sft", REAL)
    with pytest.warns(SaturationWarning, match=r"holds 1\.00 effective tensors of 8.*`ewc\.normalization: stage`"):
        shares = importance(found, DPO)
    assert [float(share) for share in shares.values()] == [0.0] * 7 + [1.0]


def test_the_saturation_warning_can_be_silenced():
    found = consolidation(preset="authors")
    add(found, "sft", REAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        importance(found, DPO)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "stage"},
        {"source": "relative", "normalization": "stage"},
        {},
        {"granularity": "tensor"},
        {"granularity": "tensor", "normalization": "max"},
        {"granularity": "tensor", "normalization": "softmax", "importance_scale": 1.0},
        {"preset": "authors", "strength": 0.0},
    ],
    ids=["stage", "relative", "element", "mean", "max", "small scale", "no penalty"],
)
def test_nothing_is_said_where_importance_is_shared_or_there_is_no_penalty(options):
    found = consolidation(**options)
    add(found, "sft", REAL)
    importance(found, DPO)  # a warning is an error here


# --- any numbers -----------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 2.0**100, width=32)
RAW = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(RAW, min_size=1, max_size=3), normalization=st.sampled_from(["mean", "max"]))
def test_importance_is_finite_and_not_negative_for_any_raw_numbers(raw, normalization):
    found = consolidation(normalization=normalization)
    for stage, addition in _additions(raw):
        add(found, stage.objective, addition)
    _check(importance(found, DPO), largest=None if normalization == "mean" else float(len(raw)))


# Squares of changes that float32 resolves at all.
MOVED = st.just(0.0) | st.floats(2.0**-80, 2.0**40, width=32)


@settings(max_examples=60, deadline=None)
@given(
    raw=st.lists(st.lists(st.lists(MOVED, min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=3),
    source=st.sampled_from(["path", "relative", "displacement", "uniform", "random"]),
    damping=st.just(0.0) | st.floats(1e-6, 1e3),
)
def test_importance_in_the_unit_of_a_stage_is_finite_and_not_negative(raw, source, damping):
    found = consolidation(source=source, normalization="stage", damping=damping)
    for stage, addition in _additions(raw):
        path = {name: torch.roll(each, 1).sqrt() * (-1) ** stage.index for name, each in addition.items()}
        found.add(stage.objective, {"displacement": addition, "importance": path})
    _check(importance(found, DPO), largest=None)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(NUMBERS, min_size=1, max_size=6), scale=st.sampled_from([0.0, 1.0, 1e5, 1e10]))
def test_the_softmax_shares_exactly_one_for_any_raw_numbers(raw, scale):
    found = consolidation(granularity="tensor", normalization="softmax", importance_scale=scale)
    add(found, "sft", {str(index): torch.tensor(each) for index, each in enumerate(raw)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        shares = importance(found, DPO)
    _check(shares, largest=1.0)
    assert sum(map(float, shares.values())) == pytest.approx(1.0, abs=1e-5)


def _additions(raw):
    """A stage of an objective of its own for each list of rows, all in the shapes of the first."""
    for index, values in enumerate(raw):
        numbers = [each for row in values for each in row]
        yield (
            Stage(index=index, round=0, objective=f"own-{index}", num_rounds=1),
            {
                str(row): torch.tensor([numbers[(row + k) % len(numbers)] for k in range(len(each))])
                for row, each in enumerate(raw[0])
            },
        )


def _check(found, *, largest):
    for each in found.values():
        assert each.dtype == torch.float32
        assert bool(torch.isfinite(each).all())
        assert bool((each >= 0).all())
        assert largest is None or bool((each <= largest * (1 + 1e-6)).all())
