"""The penalty has a unit: what scales learning rate, width or rank, and nothing else, leaves its value alone."""

import cases
import oracle
import pytest
import torch

from hbat.config.ewc import EWCConfig
from hbat.ewc.importance import displacement
from hbat.ewc.penalty import ewc_penalty, proximal_step_
from hbat.state.consolidation import Consolidation
from hbat.state.plan import plan

SFT, DPO = plan(1, ["sft", "dpo"])
STRENGTH = 3.0
#: Weights of a layer, and the factors of an adapter of rank 4.
SHAPES = {
    "matrix": torch.empty(6, 8),
    "vector": torch.empty(8),
    "lora_A": torch.empty(4, 8),
    "lora_B": torch.empty(6, 4),
}

every_source = pytest.mark.parametrize("source", ["path", "relative"])
both_granularities = pytest.mark.parametrize("granularity", ["element", "tensor"])


def widened(tensors):
    """Every tensor eight times side by side."""
    return {name: torch.cat([each] * 8, dim=-1) for name, each in tensors.items()}


def of_rank_64(tensors):
    """The factors sixteen times: more rows of A, more columns of B."""
    along = {"lora_A": 0, "lora_B": 1}
    return {name: torch.cat([each] * 16, dim=along[name]) for name, each in tensors.items() if name in along}


def of_rank_4(tensors):
    return {name: each for name, each in tensors.items() if name.startswith("lora")}


def as_it_is(tensors):
    return tensors


def trained(source, granularity, *, shape=as_it_is, rate=1.0, method="gradient"):
    """(importance for dpo, weights, change of dpo) after a stage of sft, with every change times `rate`."""
    start, gradient, change = (shape(cases.random_like(SHAPES, seed, std=1e-2)) for seed in (0, 1, 2))
    moved = {name: -rate * (each + 0.01) for name, each in gradient.items()}  # not quite downhill everywhere
    found = Consolidation(EWCConfig(source=source, granularity=granularity, method=method), seed=0)
    end = {name: each + moved[name] for name, each in start.items()}
    record = {"displacement": displacement(end, start, granularity)}
    if source == "path":
        path = {name: -each * moved[name] for name, each in gradient.items()}
        record["importance"] = path if granularity == "element" else {name: each.mean() for name, each in path.items()}
    found.add("sft", record)
    return found.importance(DPO, end), end, {name: rate * each for name, each in change.items()}


def cost(*setting, **options):
    """What dpo pays for its change."""
    importance, start, change = trained(*setting, **options)
    end = {name: each + change[name] for name, each in start.items()}
    return STRENGTH * float(ewc_penalty(end, start, importance))


@both_granularities
@every_source
@pytest.mark.parametrize("rate", [100.0, 0.01])
def test_a_hundredfold_learning_rate_pays_the_same_penalty(rate, source, granularity):
    expected = cost(source, granularity)
    assert expected > 0.1
    assert cost(source, granularity, rate=rate) == pytest.approx(expected, rel=1e-3)


@both_granularities
@every_source
def test_a_model_eight_times_as_wide_pays_the_same_penalty(source, granularity):
    expected = cost(source, granularity)
    assert cost(source, granularity, shape=widened) == pytest.approx(expected, rel=1e-4)


@both_granularities
@every_source
def test_adapters_of_rank_4_and_64_pay_the_same_penalty(source, granularity):
    expected = cost(source, granularity, shape=of_rank_4)
    assert cost(source, granularity, shape=of_rank_64) == pytest.approx(expected, rel=1e-4)


@both_granularities
@pytest.mark.parametrize("source", ["path", "relative", "displacement", "uniform", "random"])
@pytest.mark.parametrize("shape", [as_it_is, widened, of_rank_64])
def test_a_stage_that_moves_every_element_as_far_as_the_other_did_pays_the_strength(shape, source, granularity):
    importance, start, _ = trained(source, granularity, shape=shape)
    moved = {name: -(each + 0.01) for name, each in shape(cases.random_like(SHAPES, 1, std=1e-2)).items()}
    end = {name: each + moved[name] for name, each in start.items()}
    assert STRENGTH * float(ewc_penalty(end, start, importance)) == pytest.approx(STRENGTH, rel=1e-3)


@both_granularities
@every_source
@pytest.mark.parametrize("rate", [100.0, 0.01])
def test_a_proximal_step_pulls_alike_at_any_learning_rate(rate, source, granularity):
    """The share of its way that a stage keeps in one step, for a first rate of 0.02."""
    kept = []
    for factor in (1.0, rate):
        importance, start, change = trained(source, granularity, rate=factor, method="proximal")
        zero = {name: torch.zeros_like(each) for name, each in start.items()}
        end = {name: each.clone() for name, each in change.items()}
        rates = dict.fromkeys(end, 0.02 * factor)
        proximal_step_(end, zero, importance, strength=STRENGTH, learning_rates=rates)
        kept.append({name: each / change[name] for name, each in end.items()})
    assert 0.1 < float(torch.cat([each.flatten() for each in kept[0].values()]).mean()) < 0.9
    assert cases.largest_difference(*kept) < 1e-3


def test_a_proximal_pull_of_importance_that_is_the_same_everywhere_is_that_of_its_formula():
    """The distance is divided by 1 + strength * lr / s."""
    importance, start, change = trained("uniform", "tensor", method="proximal")
    moved = {name: -(each + 0.01) for name, each in cases.random_like(SHAPES, 1, std=1e-2).items()}
    rms = oracle.drift(moved, {name: torch.zeros_like(each) for name, each in moved.items()})
    zero, end = {name: torch.zeros_like(each) for name, each in start.items()}, change
    expected = {name: each / (1 + STRENGTH * 0.02 / rms) for name, each in change.items()}
    proximal_step_(end, zero, importance, strength=STRENGTH, learning_rates=dict.fromkeys(end, 0.02))
    assert cases.largest_difference(end, expected) < 1e-6
