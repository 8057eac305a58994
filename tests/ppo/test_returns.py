"""From scores to advantages, against sums over lists of floats."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbat.ppo.maths import advantages_and_returns, explained_variance, masked_mean, token_rewards, whiten

few = settings(max_examples=25)
NAN = float("nan")
NUMBER = st.floats(-100, 100, width=32)
SHARE = st.sampled_from([0.0, 0.3, 0.9, 0.95, 0.99, 1.0])


@st.composite
def completions(draw, *, columns=1, min_tokens=1):
    """Columns of numbers for each token of some completions: lists of rows, of one to six tokens."""
    lengths = draw(st.lists(st.integers(min_tokens, 6), min_size=1, max_size=4))
    return [[draw(st.lists(NUMBER, min_size=each, max_size=each)) for each in lengths] for _ in range(columns)]


def padded(rows, *, fill=NAN, extra=0, dtype=torch.float64):
    """Rows of numbers as a tensor padded on the right, and its mask."""
    width = max(map(len, rows)) + extra
    values = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return values, mask


def assert_rows(found, mask, expected, *, rel=1e-9, abs_=1e-9):
    """The masked elements are the expected ones and all others zero."""
    assert torch.equal(torch.where(mask, 0.0, found), torch.zeros_like(found))
    assert [each for row in oracle.ragged(found, mask.sum(1).tolist()) for each in row] == pytest.approx(
        [each for row in expected for each in row], rel=rel, abs=abs_
    )


# --- masked mean -----------------------------------------------------------------------------------------------------


@given(completions())
@few
def test_the_masked_mean_is_the_mean_of_what_counts(rows):
    (values,) = rows
    everything = [each for row in values for each in row]
    expected = math.fsum(everything) / len(everything)
    assert float(masked_mean(*padded(values, extra=1))) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_masked_mean_neither_sees_nor_changes_what_lies_outside():
    values = torch.tensor([1.0, NAN, 3.0, float("inf")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_the_masked_mean_divides_by_a_count_that_is_given():
    values, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, True, False])
    assert masked_mean(values, mask, 12.0) == 0.25
    assert masked_mean(values, mask, torch.tensor(6)) == 0.5


def test_the_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.tensor([NAN, 1.0]), torch.tensor([False, False])) == 0.0


# --- rewards of tokens -----------------------------------------------------------------------------------------------


def test_rewards_of_an_example_worked_by_hand():
    kl = torch.tensor([[1.0, 2.0, NAN], [4.0, 5.0, 6.0], [7.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [-2.0, -2.5, 17.0], [26.5, 0.0, 0.0]]


@given(completions(), st.lists(NUMBER, min_size=4, max_size=4), st.floats(0, 2))
@few
def test_rewards_equal_the_oracle(rows, scores, kl_coef):
    (kl,) = rows
    values, mask = padded(kl, extra=2)
    scores = scores[: len(kl)]
    found = token_rewards(torch.tensor(scores, dtype=torch.float64), values, mask, kl_coef)
    assert_rows(found, mask, oracle.token_rewards(scores, kl, kl_coef))


def test_rewards_take_the_precision_of_the_kl_terms():
    kl, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    assert token_rewards(torch.tensor([1.0], dtype=torch.float64), kl, mask, 0.1).dtype == torch.float32


# --- whitening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
@given(rows=completions(min_tokens=2))
@few
def test_whitening_equals_the_oracle(shift_mean, rows):
    (values,) = rows
    tensor, mask = padded(values, extra=1)
    found = whiten(tensor, mask, shift_mean=shift_mean)
    assert_rows(found, mask, oracle.whiten(values, shift_mean=shift_mean), rel=1e-7, abs_=1e-7)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_unit_variance_with_n_minus_one(shift_mean):
    white = whiten(torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1, 3, dtype=torch.bool), shift_mean=shift_mean)
    assert oracle.variance(white[0].tolist()) == pytest.approx(1.0)
    assert float(white.mean()) == pytest.approx(0.0 if shift_mean else 3.0, abs=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_constant_values_are_whitened_to_zero_or_stay(shift_mean):
    tensor, mask = padded([[0.25] * 3, [0.25]], dtype=torch.float32)
    expected = [[0.0 if shift_mean else 0.25] * 3, [0.0 if shift_mean else 0.25]]
    assert_rows(whiten(tensor, mask, shift_mean=shift_mean), mask, expected)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_a_single_value_is_left_as_it_is(shift_mean):
    tensor, mask = padded([[3.0]], extra=2)
    assert whiten(tensor, mask, shift_mean=shift_mean).tolist() == [[3.0, 0.0, 0.0]]


def test_whitening_nothing_gives_zeros():
    assert whiten(torch.full((2, 2), NAN), torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]] * 2


class Others:
    """What a second process adds to each sum, in the order in which the sums are asked for."""

    def __init__(self, sums):
        self.sums = list(sums)

    def __call__(self, value):
        return value + self.sums.pop(0)


@pytest.mark.parametrize("shift_mean", [True, False])
@given(rows=completions(min_tokens=2), more=completions())
@few
def test_whitening_on_two_processes_is_whitening_of_all_their_values(shift_mean, rows, more):
    (here,), (there,) = rows, more
    expected = oracle.whiten([*here, *there], shift_mean=shift_mean)
    mean = math.fsum(x for row in [*here, *there] for x in row) / sum(map(len, [*here, *there]))
    everything = [x for row in there for x in row]
    sums = [len(everything), math.fsum(everything), math.fsum((x - mean) ** 2 for x in everything)]
    total = Others(sums)
    tensor, mask = padded(here)
    found = whiten(tensor, mask, shift_mean=shift_mean, total=total)
    assert total.sums == []
    assert_rows(found, mask, expected[: len(here)], rel=1e-6, abs_=1e-6)


@pytest.mark.parametrize("share", [0, 1])
def test_a_process_with_one_value_or_none_asks_for_as_many_sums_as_the_others(share):
    """Otherwise the others would wait for it without end."""
    tensor, mask = padded([[2.0][:share]], extra=1)
    total = Others([3, 12.0, 8.0])
    whiten(tensor, mask, total=total)
    assert total.sums == []


# --- advantages and returns ------------------------------------------------------------------------------------------


def estimates(rewards, values, gamma, lam):
    first, mask = padded(rewards, fill=0.0, extra=1)
    second, _ = padded(values, extra=1)
    return *advantages_and_returns(first, second, mask, gamma=gamma, lam=lam), mask


def test_advantages_of_an_example_worked_by_hand():
    # delta = (0 + 0.5 * 2 - 1, 8 + 0.5 * 0 - 2) = (0, 6); A = (0 + 0.5 * 0.5 * 6, 6).
    advantages, returns, _ = estimates([[0.0, 8.0]], [[1.0, 2.0]], 0.5, 0.5)
    assert advantages.tolist() == [[1.5, 6.0, 0.0]]
    assert returns.tolist() == [[2.5, 8.0, 0.0]]


@given(completions(columns=2), SHARE, SHARE)
@few
def test_advantages_and_returns_equal_the_oracle(columns, gamma, lam):
    rewards, values = columns
    advantages, returns, mask = estimates(rewards, values, gamma, lam)
    expected = [oracle.advantages(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    assert_rows(advantages, mask, expected)
    targets = [[a + b for a, b in zip(*each, strict=True)] for each in zip(expected, values, strict=True)]
    assert_rows(returns, mask, targets)


@given(completions(columns=2), SHARE)
@few
def test_with_lambda_one_returns_are_the_discounted_rewards_to_come(columns, gamma):
    rewards, values = columns
    advantages, returns, mask = estimates(rewards, values, gamma, 1.0)
    expected = [oracle.discounted(each, gamma) for each in rewards]
    assert_rows(returns, mask, expected, abs_=1e-8)
    less = [[a - b for a, b in zip(*each, strict=True)] for each in zip(expected, values, strict=True)]
    assert_rows(advantages, mask, less, abs_=1e-8)


@given(completions(columns=2), SHARE)
@few
def test_with_lambda_zero_advantages_are_one_step_differences(columns, gamma):
    rewards, values = columns
    advantages, _, mask = estimates(rewards, values, gamma, 0.0)
    expected = [oracle.temporal_differences(r, v, gamma) for r, v in zip(rewards, values, strict=True)]
    assert_rows(advantages, mask, expected)


def test_what_lies_beyond_a_completion_does_not_reach_into_it():
    mask = torch.tensor([[True, True, False, False]])
    rewards = torch.tensor([[1.0, 2.0, 50.0, NAN]])
    first = advantages_and_returns(rewards, torch.tensor([[0.5, 0.5, 9.0, NAN]]), mask, gamma=0.9, lam=0.9)
    short = advantages_and_returns(
        rewards[:, :2], torch.full((1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.9
    )
    for long, brief in zip(first, short, strict=True):
        assert torch.equal(long[:, :2], brief)
        assert torch.equal(long[:, 2:], torch.zeros(1, 2))


# --- explained variance ----------------------------------------------------------------------------------------------


@given(completions(columns=2, min_tokens=2), st.sampled_from([1.0, 1e-3, 1e-6]))
@few
def test_explained_variance_equals_the_oracle(columns, scale):
    returns, values = ([[scale * each for each in row] for row in rows] for rows in columns)
    targets, mask = padded(returns)
    estimate, _ = padded(values)
    found = float(explained_variance(estimate, targets, mask))
    spread = oracle.variance([each for row in returns for each in row])
    if spread < (1e-6 * scale) ** 2:
        return  # too little to divide by, or nothing
    errors = [r - v for pair in zip(returns, values, strict=True) for r, v in zip(*pair, strict=True)]
    assert found == pytest.approx(1.0 - oracle.variance(errors) / spread, rel=1e-6, abs=1e-6)


def test_a_perfect_critic_explains_all_and_a_constant_one_nothing():
    targets, mask = padded([[1.0, 2.0], [4.0]], dtype=torch.float32)
    assert explained_variance(targets + 3.0, targets, mask) == 1.0
    assert explained_variance(torch.ones_like(targets), targets, mask) == 0.0


def test_nothing_is_explained_where_nothing_varies():
    constant, mask = padded([[0.1, 0.1], [0.1]], dtype=torch.float32)
    assert explained_variance(torch.rand(2, 2), constant, mask) == 0.0
    single, mask = padded([[2.0]], extra=1)
    assert explained_variance(single, single, mask) == 0.0
