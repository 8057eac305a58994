"""Prompts, sampled completions, and the rollouts made of them.

`collector` samples and scores; `generation` samples, `prompts` tokenizes and checks lengths, `rollout` holds tokens
and computes advantages, `schedule` says which rows each step trains on.
"""
