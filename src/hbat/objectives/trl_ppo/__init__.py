"""TRL's own PPO as an objective.

`objective`: the contract. `trainer`: its trainer. `models`: its four models.
"""
