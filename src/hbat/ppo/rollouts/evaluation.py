"""Evaluation of a policy: the rewards of its greedy completions."""

import math
from typing import Any

import torch
from datasets import Dataset

from hbat.ppo.config import PPOConfig
from hbat.ppo.requirements import prepare_rows
from hbat.ppo.rollouts.collector import RolloutCollector, means


def evaluate_policy(
    collector: RolloutCollector, rows: Dataset | None, policy: Any, tokenizer: Any, args: PPOConfig, state: Any
) -> dict[str, float]:
    """Complete prompts greedily and have the completions scored, each process its share of them.

    Args:
        collector: Completes and scores.
        rows: Rows with `prompt`.
        policy: The policy.
        tokenizer: Its tokenizer.
        args: PPO's options; `per_device_eval_batch_size` prompts are completed at once.
        state: State of training, for the reward functions.

    Returns:
        Means over all rows by name.

    Raises:
        ValueError: If there are no rows, or a prompt does not fit.
    """
    if rows is None or len(rows) == 0:
        raise ValueError("There are no rows to evaluate on. Give `eval_dataset`, to the trainer or to `evaluate`.")
    prompts = prepare_rows(rows, policy, tokenizer, args)
    size = args.per_device_eval_batch_size
    own = list(range(args.process_index, len(prompts), args.world_size))
    # Sharded models need all processes in every batch: those that have no row left take the first, and count it not.
    most = math.ceil(len(prompts) / args.world_size)
    entries: dict[str, list[torch.Tensor]] = {}
    for start in range(0, most, size):
        part = own[start : start + size]
        batch = [prompts[index] for index in part or [0]]
        scored = collector.score(batch, seed=None, trainer_state=state)
        for name, values in scored.entries().items():
            entries.setdefault(name, []).append(values[: len(part)])
    joined = {name: torch.cat(values) for name, values in entries.items()}
    return means(joined, collector.total, args.device)
