"""PPO with TRL's own trainer, which TRL below 1.13 has."""
