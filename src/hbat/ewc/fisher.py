"""Diagonal Fisher information of a causal language model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hbat.engines.sharded import is_shared
from hbat.ewc.importance import tensor_means
from hbat.ewc.parameters import trainable_parameters

#: Label of positions without a target, as in the collators of transformers.
IGNORED = -100
#: Bytes of the float32 copy of target logits that is processed at a time.
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class Example:
    """One tokenized sequence, for `diagonal_fisher`.

    Attributes:
        input_ids: Token ids of prompt and completion.
        labels: The same ids at target positions and -100 elsewhere, of the same length.
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
    r"""Diagonal Fisher information at the current weights: $F_i = E_s[(\partial \ell_s / \partial \theta_i)^2]$.

    $\ell_s(\theta) = \sum_t \log p_\theta(y_t \mid x, y_{<t})$ is the log-likelihood of sequence s, summed (not
    averaged) over its target tokens. The expectation is a mean over sequences of squares, never the square of a mean
    gradient, which is too small by the batch size and ranks parameters wrongly. The importance of arXiv:1612.00796.

    `gnb` (Gauss-Newton-Bartlett, arXiv:2305.14342) samples the target tokens from the model: gradients of sequences
    are then independent with mean zero, so that the squared gradient of a batch's *sum* is an unbiased estimate of
    the sum of squares, at one backward pass per batch. `empirical` takes the data's own tokens, at one backward pass
    per sequence; it differs from the Fisher by a factor that varies during training.

    The model runs in evaluation mode and returns to its former mode. If processes share its parameters, all have to
    pass the same examples and equally seeded generators.

    Args:
        model: Called as `model(input_ids=..., attention_mask=...)`; its output has `logits`.
        examples: Tokenized sequences. Those without a target token do not count.
        estimator: `gnb` or `empirical`.
        granularity: `element`, or `tensor` for the mean over each tensor's elements.
        batch_size: Sequences per backward pass of `gnb`.
        generator: Source of the sampled labels, on the CPU; default: torch's global one.

    Returns:
        Raw importance of the trainable parameters by name, in float32, of the parameter's shape or of shape `()`.

    Raises:
        ValueError: If no example has a target token.
    """
    parameters = trainable_parameters(model)
    usable = [example for example in examples if any(label != IGNORED for label in example.labels[1:])]
    if not usable:
        raise ValueError("No example has a target token, so there is no log-likelihood to differentiate.")
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        size = batch_size if estimator == "gnb" else 1
        for start in range(0, len(usable), size):
            logits, labels = _run(model, usable[start : start + size])
            slope = _log_likelihood_slope(logits.detach(), labels, sampled=estimator == "gnb", generator=generator)
            gradients = _gradients(logits, slope, list(parameters.values()))
            for squares, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    squares.add_(gradient.float().square_())
    finally:
        model.train(was_training)
    for squares in total.values():
        squares.div_(len(usable))
    if granularity == "element":
        return total
    means = tensor_means(total).float()
    return {name: mean.to(squares.device) for (name, squares), mean in zip(total.items(), means, strict=True)}


def _gradients(logits: Tensor, slope: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not any(map(is_shared, parameters)):
        return list(torch.autograd.grad(logits, parameters, slope, allow_unused=True))
    # Sharded parameters get gradients in `.grad` only, averaged over processes, which all run the same batch here.
    logits.backward(slope)
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _run(model: nn.Module, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    longest = max(len(example.input_ids) for example in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, T); padding is masked out, so any id does
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    logits: Tensor = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
    labels = torch.cat([labels[:, 1:], torch.full((len(batch), 1), IGNORED)], dim=1)  # of the token that follows
    return logits, labels.to(device)  # (B, T, V), (B, T)


def _log_likelihood_slope(
    logits: Tensor, labels: Tensor, *, sampled: bool, generator: torch.Generator | None
) -> Tensor:
    # d(sum of log-likelihoods) / d(logits), in chunks: in one graph, the float32 copies of all targets' logits would
    # live until the end of the backward pass.
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
