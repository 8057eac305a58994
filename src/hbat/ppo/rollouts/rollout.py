"""A rollout: prompts, sampled completions, and what each token is worth."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hbat.ppo.maths import advantages_and_returns, kl_terms, token_rewards, whiten
from hbat.state.files import write_tensors


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their completions.

    Attributes:
        prompt_ids: Padded on the left, shape `[rows, prompt length]`.
        prompt_mask: 1 for tokens, 0 for padding; of the same shape.
        completion_ids: Padded on the right, shape `[rows, completion length]`.
        completion_mask: Booleans of the same shape.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    def select(self, rows: Tensor) -> "Sequences":
        """Take some rows, without the columns that are padding in all of them.

        Args:
            rows: Row numbers.

        Returns:
            The rows.
        """
        rows = rows.to(self.prompt_ids.device)
        prompt_mask, completion_mask = self.prompt_mask[rows], self.completion_mask[rows]
        first = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        last = int(completion_mask.sum(1).max())
        return Sequences(
            prompt_ids=self.prompt_ids[rows, first:],
            prompt_mask=prompt_mask[:, first:],
            completion_ids=self.completion_ids[rows, :last],
            completion_mask=completion_mask[:, :last],
        )

    @property
    def input_ids(self) -> Tensor:
        """Prompts and completions side by side."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """1 for tokens, 0 for padding on either side."""
        return torch.cat([self.prompt_mask, self.completion_mask.to(self.prompt_mask.dtype)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Rollout(Sequences):
    """Sequences with what the updates need. All further tensors are float32 of shape `[rows, completion length]`.

    Attributes:
        log_probs: Log-probabilities of the tokens under the policy that sampled them.
        values: The critic's estimates before each token.
        advantages: Advantage of each token.
        returns: What the critic should have estimated.
    """

    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Rollout":
        """Take some rows, without the columns that are padding in all of them.

        Args:
            rows: Row numbers.

        Returns:
            The rows.
        """
        part = super().select(rows)
        rows, last = rows.to(self.values.device), part.completion_ids.shape[1]
        return Rollout(
            **{each.name: getattr(part, each.name) for each in fields(Sequences)},
            log_probs=self.log_probs[rows, :last],
            values=self.values[rows, :last],
            advantages=self.advantages[rows, :last],
            returns=self.returns[rows, :last],
        )

    def save(self, file: Path) -> None:
        """Write the rollout to disk.

        Args:
            file: A safetensors file.
        """
        write_tensors(file, {each.name: getattr(self, each.name).cpu() for each in fields(self)})

    @classmethod
    def load(cls, file: Path, device: Any) -> "Rollout":
        """Read a rollout from disk.

        Args:
            file: A safetensors file.
            device: Where the tensors shall lie.

        Returns:
            The rollout.
        """
        # Not loaded there at once: several processes on a CPU have devices such as `cpu:1`, which safetensors refuses.
        return cls(**{name: each.to(device) for name, each in load_file(file).items()})


def assess(
    sequences: Sequences,
    statistics: Mapping[str, Tensor],
    scores: Tensor,
    config: Any,
    kl_coef: float,
    total: Callable[[Tensor], Tensor],
) -> tuple[Rollout, Tensor]:
    """Turn scores into advantages and returns.

    Args:
        sequences: Prompts with their completions.
        statistics: `log_probs`, `reference` and `values` of the completions' tokens.
        scores: One score a completion.
        config: The `PPOConfig`.
        kl_coef: Weight of the KL penalty.
        total: Sums a tensor over all processes.

    Returns:
        The rollout, and the KL terms of its tokens, zero outside the mask.
    """
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
        **{each.name: getattr(sequences, each.name) for each in fields(Sequences)},
        # Of a padding token that the model rules out it is -inf, and the slope of the ratio would be NaN.
        log_probs=torch.where(mask, statistics["log_probs"], 0.0),
        values=values,
        advantages=advantages,
        returns=returns,
    )
    return rollout, kl
