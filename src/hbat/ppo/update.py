"""The loss of a micro-batch, from the model's outputs and the rollout, and what to log about it."""

import torch
from torch import Tensor

from hbat.ppo.config import PPOConfig
from hbat.ppo.maths import masked_mean, policy_loss, value_loss
from hbat.ppo.rollouts.rollout import Rollout

APPROX_KL = "update/approx_kl"


def update_loss(
    outputs: tuple[Tensor, Tensor, Tensor], part: Rollout, count: Tensor, args: PPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a micro-batch's share of the mean loss over all tokens of its optimizer step.

    Args:
        outputs: Log-probabilities, entropies and values, shape `[rows, tokens]`, with gradients.
        part: The micro-batch.
        count: Tokens of the optimizer step, over its micro-batches and all processes.
        args: PPO's options.

    Returns:
        policy loss + `vf_coef` * value loss - `entropy_coef` * entropy, of shape `()`; and shares to log, which add up
        to the means over the optimizer step.
    """
    log_probs, entropies, values = outputs
    mask = part.completion_mask
    of_policy = masked_mean(policy_loss(log_probs, part.log_probs, part.advantages, args.cliprange), mask, count)
    of_critic = masked_mean(value_loss(values, part.values, part.returns, args.cliprange_value), mask, count)
    entropy = masked_mean(entropies, mask, count)
    loss = of_policy + args.vf_coef * of_critic - args.entropy_coef * entropy
    log_ratio = log_probs.detach() - part.log_probs
    ratio = torch.exp(log_ratio)
    return loss, {
        # The host's own mean forgets the steps between the last log entry and the checkpoint that is gone on from.
        "loss": loss.detach(),
        "loss/policy": of_policy.detach(),
        "loss/value": of_critic.detach(),
        **({"entropy": entropy.detach()} if args.entropy_coef > 0 else {}),
        APPROX_KL: masked_mean(ratio - 1.0 - log_ratio, mask, count),
        "update/ratio": masked_mean(ratio, mask, count),
        "update/clipped": masked_mean(((ratio - 1.0).abs() > args.cliprange).float(), mask, count),
    }
