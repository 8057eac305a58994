"""Prompts, generation and the rollouts made of them."""
