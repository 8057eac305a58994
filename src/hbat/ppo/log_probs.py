"""Log-probabilities and entropies of given tokens, without the logits of a whole batch in memory."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Logits that may lie in memory at once, in elements: 64 MiB in float32. Beyond it, parts are computed one after the
#: other and once more in the backward pass.
MOST_LOGITS = 2**24


def token_statistics(
    hidden: Tensor,
    tokens: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = True,
    most_logits: int = MOST_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each token and the entropy of the distribution that it was drawn from.

    Args:
        hidden: Hidden states before each token, shape `[rows, tokens, width]`.
        tokens: Token ids, shape `[rows, tokens]`.
        head: From hidden states `[n, width]` to logits `[n, vocabulary]`.
        vocabulary: Number of logits a token, which sets the size of a part.
        temperature: Divides the logits.
        with_entropy: Whether entropies are computed; zeros otherwise.
        most_logits: Logits in memory at once, in elements.

    Returns:
        Log-probabilities and entropies in nats, float32, shape `[rows, tokens]`.
    """
    shape, flat, ids = tokens.shape, hidden.flatten(0, 1), tokens.flatten()

    def part(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        return _statistics(logits if temperature == 1.0 else logits / temperature, targets, with_entropy=with_entropy)

    size = max(most_logits // vocabulary, 1)
    if flat.shape[0] <= size:
        log_probs, entropies = part(flat, ids)
        return log_probs.view(shape), entropies.view(shape)
    parts = [
        cast("tuple[Tensor, Tensor]", checkpoint(part, states, targets, use_reentrant=False))
        if torch.is_grad_enabled()
        else part(states, targets)
        for states, targets in zip(flat.split(size), ids.split(size), strict=True)
    ]
    return torch.cat([each[0] for each in parts]).view(shape), torch.cat([each[1] for each in parts]).view(shape)


def _statistics(logits: Tensor, targets: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    norm = torch.logsumexp(logits, dim=-1)
    if not with_entropy:
        return chosen - norm, torch.zeros_like(norm)
    probabilities = torch.exp(logits - norm.unsqueeze(-1))
    # H = log Z - sum p z. A logit of -inf has probability 0 and adds nothing; it must not enter the product, whose
    # slope would be NaN.
    expected = (probabilities * torch.where(probabilities > 0, logits, 0.0)).sum(-1)
    return chosen - norm, norm - expected
