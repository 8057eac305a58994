"""A rollout: prompts, sampled completions, and the advantage and return of each token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from hbat.ppo.maths import advantages_and_returns, kl_terms, token_rewards, whiten
from hbat.state.files import write_tensors


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their completions."""

    prompt_ids: Tensor  # padded on the left, [rows, prompt length]
    prompt_mask: Tensor  # 1 on tokens, 0 on padding
    completion_ids: Tensor  # padded on the right, [rows, completion length]
    completion_mask: Tensor  # booleans

    def select(self, rows: Tensor) -> Self:
        """Some rows, without the columns that are padding in all of them."""
        rows = rows.to(self.prompt_ids.device)
        first = self.prompt_mask.shape[1] - int(self.prompt_mask[rows].sum(1).max())
        last = int(self.completion_mask[rows].sum(1).max())
        return type(self)(**{
            name: tensor[rows, first:] if name.startswith("prompt_") else tensor[rows, :last]
            for name, tensor in vars(self).items()
        })

    @property
    def input_ids(self) -> Tensor:
        """Prompts and completions side by side."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """1 on tokens, 0 on padding on either side."""
        return torch.cat([self.prompt_mask, self.completion_mask.to(self.prompt_mask.dtype)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Rollout(Sequences):
    """Sequences with what the updates need, float32, of shape `[rows, completion length]`."""

    log_probs: Tensor  # under the policy that sampled
    values: Tensor  # the critic's estimates before each token
    advantages: Tensor
    returns: Tensor

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        write_tensors(file, {name: tensor.cpu() for name, tensor in vars(self).items()})

    @classmethod
    def load(cls, file: Path, device: Any) -> "Rollout":
        """Read a safetensors file."""
        # Through the CPU: several processes on a CPU have devices such as `cpu:1`, which safetensors refuses.
        return cls(**{name: tensor.to(device) for name, tensor in load_file(file).items()})


def assess(
    sequences: Sequences,
    statistics: Mapping[str, Tensor],  # `log_probs`, `reference` and `values` of the completions' tokens
    scores: Tensor,
    config: Any,  # the `PPOConfig`
    kl_coef: float,
    total: Callable[[Tensor], Tensor],  # sums a tensor over all processes
) -> tuple[Rollout, Tensor]:
    """Turn one score per completion into advantages and returns; also the KL terms of the tokens."""
    mask = sequences.completion_mask
    terms = kl_terms(statistics["log_probs"], statistics["reference"], config.kl_estimator)
    kl = torch.where(mask, terms, 0.0)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, total=total)
    values = torch.where(mask, statistics["values"], 0.0)
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, total=total)
    rollout = Rollout(
        **vars(sequences),
        # On a padding token that the model rules out it is -inf, and the gradient of the ratio would be NaN.
        log_probs=torch.where(mask, statistics["log_probs"], 0.0),
        values=values,
        advantages=advantages,
        returns=returns,
    )
    return rollout, kl
