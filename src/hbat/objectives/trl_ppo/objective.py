"""Proximal policy optimization with TRL's own trainer, which TRL below 1.13 has."""

import importlib.util
import math
import warnings
from collections.abc import Mapping
from typing import Any

from hbat.data.formats import prompt_faults
from hbat.objectives.objective import Objective

#: Defaults of a section, instead of TRL's, which its trainer does not support.
_DEFAULTS = {"bf16": False, "save_strategy": "no"}

#: Fields that TRL's trainer computes from others and writes into the configuration.
_DERIVED = (
    "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip


def is_available() -> bool:
    """Whether TRL has a PPOTrainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental is experimental
        try:
            return importlib.util.find_spec("trl.experimental.ppo") is not None
        except ModuleNotFoundError:
            return False


def ppo(config: Any) -> Objective:
    """The objective `ppo` with TRL's PPOTrainer, from fields of its configuration or a ready one."""
    if not is_available():
        raise ImportError(
            "`ppo_backend` is 'trl', but the installed TRL has no PPOTrainer: it was removed in TRL 1.13. Use "
            '`ppo_backend: hbat`, or install an older one with `pip install "trl<1.13"`.'
        )
    from hbat.objectives.trl_ppo import trainer as trl_ppo_trainer  # noqa: PLC0415 - fails without it

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
