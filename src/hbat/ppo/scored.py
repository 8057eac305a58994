"""Completions with their scores, and what to log about them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbat.ppo.generation import Completions


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
