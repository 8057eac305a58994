"""Reward functions and reward models.

`rewards` calls all of them, weighted and summed; `function` is one function, as GRPO and RLOO use it too, and `model`
one reward model.
"""

from hbat.ppo.rewards.rewards import Rewards as Rewards
