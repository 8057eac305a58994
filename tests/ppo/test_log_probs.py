"""Log-probabilities and entropies with their gradients, whole and in parts."""

import contextlib
import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hbat.ppo.networks.token_model import token_statistics

VOCABULARY = 11
#: Logits in memory at once: everything, three tokens, two tokens and a bit, one token, less than one.
SIZES = [2**24, 3 * VOCABULARY, 2 * VOCABULARY + 5, VOCABULARY, 1]
every_size = pytest.mark.parametrize("max_logits", SIZES)


def build(rows=2, tokens=5, width=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, width, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(width, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        for each in head.parameters():
            each.copy_(torch.randn(each.shape, generator=generator))
    return hidden, torch.randint(VOCABULARY, (rows, tokens), generator=generator), head


def logits_of(hidden, head):
    """Logits of every token as lists of floats, multiplied out by hand."""
    weight, bias = head.weight.tolist(), head.bias.tolist()

    def logits(state):
        rows = zip(weight, bias, strict=True)
        return [math.fsum(w * h for w, h in zip(row, state, strict=True)) + b for row, b in rows]

    return [[logits(state) for state in states] for states in hidden.tolist()]


def expected(hidden, tokens, head, temperature):
    logits, ids = logits_of(hidden, head), tokens.tolist()
    log_probs = [
        [oracle.log_prob(each, token, temperature) for each, token in zip(*pair, strict=True)]
        for pair in zip(logits, ids, strict=True)
    ]
    entropies = [[oracle.entropy(each, temperature) for each in row] for row in logits]
    return torch.tensor(log_probs), torch.tensor(entropies)


# --- values ----------------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_values_equal_the_oracle(max_logits, temperature):
    hidden, tokens, head = build()
    found = token_statistics(
        hidden, tokens, head, vocabulary=VOCABULARY, temperature=temperature, max_logits=max_logits
    )
    for each, wanted in zip(found, expected(hidden, tokens, head, temperature), strict=True):
        assert each.dtype == torch.float32
        assert each.shape == tokens.shape
        torch.testing.assert_close(each, wanted.float(), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 70), st.integers(0, 99))
@settings(max_examples=30)
def test_any_number_of_rows_tokens_and_logits_gives_the_same(rows, tokens, max_logits, seed):
    hidden, ids, head = build(rows, tokens, seed=seed)
    with torch.no_grad():
        whole = token_statistics(hidden, ids, head, vocabulary=VOCABULARY)
        parts = token_statistics(hidden, ids, head, vocabulary=VOCABULARY, max_logits=max_logits)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second)


@every_size
def test_without_entropy_it_is_zero_and_the_log_probabilities_the_same(max_logits):
    hidden, tokens, head = build()
    options = {"vocabulary": VOCABULARY, "max_logits": max_logits}
    with_entropy = token_statistics(hidden, tokens, head, **options)
    without = token_statistics(hidden, tokens, head, with_entropy=False, **options)
    assert torch.equal(with_entropy[0], without[0])
    assert torch.equal(without[1], torch.zeros(tokens.shape))
    assert with_entropy[1].min() > 0


@every_size
def test_half_precision_is_left_before_the_logarithm(max_logits):
    hidden, tokens, head = build(dtype=torch.bfloat16)
    found = token_statistics(hidden, tokens, head, vocabulary=VOCABULARY, max_logits=max_logits)
    logits = head(hidden).tolist()
    wanted = [
        [oracle.log_prob(each, token) for each, token in zip(*pair, strict=True)]
        for pair in zip(logits, tokens.tolist(), strict=True)
    ]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensor(wanted), rtol=1e-5, atol=1e-5)


# --- gradients -------------------------------------------------------------------------------------------------------


def weighted(statistics, seed=5):
    """One number that depends on every element with another weight."""
    generator = torch.Generator().manual_seed(seed)
    return sum((each * torch.randn(each.shape, generator=generator)).sum() for each in statistics)


def gradients(hidden, tokens, head, **options):
    leaves = [hidden, head.weight, head.bias]
    return torch.autograd.grad(weighted(token_statistics(hidden, tokens, head, **options)), leaves)


@every_size
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_equal_the_formula(max_logits, temperature):
    """d log p_t / d z_j = [j = t] - p_j and dH / d z_j = -p_j (log p_j + H), each over the temperature."""
    hidden, tokens, head = build(rows=1, tokens=4)
    found = gradients(hidden, tokens, head, vocabulary=VOCABULARY, temperature=temperature, max_logits=max_logits)
    generator = torch.Generator().manual_seed(5)
    of_log_prob, of_entropy = (torch.randn(1, 4, generator=generator)[0].tolist() for _ in range(2))
    by_hidden, by_weight, by_bias = (torch.zeros_like(each) for each in (hidden, head.weight, head.bias))
    for at, logits in enumerate(logits_of(hidden, head)[0]):
        shares = oracle.distribution(logits, temperature)
        entropy = oracle.entropy(logits, temperature)
        for j, share in enumerate(shares):
            slope = of_log_prob[at] * (float(j == tokens[0, at]) - share)
            slope -= of_entropy[at] * share * (math.log(share) + entropy)
            slope /= temperature
            by_hidden[0, at] += slope * head.weight.detach()[j]
            by_weight[j] += slope * hidden.detach()[0, at]
            by_bias[j] += slope
    for each, wanted in zip(found, (by_hidden, by_weight, by_bias), strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_logits", SIZES[1:])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients_in_parts_are_those_of_the_whole(max_logits, with_entropy):
    hidden, tokens, head = build(rows=3)
    options = {"vocabulary": VOCABULARY, "with_entropy": with_entropy}
    whole = gradients(hidden, tokens, head, **options)
    parts = gradients(hidden, tokens, head, max_logits=max_logits, **options)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_parts_see_the_same_precision_in_the_backward_pass():
    hidden, tokens, head = build(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = gradients(hidden, tokens, head, vocabulary=VOCABULARY)
        parts = gradients(hidden, tokens, head, vocabulary=VOCABULARY, max_logits=1)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)


# --- tokens that cannot be sampled -----------------------------------------------------------------------------------


@every_size
def test_a_token_that_is_ruled_out_has_no_part_in_value_or_gradient(max_logits):
    hidden, _, head = build()
    tokens = torch.tensor([[0, 1, 2, 4, 5], [6, 7, 8, 9, 10]])  # not 3
    barrier = torch.zeros(VOCABULARY, dtype=torch.float64)
    barrier[3] = -math.inf
    options = {"vocabulary": VOCABULARY, "max_logits": max_logits}
    found = token_statistics(hidden, tokens, lambda states: head(states) + barrier, **options)
    rest = [each for each in range(VOCABULARY) if each != 3]

    def without(states):
        return head(states)[:, rest]

    wanted = token_statistics(hidden, tokens - (tokens > 3).long(), without, **options)
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)
    leaves = [hidden, head.weight, head.bias]
    for each, other in zip(
        torch.autograd.grad(weighted(found), leaves), torch.autograd.grad(weighted(wanted), leaves), strict=True
    ):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)


def test_logits_far_apart_neither_overflow_nor_give_nan():
    logits = torch.tensor([[[3e4, -3e4, 0.0]]], requires_grad=True)
    log_probs, entropies = token_statistics(logits, torch.tensor([[0]]), lambda each: each, vocabulary=3)
    (log_probs + entropies).sum().backward()
    assert log_probs.tolist() == entropies.tolist() == [[0.0]]
    assert logits.grad.isfinite().all()


# --- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saved_for_backward():
    """Sizes of the tensors that are kept for the backward pass."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def test_in_parts_no_logits_are_kept_for_the_backward_pass():
    hidden, tokens, head = build(rows=20, tokens=10)
    with saved_for_backward() as whole:
        token_statistics(hidden, tokens, head, vocabulary=VOCABULARY)
    with saved_for_backward() as parts:
        token_statistics(hidden, tokens, head, vocabulary=VOCABULARY, max_logits=10 * VOCABULARY)
    assert max(whole) == tokens.numel() * VOCABULARY
    assert max(parts) <= hidden.numel()
    assert sum(parts) <= 2 * (hidden.numel() + tokens.numel()) + 20 * head.weight.numel()


@every_size
def test_no_more_logits_are_computed_at_once_than_asked_for(max_logits):
    hidden, tokens, head = build(rows=4)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    found = token_statistics(hidden, tokens, head, vocabulary=VOCABULARY, max_logits=max_logits)
    sum(each.sum() for each in found).backward()
    assert max(sizes) <= max(max_logits, VOCABULARY)
    whole = tokens.numel() * VOCABULARY <= max_logits
    assert sum(sizes) == tokens.numel() * VOCABULARY * (1 if whole else 2)  # once more in the backward pass


def test_without_gradients_parts_are_computed_once():
    hidden, tokens, head = build(rows=4)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    with torch.no_grad():
        token_statistics(hidden, tokens, head, vocabulary=VOCABULARY, max_logits=1)
    assert sizes == [VOCABULARY] * tokens.numel()
