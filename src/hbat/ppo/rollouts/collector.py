"""Makes rollouts (sample completions, score them, compute advantages) and evaluates the policy."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from hbat.ppo.config import PPOConfig
from hbat.ppo.maths import explained_variance
from hbat.ppo.networks.policy_and_critic import PolicyAndCritic
from hbat.ppo.networks.reference import Reference
from hbat.ppo.networks.token_model import evaluating
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.generation import Completions, CompletionSampler
from hbat.ppo.rollouts.prompts import TOKENS, padded
from hbat.ppo.rollouts.rollout import Rollout, Sequences, assess


def _means(
    entries: Mapping[str, Tensor], total: Callable[[Tensor], Tensor], device: torch.device | str
) -> dict[str, float]:
    # Means over the completions of all processes without NaN, and the standard deviation of `reward`.
    names = list(dict.fromkeys(gather_object(list(entries))))  # a reward need not log the same on all of them
    sums = torch.stack([
        torch.stack([values.nansum(), values.nan_to_num().square().sum(), (~values.isnan()).sum().to(values.dtype)])
        for values in (entries.get(name, torch.zeros(0)).detach().double().cpu() for name in names)
    ])
    # Accelerators without float64 exist, but not among those that several processes train on.
    added, squared, counts = total(sums.to(device)).cpu().unbind(1)
    average = added / counts.clamp(min=1)
    found = dict(zip(names, average.tolist(), strict=True))
    index = names.index("reward")
    variance = float(squared[index] / counts[index].clamp(min=1) - average[index] ** 2)
    return found | {"reward_std": math.sqrt(max(variance, 0.0))}


@dataclass
class RolloutCollector:
    """Makes rollouts of a policy."""

    model: PolicyAndCritic
    reference: Reference | None  # None without a KL penalty
    rewards: Rewards
    sampler: CompletionSampler
    tokenizer: Any
    args: PPOConfig
    accelerator: Any
    _seconds: dict[str, float] = field(default_factory=dict, init=False)

    def collect(
        self, rows: Sequence[Mapping[str, Any]], *, seed: int, kl_coef: float, trainer_state: Any
    ) -> tuple[Rollout, dict[str, float]]:
        """Make a rollout from tokenized prompts; also what to log about it, over all processes."""
        self._seconds = {}
        completions, entries = self._score(rows, seed=seed, trainer_state=trainer_state)
        scores, sequences = entries["reward"], self._sequences(rows, completions)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * (~torch.tensor(completions.ended)).float()
        with self._timed("scoring"):
            statistics = self._statistics(sequences)
        device = sequences.prompt_ids.device
        rollout, kl = assess(sequences, statistics, scores.to(device), self.args, kl_coef, self.total)
        entries["kl"] = kl.sum(1)
        if self.args.entropy_coef == 0:
            mask = sequences.completion_mask
            entries["entropy"] = torch.where(mask, statistics["entropies"], 0.0).sum(1) / mask.sum(1)
        metrics = _means(entries, self.total, self.accelerator.device)
        variance = explained_variance(rollout.values, rollout.returns, rollout.completion_mask)
        metrics |= {"kl_coef": kl_coef, "values/explained_variance": float(variance)}
        return rollout, metrics | {f"seconds/{name}": value for name, value in self._seconds.items()}

    def evaluate(self, prompts: Dataset, trainer_state: Any, after_batch: Callable[[], object]) -> dict[str, float]:
        """Means over the greedy completions of all prompts, each process its share of them."""
        size = self.args.per_device_eval_batch_size
        own = list(range(self.args.process_index, len(prompts), self.args.world_size))
        # A sharded model needs all processes in every batch: those without rows complete the first one, uncounted.
        most = math.ceil(len(prompts) / self.args.world_size)
        entries: dict[str, list[Tensor]] = {}
        for start in range(0, most, size):
            indices = own[start : start + size]
            rows = [prompts[index] for index in indices or [0]]
            for name, values in self._score(rows, seed=None, trainer_state=trainer_state)[1].items():
                entries.setdefault(name, []).append(values[: len(indices)])
            after_batch()
        joined = {name: torch.cat(values) for name, values in entries.items()}
        return _means(joined, self.total, self.args.device)

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, reduction="sum")
        return summed

    def _score(
        self, rows: Sequence[Mapping[str, Any]], *, seed: int | None, trainer_state: Any
    ) -> tuple[Completions, dict[str, Tensor]]:
        # Completions, and what is logged of them by name: a number for each, and one for all of what rewards log.
        with self._timed("generation"), self.accelerator.autocast():
            completions = self.sampler.sample([row[TOKENS] for row in rows], seed=seed)
        logged: dict[str, list[float]] = {}

        def log_metric(name: str, value: float) -> None:
            logged.setdefault(name, []).append(float(value))

        with self._timed("rewards"):
            scores, by_name = self.rewards.score(
                rows, completions.tokens, self.tokenizer, trainer_state=trainer_state, log_metric=log_metric
            )
        return completions, {
            **{name: torch.tensor([fmean(values)]) for name, values in logged.items()},
            "reward": scores,
            **{f"rewards/{name}": values for name, values in by_name.items()},  # NaN where one did not apply
            "completions/mean_length": torch.tensor([float(len(tokens)) for tokens in completions.tokens]),
            "completions/ended": torch.tensor([float(ended) for ended in completions.ended]),
        }

    def _sequences(self, rows: Sequence[Mapping[str, Any]], completions: Completions) -> Sequences:
        device, pad = self.model.device, self.tokenizer.pad_token_id
        prompt_ids, prompt_mask = padded([row[TOKENS] for row in rows], pad, device, side="left")
        completion_ids, completion_mask = padded(completions.tokens, pad, device, side="right")
        return Sequences(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask.bool(),
        )

    @torch.no_grad()
    def _statistics(self, sequences: Sequences) -> dict[str, Tensor]:
        shape = sequences.completion_ids.shape
        names = ("log_probs", "reference", "values", "entropies")
        found = {name: torch.zeros(shape, device=self.model.device) for name in names}
        # Without a bonus the entropy is only logged: once per rollout is enough, as it takes another pass over logits.
        with_entropy = self.args.entropy_coef == 0
        order = sequences.attention_mask.sum(1).argsort(stable=True)  # similar lengths together need little padding
        rows_at_a_time = self.args.scoring_batch_size or self.args.per_device_train_batch_size
        with evaluating(self.model):  # the reference too may be this model, without its adapter
            for rows in order.split(rows_at_a_time):
                batch, temperature = sequences.select(rows), self.args.temperature
                ids, mask, tokens = batch.input_ids, batch.attention_mask, batch.completion_ids.shape[1]
                log_probs, entropies, values = self.model(ids, mask, tokens, temperature, with_entropy=with_entropy)
                reference = log_probs
                if self.reference is not None:
                    with self.accelerator.autocast():
                        reference = self.reference.log_probs(ids, mask, tokens, temperature)
                for name, result in zip(names, (log_probs, reference, values, entropies), strict=True):
                    found[name][rows, :tokens] = result
        return found

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
