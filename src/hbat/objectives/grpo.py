"""Group relative policy optimisation: online, from rewards, without a critic."""

from typing import Any

from trl import GRPOConfig, GRPOTrainer

from hbat.objectives.objective import Objective
from hbat.objectives.online import ReferencePassed, online_objective


class StageGRPOTrainer(ReferencePassed, GRPOTrainer):
    """TRL's GRPOTrainer, whose reference policy is passed as `ref_model`."""


def grpo(config: Any) -> Objective:
    """Describe GRPO with TRL's GRPOTrainer. Its `beta` is 0 by default, which needs no reference policy.

    Args:
        config: Fields of `trl.GRPOConfig`, or a ready one.

    Returns:
        The objective `grpo`.
    """
    return online_objective("grpo", StageGRPOTrainer, GRPOConfig, config)
