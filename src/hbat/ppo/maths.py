"""PPO's formulas, in torch alone. Tensors have shape `[rows, tokens]` unless said otherwise."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]

_EPSILON = 1e-8  # added to variances, as in TRL


def kl_terms(log_probs: Tensor, reference: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    r"""Estimate $KL(\pi \| \pi_{ref})$ from sampled tokens (Schulman, "Approximating KL Divergence").

    With $r = \pi_{ref} / \pi$, `k1` is $-\log r$: unbiased, of either sign. `k3` is $r - 1 - \log r$: unbiased, never
    negative, of smaller variance.

    Returns:
        One term per token.
    """
    log_ratio = reference - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    r"""Adapt the KL coefficient to the KL per completion (Ziegler et al., arXiv 1909.08593, section 2.2).

    Returns:
        $\beta (1 + clip(KL / target - 1, -0.2, 0.2) \cdot samples / horizon)$, never negative.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return max(kl_coef * (1.0 + error * samples / horizon), 0.0)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    r"""Reward per token: $r_t = -\beta KL_t$, plus the completion's score at its last token.

    `scores` has shape `[rows]`; completions are padded on the right and have at least one token.

    Returns:
        Rewards, 0 outside the mask.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation (Schulman et al., arXiv 1506.02438); each completion is an episode.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$, $A_t = \delta_t + \gamma \lambda A_{t+1}$, $R_t = A_t + V_t$, with
    $V = A = 0$ after the last token. `values` are estimated before each token.

    Returns:
        Advantages and returns, 0 outside the mask.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = values.new_zeros(values.shape[0])
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        next_advantage = torch.where(mask[:, step], delta + gamma * lam * next_advantage, 0.0)
        advantages[:, step] = next_advantage
        next_value = values[:, step]
    return advantages, advantages + values


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    r"""Clipped surrogate (Schulman et al., arXiv 1707.06347, equation 7), negated: a loss.

    Returns:
        $\max(-A \rho, -A\, clip(\rho, 1 - c, 1 + c))$ per token, with $\rho = \pi / \pi_{old}$.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    r"""Clipped value loss.

    Returns:
        $\frac12 \max((V - R)^2, (V_c - R)^2)$ per token, with $V_c = V_{old} + clip(V - V_{old}, -c, c)$.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    r"""$\sum_{mask} x / n$, with $n$ = `count` or the size of the mask (at least 1); NaN outside is ignored."""
    total = torch.where(mask, values, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if count is None else count)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, total: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    r"""Whiten: $(x - \bar x) / \sqrt{s^2 + \epsilon}$, with the unbiased variance $s^2$ (n - 1) over the mask.

    `total` sums a tensor over all processes. Without `shift_mean`, $\bar x$ is added back.

    Returns:
        Whitened values, 0 outside the mask; unchanged if the mask has fewer than two elements.
    """
    count = total(mask.sum().to(values.dtype))
    mean = total(torch.where(mask, values, 0.0).sum()) / count.clamp(min=1)
    centered = torch.where(mask, values - mean, 0.0)
    if count < 2:  # noqa: PLR2004 - a variance needs two
        return torch.where(mask, values, 0.0)
    variance = total(centered.square().sum()) / (count - 1)
    white = centered * torch.rsqrt(variance + _EPSILON)
    return white if shift_mean else torch.where(mask, white + mean, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic explains.

    Returns:
        $1 - Var(R - V) / Var(R)$, a scalar tensor; 0 if the returns do not vary.
    """
    if int(mask.sum()) < 2:  # noqa: PLR2004 - a variance needs two
        return values.new_zeros(())
    spread = returns[mask].var()
    smallest = torch.finfo(spread.dtype).tiny
    return torch.where(spread > 0, 1.0 - (returns - values)[mask].var() / spread.clamp(min=smallest), 0.0)
