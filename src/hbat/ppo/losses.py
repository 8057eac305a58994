"""The terms of PPO's loss and of its KL penalty, per token. Tensors in, tensors out."""

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
