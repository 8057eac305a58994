"""Proximal policy optimisation: the online objective of human preference, with hbat's own trainer."""

from typing import Any, cast

from transformers import TrainingArguments

from hbat.data.formats import prompt_faults
from hbat.objectives.objective import Objective
from hbat.ppo.config import PPOConfig
from hbat.ppo.trainer import PPOTrainer


def ppo(config: Any) -> Objective:
    """Describe PPO with `hbat.PPOTrainer`. The critic and the KL coefficient outlive a stage.

    Args:
        config: Fields of `hbat.PPOConfig`, or a ready one.

    Returns:
        The objective `ppo`.
    """
    return Objective(
        name="ppo",
        trainer_class=PPOTrainer,
        config_class=PPOConfig,
        config=config,
        uses_reference=True,
        takes_rewards=True,
        faults=prompt_faults,
        metric="reward",
        greater_is_better=True,
        minimum_rows=_rollout_rows,
        rehearses_all_rows=True,
        epoch_steps=_epoch_steps,
        keeps=PPOTrainer.kept_state,
        restores=PPOTrainer.restore_state,
    )


def _rollout_rows(args: TrainingArguments) -> int:
    own = cast("PPOConfig", args)
    rows: int = own.rollout_size * own.world_size
    return rows


def _epoch_steps(args: TrainingArguments, rows: int) -> int:
    return rows // _rollout_rows(args) * cast("PPOConfig", args).steps_per_rollout
