"""The demo's preference objective: pairs for DPO, or prompts and the judge's utility as the reward for PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.settings import DemoSettings
from hbat.cli.demo.task import preference_rows, utility

Kind = Literal["dpo", "ppo"]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The demo's preference objective."""

    name: Kind
    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int
    options: dict[str, Any]  # further fields of its section
    reward: Callable[..., list[float]] | None = None

    @classmethod
    def of(cls, name: Kind, settings: DemoSettings) -> "Preference":
        """Collect the settings of one objective."""
        if name == "dpo":
            return cls(
                name=name,
                learning_rates=settings.dpo_learning_rates,
                epochs=settings.dpo_epochs,
                batch_size=settings.batch_size,
                options={"beta": settings.dpo_beta},
            )
        return cls(
            name=name,
            learning_rates=settings.ppo_learning_rates,
            epochs=settings.ppo_epochs,
            batch_size=settings.ppo_batch_size,
            options={
                "kl_coef": settings.ppo_kl_coef,
                "max_completion_length": LONGEST_ANSWER,
                "num_ppo_epochs": settings.ppo_passes,
                "rollout_batch_size": settings.ppo_rollout,
            },
            reward=judge,
        )

    def rows(self, seed: int, n: int) -> Dataset:
        """Generate preference pairs, or for PPO their prompts."""
        pairs = Dataset.from_list(preference_rows(seed, n))
        return pairs if self.name == "dpo" else pairs.select_columns("prompt")


def judge(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Reward each answer by the judge's utility, without noise."""
    return [utility(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
