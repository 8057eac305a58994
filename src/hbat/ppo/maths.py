"""The terms of PPO's loss and of its KL penalty, per token. Tensors in, tensors out."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]


def kl_terms(log_probs: Tensor, reference: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    r"""Estimate $KL(\pi \| \pi_{ref})$ from tokens that the policy sampled (Schulman, "Approximating KL Divergence").

    With $r = \pi_{ref} / \pi$: `k1` is $-\log r$, unbiased and of any sign; `k3` is $r - 1 - \log r$, unbiased, never
    negative and of smaller variance.

    Args:
        log_probs: The policy's log-probabilities of the tokens.
        reference: The reference's, of the same shape.
        estimator: `k1` or `k3`.

    Returns:
        One term a token, of the same shape.
    """
    log_ratio = reference - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    r"""Clipped surrogate (Schulman et al., arXiv 1707.06347): $\max(-A \rho, -A\, clip(\rho, 1 - c, 1 + c))$.

    Args:
        log_probs: Log-probabilities under the policy as it is; carries gradients.
        old_log_probs: Those under the policy that sampled, of the same shape.
        advantages: Of the same shape.
        clip_range: c.

    Returns:
        One term a token, of the same shape, with $\rho$ = exp(log_probs - old_log_probs).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    r"""Clipped value loss: $\frac12 \max((V - R)^2, (V_c - R)^2)$ with $V_c$ at most c away from the old estimate.

    Args:
        values: Estimates as they are; carries gradients.
        old_values: Estimates at the rollout, of the same shape.
        returns: Of the same shape.
        clip_range: c.

    Returns:
        One term a token, of the same shape.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """Move the KL coefficient so that the KL approaches its target (Ziegler et al., arXiv 1909.08593, section 2.2).

    Args:
        kl_coef: The coefficient.
        kl: KL of the last rollout's completions, summed over tokens.
        target: What it should be.
        horizon: Samples over which a relative error of one is made up for.
        samples: Samples of the last rollout.

    Returns:
        `kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)`, never negative.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return max(kl_coef * (1.0 + error * samples / horizon), 0.0)


_EPSILON = 1e-8  # of the variance, as in TRL


def _alone(total: Tensor) -> Tensor:
    return total


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean over the elements that count.

    Args:
        values: Of any shape; what lies outside the mask is not looked at, NaN neither.
        mask: Booleans of the same shape.
        count: What to divide the sum by; the number of elements in the mask where left out (at least 1).

    Returns:
        A tensor of shape `()`.
    """
    total = torch.where(mask, values, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if count is None else count)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of every token: minus the weighted KL term, and at a completion's last token its score.

    Args:
        scores: One score a completion, shape `[rows]`.
        kl: KL terms, shape `[rows, tokens]`.
        mask: Tokens of the completions, padded on the right, shape `[rows, tokens]`; each row has one at least.
        kl_coef: Weight of the KL terms.

    Returns:
        Rewards, shape `[rows, tokens]`, zero outside the mask.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, total: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Bring the masked values to unit variance (unbiased, n - 1) and, with `shift_mean`, to mean zero.

    Args:
        values: Of any shape.
        mask: Booleans of the same shape.
        shift_mean: Whether the mean becomes zero; otherwise it stays what it is.
        total: Sums a tensor over all processes.

    Returns:
        Whitened values, zero outside the mask. Unchanged where the mask has fewer than two elements.
    """
    count = total(mask.sum().to(values.dtype))
    mean = total(torch.where(mask, values, 0.0).sum()) / count.clamp(min=1)
    centred = torch.where(mask, values - mean, 0.0)
    if count < 2:  # noqa: PLR2004 - a variance needs two
        return torch.where(mask, values, 0.0)
    variance = total(centred.square().sum()) / (count - 1)
    white = centred * torch.rsqrt(variance + _EPSILON)
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438), each completion an episode.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$, $A_t = \delta_t + \gamma \lambda A_{t+1}$, $R_t = A_t + V_t$, with
    $V = A = 0$ beyond the last token.

    Args:
        rewards: Shape `[rows, tokens]`.
        values: Estimates before each token, shape `[rows, tokens]`.
        mask: Tokens of the completions, padded on the right.
        gamma: Discount a token.
        lam: Decay of the advantages a token.

    Returns:
        Advantages and returns, zero outside the mask.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    ahead = next_value = values.new_zeros(values.shape[0])
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        ahead = torch.where(mask[:, step], delta + gamma * lam * ahead, 0.0)
        advantages[:, step] = ahead
        next_value = values[:, step]
    return advantages, advantages + values


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic explains: `1 - Var(R - V) / Var(R)`.

    Args:
        values: The critic's estimates.
        returns: What they estimate, of the same shape.
        mask: Booleans of the same shape.

    Returns:
        At most 1, of shape `()`; 0 where the returns do not vary.
    """
    if int(mask.sum()) < 2:  # noqa: PLR2004 - a variance needs two
        return values.new_zeros(())
    spread = returns[mask].var()
    smallest = torch.finfo(spread.dtype).tiny
    return torch.where(spread > 0, 1.0 - (returns - values)[mask].var() / spread.clamp(min=smallest), 0.0)
