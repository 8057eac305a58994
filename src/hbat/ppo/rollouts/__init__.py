"""Prompts, sampled completions, and the rollouts made of them."""
