"""The terms of the losses and their slopes, against plain arithmetic."""

import math

import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hbat.ppo.maths import adapted_kl_coef, kl_terms, policy_loss, value_loss

LOG_PROB = st.floats(-12, 0)
NUMBER = st.floats(-10, 10)
RANGE = st.sampled_from([0.05, 0.2, 0.5])
ESTIMATORS = ["k1", "k3"]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(log_prob=LOG_PROB, reference=LOG_PROB)
def test_kl_terms_equal_the_oracle(estimator, log_prob, reference):
    found = float(kl_terms(tensor(log_prob), tensor(reference), estimator)[0])
    assert found == pytest.approx(oracle.kl_term(log_prob, reference, estimator), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(logits=st.lists(st.tuples(NUMBER, NUMBER), min_size=2, max_size=6))
def test_the_expectation_of_kl_terms_over_all_tokens_is_the_kl_divergence(estimator, logits):
    policy, reference = (oracle.distribution(each) for each in zip(*logits, strict=True))
    exact = math.fsum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    terms = kl_terms(tensor(*map(math.log, policy)), tensor(*map(math.log, reference)), estimator).tolist()
    expectation = math.fsum(p * term for p, term in zip(policy, terms, strict=True))
    assert expectation == pytest.approx(exact, rel=1e-8, abs=1e-8)


@given(st.floats(-40, 0, width=32), st.floats(-40, 0, width=32))
def test_k3_is_never_negative_in_float32_either(log_prob, reference):
    assert float(kl_terms(torch.tensor(log_prob), torch.tensor(reference), "k3")) >= 0.0


def test_k3_of_a_small_difference_is_not_lost_to_rounding():
    found = float(kl_terms(torch.tensor(0.0), torch.tensor(1e-3), "k3"))
    assert found == pytest.approx(0.5e-6, rel=1e-2)  # float32's exp(x) - 1 - x is off by a tenth


def test_k1_is_the_default_and_of_either_sign():
    assert kl_terms(tensor(-1.0, -3.0), tensor(-2.0, -1.0)).tolist() == [1.0, -2.0]


# --- policy ----------------------------------------------------------------------------------------------------------


def slope_of_policy_loss(log_prob, old, advantage, clip_range):
    new = tensor(log_prob).requires_grad_()
    loss = policy_loss(new, tensor(old), tensor(advantage), clip_range)
    loss.sum().backward()
    return float(loss.detach()), float(new.grad)


@given(LOG_PROB, LOG_PROB, NUMBER, RANGE)
def test_the_policy_loss_equals_the_oracle(log_prob, old, advantage, clip_range):
    found, _ = slope_of_policy_loss(log_prob, old, advantage, clip_range)
    assert found == pytest.approx(oracle.policy_loss(log_prob, old, advantage, clip_range), rel=1e-9, abs=1e-12)


def near_an_edge(log_prob, old, clip_range):
    ratio = math.exp(log_prob - old)
    return min(abs(ratio - 1.0 - clip_range), abs(ratio - 1.0 + clip_range)) < 1e-3


@given(LOG_PROB, st.floats(-1, 1), NUMBER, RANGE)
def test_the_slope_of_the_policy_loss_is_that_of_finite_differences(log_prob, step, advantage, clip_range):
    old = log_prob - step
    assume(not near_an_edge(log_prob, old, clip_range))
    _, slope = slope_of_policy_loss(log_prob, old, advantage, clip_range)
    assert slope == pytest.approx(oracle.policy_loss_slope(log_prob, old, advantage, clip_range), rel=1e-9)
    above, below = (oracle.policy_loss(log_prob + each, old, advantage, clip_range) for each in (1e-5, -1e-5))
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.5, 2, True), (1.5, -2, False), (0.5, 2, False), (0.5, -2, True), (1.1, 2, False), (0.9, -2, False)],
)
def test_a_token_pulls_no_further_once_it_has_moved_far_enough(ratio, advantage, clipped):
    loss, slope = slope_of_policy_loss(math.log(ratio), 0.0, advantage, 0.2)
    assert slope == pytest.approx(0.0 if clipped else -advantage * ratio)
    bound = 1.2 if ratio > 1 else 0.8
    assert loss == pytest.approx(-advantage * (bound if clipped else ratio))


def test_the_policy_that_sampled_has_the_policy_gradient():
    loss, slope = slope_of_policy_loss(-2.0, -2.0, 3.0, 0.2)
    assert (loss, slope) == (-3.0, -3.0)


# --- critic ----------------------------------------------------------------------------------------------------------


def slope_of_value_loss(value, old, target, clip_range):
    new = tensor(value).requires_grad_()
    loss = value_loss(new, tensor(old), tensor(target), clip_range)
    loss.sum().backward()
    return float(loss.detach()), float(new.grad)


@given(NUMBER, NUMBER, NUMBER, RANGE)
def test_the_value_loss_equals_the_oracle(value, old, target, clip_range):
    found, _ = slope_of_value_loss(value, old, target, clip_range)
    assert found == pytest.approx(oracle.value_loss(value, old, target, clip_range), rel=1e-9, abs=1e-12)


@given(NUMBER, st.floats(-1, 1), NUMBER, RANGE)
def test_the_slope_of_the_value_loss_is_that_of_finite_differences(value, step, target, clip_range):
    old = value - step
    above, here, below = (oracle.value_loss(value + each, old, target, clip_range) for each in (1e-4, 0.0, -1e-4))
    assume(abs(above - 2.0 * here + below) < 1e-7)  # no kink in between
    _, slope = slope_of_value_loss(value, old, target, clip_range)
    assert slope == pytest.approx((above - below) / 2e-4, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9),  # within the range: (1.1 - 2)^2 / 2
        (1.5, 1.0, 2.0, 0.32, 0.0),  # moved towards the target further than allowed: (1.2 - 2)^2 / 2
        (0.5, 1.0, 2.0, 1.125, -1.5),  # moved away from it: (0.5 - 2)^2 / 2
        (2.0, 1.0, 2.0, 0.32, 0.0),  # right already, but not to be trusted
    ],
)
def test_a_value_pulls_no_further_once_it_has_moved_far_enough(value, old, target, loss, slope):
    assert slope_of_value_loss(value, old, target, 0.2) == pytest.approx((loss, slope))


# --- KL coefficient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1.0 + 0.1 * 0.5)),  # a tenth above it, over half a horizon
        (5.4, 0.1 * (1.0 - 0.1 * 0.5)),
        (600.0, 0.1 * (1.0 + 0.2 * 0.5)),  # clipped
        (-600.0, 0.1 * (1.0 - 0.2 * 0.5)),  # k1 over few samples can be negative
    ],
)
def test_the_kl_coefficient_moves_against_the_error(kl, expected):
    found = adapted_kl_coef(0.1, kl, target=6.0, horizon=1000.0, samples=500)
    assert found == pytest.approx(expected)


@given(st.floats(0, 10), st.floats(-1e6, 1e6), st.integers(1, 10**6))
def test_the_kl_coefficient_never_becomes_negative(kl_coef, kl, samples):
    assert adapted_kl_coef(kl_coef, kl, target=1.0, horizon=10.0, samples=samples) >= 0.0
