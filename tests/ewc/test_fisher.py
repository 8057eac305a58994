import functools

import cases
import numpy as np
import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hbat.ewc import fisher
from hbat.ewc.fisher import Example, diagonal_fisher

VOCABULARY = 7
#: (input_ids, labels) of different lengths and numbers of targets.
ROWS = [
    ([3, 1, 4, 5, 2], [-100, -100, 4, 5, 2]),
    ([2, 6, 5], [-100, 6, -100]),
    ([1, 3, 3, 6], [-100, -100, 3, 6]),
]
EXAMPLES = [Example(*row) for row in ROWS]


@functools.cache
def model():
    return cases.tiny_llama(seed=3, hidden=8, vocabulary=VOCABULARY)


def assert_close(found, expected, rtol=1e-6):
    assert list(found) == list(expected)
    for name, each in found.items():
        assert each.dtype == torch.float32
        # Rounding is relative to the tensor's largest entry: single ones can cancel to nothing.
        np.testing.assert_allclose(oracle.array(each), expected[name], rtol=rtol, atol=rtol * np.max(expected[name]))


def test_empirical_fisher_equals_the_loop_over_samples():
    found = diagonal_fisher(model(), EXAMPLES, estimator="empirical")
    in_double = cases.tiny_llama(seed=3, hidden=8, vocabulary=VOCABULARY, dtype=torch.float64)
    assert_close(found, oracle.empirical_fisher(in_double, ROWS))


@pytest.mark.parametrize("build", cases.MODEL_CASES.values(), ids=cases.MODEL_CASES)
def test_empirical_fisher_of_every_kind_of_model_equals_the_loop(build):
    assert_close(
        diagonal_fisher(build(0), EXAMPLES, estimator="empirical"),
        oracle.empirical_fisher(build(0).eval(), ROWS),
        1e-5,
    )


@pytest.mark.parametrize(
    "batch_size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_gnb_approaches_the_exact_fisher_whatever_the_batch(batch_size):
    exact = oracle.exact_fisher(model(), ROWS)
    draws = []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        draws.append(oracle.arrays(diagonal_fisher(model(), EXAMPLES, batch_size=batch_size, generator=generator)))
    for name, expected in exact.items():
        sample = np.array([draw[name].mean() for draw in draws])
        error = sample.std(ddof=1) / np.sqrt(len(sample))
        assert error < 0.12 * expected.mean()  # fine enough to see a factor of two, let alone a batch size of three
        assert abs(sample.mean() - expected.mean()) < 4.5 * error  # one in 10^5 by chance, and the seeds are fixed
    means = {name: np.mean([draw[name] for draw in draws], axis=0) for name in exact}
    found, expected = (np.concatenate([values.ravel() for values in group.values()]) for group in (means, exact))
    assert np.corrcoef(found, expected)[0, 1] > 0.97


def test_gnb_repeats_with_the_same_seed():
    first, second, other = (
        diagonal_fisher(model(), EXAMPLES, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert cases.largest_difference(first, second) == 0.0
    assert cases.largest_difference(first, other) > 0.0


class _LargestLogSoftmax(TorchDispatchMode):
    """Records the largest result of a log-softmax."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "log_softmax" in str(func) and isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("estimator", ["gnb", "empirical"])
@pytest.mark.parametrize("targets", [1, 2])
def test_log_likelihoods_are_taken_a_chunk_at_a_time(estimator, targets, monkeypatch):
    monkeypatch.setattr(fisher, "_CHUNK_BYTES", targets * VOCABULARY * 4)
    with _LargestLogSoftmax() as seen:
        diagonal_fisher(model(), EXAMPLES, estimator=estimator)
    assert seen.elements == targets * VOCABULARY


@pytest.mark.parametrize("chunk_bytes", [1, 2 * VOCABULARY * 4])
def test_chunks_do_not_change_the_result(chunk_bytes, monkeypatch):
    in_double = cases.tiny_llama(seed=3, hidden=8, vocabulary=VOCABULARY, dtype=torch.float64)
    monkeypatch.setattr(fisher, "_CHUNK_BYTES", chunk_bytes)
    assert_close(diagonal_fisher(model(), EXAMPLES, estimator="empirical"), oracle.empirical_fisher(in_double, ROWS))


def test_the_slope_of_the_log_likelihood_is_that_of_autograd():
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[-100, 3, 1, -100, 2], [4, -100, -100, 6, -100]])
    log_probs = torch.log_softmax(logits, dim=-1)[labels != -100]
    (expected,) = torch.autograd.grad(log_probs.gather(-1, labels[labels != -100].unsqueeze(-1)).sum(), logits)
    found = fisher._log_likelihood_slope(  # noqa: SLF001 - chunks must not show in the gradient
        logits.detach(), labels, sampled=False, generator=None
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_padding_does_not_matter():
    short, long = EXAMPLES[1], EXAMPLES[0]
    filled = Example([*short.input_ids, 5, 5], [*short.labels, -100, -100])  # as long, with tokens that are no targets
    padded, unpadded = (
        diagonal_fisher(model(), rows, batch_size=2, generator=torch.Generator().manual_seed(0))
        for rows in ([short, long], [filled, long])
    )
    assert_close(padded, oracle.arrays(unpadded), 1e-5)


def test_only_targets_count():
    ids, labels = ROWS[0]
    first = [ids[0], *labels[1:]]  # a label of the first position has nothing to be predicted from
    plain, with_first = (
        diagonal_fisher(model(), [Example(ids, each)], estimator="empirical") for each in (labels, first)
    )
    assert cases.largest_difference(plain, with_first) == 0.0
    everything = diagonal_fisher(model(), [Example(ids, ids)], estimator="empirical")
    assert cases.largest_difference(plain, everything) > 0.0


def test_rows_without_a_target_do_not_dilute_the_mean():
    empty = Example([1, 2], [-100, -100])
    plain, diluted = (diagonal_fisher(model(), rows, estimator="empirical") for rows in (EXAMPLES, [*EXAMPLES, empty]))
    assert cases.largest_difference(plain, diluted) == 0.0


def test_a_tensor_gets_the_mean_of_its_elements():
    tensors, elements = (
        diagonal_fisher(model(), EXAMPLES, estimator="empirical", granularity=each) for each in ("tensor", "element")
    )
    assert_close(tensors, {name: oracle.array(each).mean() for name, each in elements.items()}, 1e-5)


@pytest.mark.parametrize("estimator", ["gnb", "empirical"])
@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_weights_of_the_model_are_left_alone(estimator, training):
    own = cases.frozen_llama(hidden=8, vocabulary=VOCABULARY, dropout=0.5).train(training)
    for each in cases.trainable(own).values():
        each.grad = torch.ones_like(each)
    before = cases.weights(own)
    found = diagonal_fisher(own, EXAMPLES, estimator=estimator)
    assert own.training is training
    assert list(found) == list(before)
    assert cases.largest_difference(cases.weights(own), before) == 0.0
    assert all(bool((each.grad == 1).all()) for each in cases.trainable(own).values())
    assert all(each.grad is None for each in own.parameters() if not each.requires_grad)


def test_dropout_is_off():
    with_dropout, without = (
        cases.tiny_llama(hidden=8, vocabulary=VOCABULARY, dropout=each).train() for each in (0.5, 0.0)
    )
    assert_close(
        diagonal_fisher(with_dropout, EXAMPLES, estimator="empirical"),
        oracle.arrays(diagonal_fisher(without, EXAMPLES, estimator="empirical")),
    )


def test_mode_is_restored_after_an_error():
    own = cases.tiny_llama(hidden=8, vocabulary=VOCABULARY).train()
    with pytest.raises(IndexError):
        diagonal_fisher(own, [Example([1, 99], [-100, 99])])
    assert own.training


def test_bf16_weights_give_float32_importance():
    own = cases.bf16_llama(hidden=8, vocabulary=VOCABULARY)
    found = diagonal_fisher(own, EXAMPLES, estimator="empirical")
    assert all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in found.values())


@pytest.mark.parametrize("rows", [[], [Example([1, 2, 3], [-100] * 3)], [Example([1, 2], [1, -100])]])
def test_no_target_at_all_is_an_error(rows):
    with pytest.raises(ValueError, match=r"No example has a target token"):
        diagonal_fisher(model(), rows)
