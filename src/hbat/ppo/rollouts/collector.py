"""Making a rollout: sample completions, have them scored, and work out what each token is worth."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbat.ppo.config import PPOConfig
from hbat.ppo.maths import explained_variance
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic
from hbat.ppo.networks.reference import Reference
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.generation import Completions, CompletionSampler
from hbat.ppo.rollouts.prompts import TOKENS, pad_left
from hbat.ppo.rollouts.rollout import Rollout, Sequences, assess


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions with their scores.

    Attributes:
        completions: The completions.
        scores: One a completion, float32 on the CPU.
        by_name: What each reward gave, NaN where it did not apply.
    """

    completions: Completions
    scores: Tensor
    by_name: Mapping[str, Tensor]

    def entries(self) -> dict[str, Tensor]:
        """List what is to be logged.

        Returns:
            One number a completion, by name.
        """
        return {
            "reward": self.scores,
            **{f"rewards/{name}": each for name, each in self.by_name.items()},
            "completions/mean_length": torch.tensor([float(len(each)) for each in self.completions.tokens]),
            "completions/ended": torch.tensor([float(each) for each in self.completions.ended]),
        }


def means(
    entries: Mapping[str, Tensor], total: Callable[[Tensor], Tensor], device: torch.device | str
) -> dict[str, float]:
    """Take means over the completions of all processes.

    Args:
        entries: One number a completion, by name; NaN counts for nothing. Every process has the same names.
        total: Sums a tensor over all processes.
        device: Where tensors that are summed over processes must lie.

    Returns:
        Means by name, and the standard deviation of `reward` as `reward_std`.
    """
    sums = torch.stack([
        torch.stack([each.nansum(), each.nan_to_num().square().sum(), (~each.isnan()).sum().to(each.dtype)])
        for each in (entry.detach().double().cpu() for entry in entries.values())
    ])
    # Accelerators without float64 exist, but not among those that several processes train on.
    added, squared, counts = total(sums.to(device)).cpu().unbind(1)
    average = added / counts.clamp(min=1)
    found = dict(zip(entries, average.tolist(), strict=True))
    if "reward" in found:
        index = list(entries).index("reward")
        variance = float(squared[index] / counts[index].clamp(min=1) - average[index] ** 2)
        found["reward_std"] = math.sqrt(max(variance, 0.0))
    return found


#: Columns of a row that reward functions do not get.
_OWN_COLUMNS = {"prompt", TOKENS}


class RolloutCollector:
    """Makes rollouts.

    Args:
        model: Policy and critic.
        reference: The reference policy; None without KL penalty.
        rewards: The reward functions.
        sampler: Samples completions from the policy.
        tokenizer: The policy's tokenizer.
        args: PPO's options.
        accelerator: The trainer's accelerator.
    """

    def __init__(
        self,
        model: PolicyAndCritic,
        reference: Reference | None,
        rewards: Rewards,
        sampler: CompletionSampler,
        tokenizer: Any,
        args: PPOConfig,
        accelerator: Any,
    ) -> None:
        self._model = model
        self._reference = reference
        self._rewards = rewards
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._args = args
        self._accelerator = accelerator
        self._seconds: dict[str, float] = {}

    def collect(
        self, rows: Sequence[Mapping[str, Any]], *, seed: int, kl_coef: float, trainer_state: Any
    ) -> tuple[Rollout, dict[str, float]]:
        """Make a rollout.

        Args:
            rows: Tokenised prompts with their other columns.
            seed: Seed of the sampling.
            kl_coef: Weight of the KL penalty.
            trainer_state: State of training, for the reward functions.

        Returns:
            The rollout, and what to log about it, over all processes.
        """
        self._seconds = {}
        scored = self.score(rows, seed=seed, trainer_state=trainer_state)
        completions, scores = scored.completions, scored.scores
        sequences = self._sequences(rows, completions)
        if self._args.missing_eos_penalty is not None:
            scores = scores - self._args.missing_eos_penalty * (~torch.tensor(completions.ended)).float()
        with self._timed("scoring"):
            statistics = self._statistics(sequences)
        device = sequences.prompt_ids.device
        rollout, kl = assess(sequences, statistics, scores.to(device), self._args, kl_coef, self.total)
        entries = scored.entries() | {"kl": kl.sum(1)}
        if self._args.entropy_coef == 0:
            mask = sequences.completion_mask
            entries["entropy"] = torch.where(mask, statistics["entropies"], 0.0).sum(1) / mask.sum(1)
        metrics = means(entries, self.total, self._accelerator.device)
        metrics |= {
            "kl_coef": kl_coef,
            "values/explained_variance": float(
                explained_variance(rollout.values, rollout.returns, rollout.completion_mask)
            ),
        }
        return rollout, metrics | {f"seconds/{name}": value for name, value in self._seconds.items()}

    def score(self, rows: Sequence[Mapping[str, Any]], *, seed: int | None, trainer_state: Any) -> ScoredCompletions:
        """Complete prompts and have the completions scored.

        Args:
            rows: Tokenised prompts with their other columns.
            seed: Seed of the sampling; None takes the likeliest tokens.
            trainer_state: State of training, for the reward functions.

        Returns:
            Completions and scores.
        """
        with self._timed("generation"), self._accelerator.autocast():
            completions = self._sampler.sample([row[TOKENS] for row in rows], seed=seed)
        with self._timed("rewards"):
            scores, by_name = self._rewards(
                [row["prompt"] for row in rows],
                self._texts(rows, completions),
                completion_ids=completions.tokens,
                columns={key: [row[key] for row in rows] for key in rows[0] if key not in _OWN_COLUMNS},
                trainer_state=trainer_state,
            )
        return ScoredCompletions(completions, scores, by_name)

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes.

        Args:
            value: This process's.

        Returns:
            The sum.
        """
        if self._accelerator.num_processes == 1:
            return value
        summed: Tensor = self._accelerator.reduce(value, reduction="sum")
        return summed

    def _texts(self, rows: Sequence[Mapping[str, Any]], completions: Completions) -> list[Any]:
        texts = self._tokenizer.batch_decode(completions.tokens, skip_special_tokens=True)
        if isinstance(rows[0]["prompt"], str):
            return list(texts)
        return [[{"role": "assistant", "content": each}] for each in texts]

    def _sequences(self, rows: Sequence[Mapping[str, Any]], completions: Completions) -> Sequences:
        device, pad = self._model.device, self._tokenizer.pad_token_id
        prompt_ids, prompt_mask = pad_left([row[TOKENS] for row in rows], pad, device)
        longest = max(map(len, completions.tokens))
        padded = [each + [pad] * (longest - len(each)) for each in completions.tokens]
        lengths = torch.tensor([len(each) for each in completions.tokens], device=device)
        return Sequences(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=torch.tensor(padded, device=device),
            completion_mask=torch.arange(longest, device=device) < lengths.unsqueeze(1),
        )

    @torch.no_grad()
    def _statistics(self, sequences: Sequences) -> dict[str, Tensor]:
        shape = sequences.completion_ids.shape
        names = ("log_probs", "reference", "values", "entropies")
        found = {name: torch.zeros(shape, device=self._model.device) for name in names}
        # Without a bonus the entropy is only logged: once a rollout is enough, as it costs another look at all logits.
        with_entropy = self._args.entropy_coef == 0
        # Rows of like length together, so that less is computed on padding.
        order = sequences.attention_mask.sum(1).argsort(stable=True)
        was_training = self._model.training
        self._model.eval()
        for rows in order.split(self._args.scoring_batch_size or self._args.per_device_train_batch_size):
            part = sequences.select(rows)
            tokens = part.completion_ids.shape[1]
            log_probs, entropies, values = self._model(
                part.input_ids, part.attention_mask, tokens, self._args.temperature, with_entropy=with_entropy
            )
            reference = log_probs
            if self._reference is not None:
                with self._accelerator.autocast():
                    reference = self._reference.log_probs(part, self._args.temperature)
            for name, each in zip(names, (log_probs, reference, values, entropies), strict=True):
                found[name][rows, :tokens] = each
        self._model.train(was_training)
        return found

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - begun
