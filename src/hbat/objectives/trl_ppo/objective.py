"""Proximal policy optimisation with TRL's own trainer, for as long as it is there."""

import importlib.util
import math
import warnings
from collections.abc import Mapping
from typing import Any

from hbat.data.formats import prompt_faults
from hbat.objectives.objective import Objective

#: What a section leaves out and TRL would fill with what its trainer does not do.
_DEFAULTS = {"bf16": False, "save_strategy": "no"}


#: Fields that TRL's trainer works out of others, and writes into the configuration.
_DERIVED = (
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip


def is_available() -> bool:
    """Whether TRL still has a PPOTrainer.

    Returns:
        True below TRL 1.13.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental is experimental
        try:
            return importlib.util.find_spec("trl.experimental.ppo") is not None
        except ModuleNotFoundError:
            return False


def ppo(config: Any) -> Objective:
    """Describe PPO with TRL's PPOTrainer.

    Args:
        config: Fields of `trl.experimental.ppo.PPOConfig`, or a ready one.

    Returns:
        The objective `ppo`.

    Raises:
        ImportError: If TRL has no PPOTrainer.
    """
    if not is_available():
        raise ImportError(
            "`ppo_backend` is 'trl', but the installed TRL has no PPOTrainer: it was dropped in TRL 1.13. Use "
            '`ppo_backend: hbat`, or install an older one with `pip install "trl<1.13"`.'
        )
    from hbat.objectives.trl_ppo import trainer as trl_ppo_trainer  # noqa: PLC0415 - cannot be imported otherwise

    return Objective(
        name="ppo",
        trainer_class=trl_ppo_trainer.TRLPPOTrainer,
        config_class=trl_ppo_trainer.PPOConfig,
        config=_DEFAULTS | dict(config or {}) if config is None or isinstance(config, Mapping) else config,
        uses_reference=True,
        faults=prompt_faults,
        metric="reward",
        greater_is_better=True,
        takes_rewards=True,
        trains_shards=False,
        minimum_rows=_rollout_size,
        epoch_steps=_rollouts,
        keeps=trl_ppo_trainer.critic_of,
        restores=trl_ppo_trainer.restore_critic,
        resumes_inside=False,
        derived=_DERIVED,
    )


def _rollout_size(args: Any) -> int:
    return int(args.per_device_train_batch_size)


def _rollouts(args: Any, rows: int) -> int:
    return math.ceil(rows / _rollout_size(args))
