"""Sizes, learning rates and budgets of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Hyperparameters of the demo. Every method sees the same rows and takes the same number of steps."""

    seeds: int = 8  # of data, order and test prompts; the base model is one
    base_steps: int = 1200
    base_batch_size: int = 64
    base_learning_rate: float = 4e-3  # every learning rate here is the peak of its schedule
    instruction_rows: int = 2048
    preference_rows: int = 2048  # pairs for DPO, prompts for PPO
    test_prompts: int = 500
    sft_epochs: int = 2
    dpo_epochs: int = 1
    batch_size: int = 16  # of SFT and DPO
    sft_learning_rate: float = 1e-3
    dpo_learning_rates: tuple[float, ...] = (5e-4, 2e-4, 1e-4)  # of two-stage training; HBAT takes the first
    dpo_beta: float = 0.1
    adam_beta2: float = 0.95  # the stages are too short for the default
    warmup_steps: int = 5  # of every stage, before a cosine decay
    ppo_epochs: int = 1
    ppo_rollout: int = 128  # prompts per rollout
    ppo_passes: int = 4  # epochs over each rollout
    ppo_batch_size: int = 32
    ppo_learning_rates: tuple[float, ...] = (1e-3, 1e-4, 2.5e-5)
    ppo_kl_coef: float = 0.05
    end_weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # points of the averaging line
