"""The reward functions of a run, handed to the objectives that take them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hbat.objectives.objective import Objective
from hbat.ppo.rewards.model import is_reward_model, load_reward_model
from hbat.state.fingerprint import weights_digest


def with_rewards(
    objectives: Sequence[Objective], reward_funcs: Any, reward_processing_classes: Any = None
) -> list[Objective]:
    """Give the run's reward functions to the objectives that take some and have none of their own.

    Reward models given by name are loaded here, once for all objectives and stages.

    Args:
        objectives: The objectives of a round.
        reward_funcs: A function, a model, a name of one, or a list of them, as for TRL's online trainers.
        reward_processing_classes: Tokenizers of the reward models; by default the models' own.

    Raises:
        ValueError: If an objective has no reward, or no objective takes those given.
    """
    takers = [
        objective.name
        for objective in objectives
        if objective.takes_rewards and "reward_funcs" not in objective.trainer_kwargs
    ]
    if reward_funcs is None or (isinstance(reward_funcs, list | tuple) and not reward_funcs):
        if takers:
            raise ValueError(
                f"The objective {takers[0]!r} learns from rewards, but `reward_funcs` is {reward_funcs!r}. Pass "
                "`reward_funcs`: a function from `prompts` and `completions` to a list of numbers, a reward model, or "
                "a list of these."
            )
        if reward_processing_classes is not None:
            raise ValueError("`reward_processing_classes` is given without `reward_funcs`. Pass both, or neither.")
        return list(objectives)
    if not takers:
        names = ", ".join(objective.name for objective in objectives)
        raise ValueError(f"`reward_funcs` is given, but no objective of the run takes rewards ({names}). Remove it.")
    several = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    shared: dict[str, Any] = {
        "reward_funcs": [load_reward_model(reward) if isinstance(reward, str | Path) else reward for reward in several]
    }
    if reward_processing_classes is not None:
        shared["reward_processing_classes"] = reward_processing_classes
    return [
        dataclasses.replace(objective, trainer_kwargs=shared | dict(objective.trainer_kwargs))
        if objective.name in takers
        else objective
        for objective in objectives
    ]


def reward_names(objectives: Iterable[Objective]) -> dict[str, list[str]]:
    """Names of the reward functions, classes and weights of the models, classes of anything else, by objective."""
    names = {}
    for objective in objectives:
        given = objective.trainer_kwargs.get("reward_funcs") or []
        rewards = given if isinstance(given, list | tuple) else [given]
        if rewards:
            names[objective.name] = [_name(reward) for reward in rewards]
    return names


def _name(reward: Any) -> str:
    name = str(getattr(reward, "__name__", type(reward).__name__))
    return f"{name} {weights_digest(dict(reward.named_parameters()))}" if is_reward_model(reward) else name
