"""TRL's own PPO trainer, which exists below TRL 1.13."""
