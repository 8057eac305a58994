"""PPO with TRL's own trainer, which TRL below 1.13 has."""

from hbat.objectives.trl_ppo.objective import ppo

__all__ = ["ppo"]
