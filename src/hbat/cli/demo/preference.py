"""The demo's preference objective: pairs for DPO, or prompts and the judge's utility as the reward for PPO."""

from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset

from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.settings import DemoSettings
from hbat.cli.demo.task import preference_rows, utility

Kind = Literal["dpo", "ppo"]


def learning_rates(kind: Kind, settings: DemoSettings) -> tuple[float, ...]:
    """List the learning rates of two-stage training, the largest first."""
    return settings.dpo_learning_rates if kind == "dpo" else settings.ppo_learning_rates


def section(kind: Kind, settings: DemoSettings) -> dict[str, Any]:
    """Fill in the objective's section, but for its learning rate."""
    if kind == "dpo":
        return {
            "num_train_epochs": settings.dpo_epochs,
            "per_device_train_batch_size": settings.batch_size,
            "beta": settings.dpo_beta,
        }
    return {
        "num_train_epochs": settings.ppo_epochs,
        "per_device_train_batch_size": settings.ppo_batch_size,
        "kl_coef": settings.ppo_kl_coef,
        "max_completion_length": LONGEST_ANSWER,
        "num_ppo_epochs": settings.ppo_passes,
        "rollout_batch_size": settings.ppo_rollout,
    }


def data(kind: Kind, seed: int, n: int) -> Dataset:
    """Generate preference pairs, or for PPO their prompts."""
    pairs = Dataset.from_list(preference_rows(seed, n))
    return pairs if kind == "dpo" else pairs.select_columns("prompt")


def judge(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Reward each answer by the judge's utility, without noise."""
    return [utility(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
