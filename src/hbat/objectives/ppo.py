"""Proximal policy optimisation: the online objective of human preference, with hbat's own trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments

from hbat.objectives.objective import OnlineObjective
from hbat.ppo.config import PPOConfig
from hbat.ppo.trainer import PPOTrainer


@dataclass(frozen=True, kw_only=True)
class PPO(OnlineObjective):
    """PPO with `hbat.PPOTrainer`. The critic and the KL coefficient outlive a stage."""

    name: str = "ppo"
    trainer_class: type[Trainer] = PPOTrainer
    config_class: type[TrainingArguments] = PPOConfig
    uses_reference: bool = True
    rehearses_all_rows: bool = True

    def minimum_rows(self, args: Any) -> int:
        """Prompts of one rollout, over all processes."""
        return int(args.rollout_size * args.world_size)

    def epoch_steps(self, args: Any, rows: int) -> int:
        """Optimizer steps of one epoch; prompts that do not fill a last rollout are dropped."""
        return rows // self.minimum_rows(args) * int(args.steps_per_rollout)

    def state_dict(self, trainer: Any) -> Mapping[str, Tensor]:
        """The critic's own weights, and the KL coefficient."""
        return PPOTrainer.kept_state(trainer)

    def load_state_dict(self, trainer: Any, state: Mapping[str, Tensor]) -> None:
        """Load them into the next stage's trainer."""
        PPOTrainer.restore_state(trainer, state)
