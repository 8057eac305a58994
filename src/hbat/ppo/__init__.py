"""Proximal policy optimisation: rollouts, rewards, critic and the trainer."""
