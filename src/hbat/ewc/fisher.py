r"""Diagonal Fisher information of a causal language model.

With $\ell_s(\theta) = \sum_t \log p_\theta(y_t \mid x, y_{<t})$ the log-likelihood of one sequence, summed (not
averaged) over its target tokens, the result is $\mathbb{E}_s[(\partial \ell_s / \partial \theta_i)^2]$: a mean over
sequences of squares, never the square of a mean gradient, which is too small by the batch size and ranks parameters
wrongly.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hbat.engines.sharded import is_shared
from hbat.ewc.importance import tensor_means
from hbat.ewc.parameters import trainable_parameters

#: Label of positions that are no target, as the host's collators set it.
IGNORED = -100


#: Size of the float32 copy of target logits that is worked on at a time.
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Example:
    """One tokenised sequence.

    Attributes:
        input_ids: Token ids of prompt and answer.
        labels: The same ids at target positions and -100 elsewhere.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]


def diagonal_fisher(
    model: nn.Module,
    examples: Iterable[Example],
    *,
    estimator: str = "gnb",
    granularity: str = "element",
    batch_size: int = 8,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Estimate the diagonal Fisher at the model's present weights.

    `gnb` (Gauss-Newton-Bartlett) draws the target tokens from the model: per-sequence gradients are then independent
    with mean zero, so the squared gradient of a batch's *sum* is unbiased for the sum of squares, with one backward
    pass a batch. `empirical` uses the data's own tokens with one backward pass a sequence; it differs from the Fisher
    by a factor that varies in training. The model runs in evaluation mode and is left in the mode it was in. Where
    processes share its parameters, each has to give the same examples and an equal generator.

    Args:
        model: Called as `model(input_ids=..., attention_mask=...)` with an output that has `logits`.
        examples: Tokenised sequences.
        estimator: `gnb` or `empirical`.
        granularity: `element`, or `tensor` for the mean over each tensor's elements.
        batch_size: Sequences in a backward pass of `gnb`.
        generator: Source of the sampled labels, on the CPU.

    Returns:
        Raw importance of the trainable parameters by name, in float32.

    Raises:
        ValueError: If there is no example with a target token.
    """
    parameters = trainable_parameters(model)
    usable = [each for each in examples if any(label != IGNORED for label in each.labels[1:])]
    if not usable:
        raise ValueError("No example has a target token, so there is no log-likelihood to take the Fisher of.")
    total = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(usable, batch_size if estimator == "gnb" else 1):
            logits, labels = _run(model, batch)
            slope = _log_likelihood_slope(logits.detach(), labels, sampled=estimator == "gnb", generator=generator)
            gradients = _gradients(logits, slope, list(parameters.values()))
            for each, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    each.add_(gradient.float().square_())
    finally:
        model.train(was_training)
    for each in total.values():
        each.div_(len(usable))
    if granularity == "element":
        return total
    means = tensor_means(total).float()
    return {name: mean.to(each.device) for (name, each), mean in zip(total.items(), means, strict=True)}


def _gradients(logits: Tensor, slope: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not any(map(is_shared, parameters)):
        return list(torch.autograd.grad(logits, parameters, slope, allow_unused=True))
    # FSDP2 brings gradients to `.grad` alone, as their mean over the processes, which all run the same batch here.
    logits.backward(slope)
    gradients = [each.grad for each in parameters]
    for each in parameters:
        each.grad = None
    return gradients


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _run(model: nn.Module, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    longest = max(len(each.input_ids) for each in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding is masked out, so any id does
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, each in enumerate(batch):
        length = len(each.input_ids)
        input_ids[row, :length] = torch.tensor(each.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(each.labels)
    logits: Tensor = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
    labels = torch.cat([labels[:, 1:], torch.full((len(batch), 1), IGNORED)], dim=1)  # of the token that follows
    return logits, labels.to(device)  # (B, T, V), (B, T)


def _log_likelihood_slope(
    logits: Tensor, labels: Tensor, *, sampled: bool, generator: torch.Generator | None
) -> Tensor:
    # d(sum of log-likelihoods) / d(logits), chunk by chunk: through autograd as a whole, the float32 copies of all
    # targets' logits would live until the end of the backward pass.
    vocabulary = logits.shape[-1]
    flat_logits, flat_labels = logits.reshape(-1, vocabulary), labels.reshape(-1)
    slope = torch.zeros_like(flat_logits)
    targets = (flat_labels != IGNORED).nonzero().squeeze(-1)
    for chunk in targets.split(max(1, _CHUNK_BYTES // (4 * vocabulary))):
        own = flat_logits[chunk].float().requires_grad_()  # (targets, V)
        chosen = _sample(own, generator) if sampled else flat_labels[chunk]
        log_likelihood = -nn.functional.cross_entropy(own, chosen, reduction="sum")
        slope[chunk] = torch.autograd.grad(log_likelihood, own)[0].to(slope.dtype)
    return slope.view(logits.shape)


@torch.no_grad()
def _sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    # On the CPU, so that a seed gives the same labels on every device.
    probabilities = torch.softmax(logits, dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1).to(logits.device)
