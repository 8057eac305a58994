"""REINFORCE leave-one-out: online, from rewards, without a critic."""

from typing import Any

from trl import RLOOConfig, RLOOTrainer

from hbat.objectives.objective import Objective
from hbat.objectives.online import ReferencePassed, online_objective


class StageRLOOTrainer(ReferencePassed, RLOOTrainer):
    """TRL's RLOOTrainer, whose reference policy is passed as `ref_model`."""


def rloo(config: Any) -> Objective:
    """Describe RLOO with TRL's RLOOTrainer.

    Args:
        config: Fields of `trl.RLOOConfig`, or a ready one.

    Returns:
        The objective `rloo`.
    """
    return online_objective("rloo", StageRLOOTrainer, RLOOConfig, config)
