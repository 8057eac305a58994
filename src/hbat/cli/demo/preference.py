"""What the demo's preference stages train with: pairs for DPO, or prompts and the judge as a reward for PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.settings import DemoSettings
from hbat.cli.demo.task import preference_rows, utility

Kind = Literal["dpo", "ppo"]


Reward = Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The demo's preference objective.

    Attributes:
        name: The objective.
        learning_rate: Its largest learning rate, shared by HBAT and two-stage training.
        tuned_learning_rate: The best for two-stage training.
        epochs: Passes over its rows.
        batch_size: Rows in an optimizer step.
        options: Further fields of its section.
        reward: What it learns from beside its rows.
    """

    name: Kind
    learning_rate: float
    tuned_learning_rate: float
    epochs: int
    batch_size: int
    options: dict[str, Any]
    reward: Reward | None = None

    @classmethod
    def of(cls, name: Kind, settings: DemoSettings) -> "Preference":
        """Take an objective's numbers out of the settings.

        Args:
            name: The objective.
            settings: Sizes and learning rates.

        Returns:
            The objective.
        """
        if name == "dpo":
            return cls(
                name=name,
                learning_rate=settings.dpo_learning_rate,
                tuned_learning_rate=settings.tuned_dpo_learning_rate,
                epochs=settings.dpo_epochs,
                batch_size=settings.batch_size,
                options={"beta": settings.dpo_beta},
            )
        return cls(
            name=name,
            learning_rate=settings.ppo_learning_rate,
            tuned_learning_rate=settings.tuned_ppo_learning_rate,
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
        """Generate training rows.

        Args:
            seed: Seed of the generator.
            n: Number of rows.

        Returns:
            Preference pairs; for PPO their prompts.
        """
        pairs = Dataset.from_list(preference_rows(seed, n))
        return pairs if self.name == "dpo" else pairs.select_columns("prompt")


def judge(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Reward answers by what the judge gives, without noise.

    Args:
        prompts: The instructions.
        completions: An answer for each.
        **_: Nothing of interest.

    Returns:
        The utility of each answer.
    """
    return [utility(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
