"""Proximal policy optimisation with TRL's own trainer, which exists below TRL 1.13."""

import importlib.util
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hbat.objectives.objective import OnlineObjective

#: Values that TRL's defaults would set to what its trainer does not do.
_DEFAULTS = {"bf16": False, "save_strategy": "no"}


def is_available() -> bool:
    """Whether the installed TRL has a PPOTrainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental is experimental
        try:
            return importlib.util.find_spec("trl.experimental.ppo") is not None
        except ModuleNotFoundError:
            return False


@dataclass(frozen=True, kw_only=True)
class TRLPPO(OnlineObjective):
    """PPO with TRL's PPOTrainer; `trl_ppo` makes one."""

    name: str = "ppo"
    uses_reference: bool = True
    engines: tuple[str, ...] = ("ddp",)
    #: TRL's trainer computes them from others, and writes them into its arguments.
    recomputed_fields: tuple[str, ...] = (
        "world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size",
        "local_mini_batch_size", "mini_batch_size",
    )  # fmt: skip

    def minimum_rows(self, args: Any) -> int:
        """Prompts of one rollout."""
        return int(args.per_device_train_batch_size)

    def epoch_steps(self, args: Any, rows: int) -> int:
        """Rollouts of one epoch."""
        return math.ceil(rows / self.minimum_rows(args))

    def state_dict(self, trainer: Any) -> Mapping[str, Tensor]:
        """The critic's own weights."""
        return trainer.value_model.trained()  # type: ignore[no-any-return]

    def load_state_dict(self, trainer: Any, state: Mapping[str, Tensor]) -> None:
        """Load them into the next stage's trainer."""
        trainer.value_model.load(state)

    def can_resume_at(self, args: Any, rows: int, step: int) -> bool:
        """Never: TRL's trainer saves nothing inside a stage."""
        return False


def trl_ppo(*, config: Any, **options: Any) -> TRLPPO:
    """Make the objective `ppo` with TRL's trainer.

    Args:
        config: Fields of `trl.experimental.ppo.PPOConfig`, or a ready one.
        **options: Other fields of the objective, such as its `name`.

    Raises:
        ImportError: If TRL has no PPOTrainer.
    """
    if not is_available():
        raise ImportError(
            "`ppo_backend` is 'trl', but the installed TRL has no PPOTrainer: it was removed in TRL 1.13. Use "
            '`ppo_backend: hbat`, or install an older one with `pip install "trl<1.13"`.'
        )
    from hbat.objectives.trl_ppo import trainer  # noqa: PLC0415 - cannot be imported otherwise

    return TRLPPO(
        trainer_class=trainer.TRLPPOTrainer,
        config_class=trainer.PPOConfig,
        config=_DEFAULTS | dict(config or {}) if config is None or isinstance(config, Mapping) else config,
        **options,
    )
