"""Reward functions and reward models."""

from hbat.ppo.rewards.rewards import Rewards as Rewards
