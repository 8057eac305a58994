"""The reward functions of a run, handed to the objectives that take them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hbat.objectives.objective import Objective
from hbat.ppo.rewards.model import load_reward_model


def with_rewards(
    objectives: Sequence[Objective], reward_funcs: Any, reward_processing_classes: Any = None
) -> list[Objective]:
    """Give the run's reward functions to the objectives that take some and have none of their own.

    Models that are given by name are loaded here, once for all objectives and stages.

    Args:
        objectives: The objectives of a round.
        reward_funcs: A function, a model, a name of one, or a list of them, as TRL's online trainers take it.
        reward_processing_classes: Tokenizers of the reward models; the models' own where left out.

    Returns:
        The objectives in order.

    Raises:
        ValueError: If an objective has no reward, or nothing takes those given.
    """
    takers = [each.name for each in objectives if each.takes_rewards and "reward_funcs" not in each.trainer_kwargs]
    if _is_empty(reward_funcs):
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
        names = ", ".join(each.name for each in objectives)
        raise ValueError(
            f"`reward_funcs` is given, but no objective of the run takes rewards ({names}). Leave it out."
        )
    several = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    shared: dict[str, Any] = {
        "reward_funcs": [load_reward_model(each) if isinstance(each, str | Path) else each for each in several]
    }
    if reward_processing_classes is not None:
        shared["reward_processing_classes"] = reward_processing_classes
    return [
        dataclasses.replace(each, trainer_kwargs=shared | dict(each.trainer_kwargs)) if each.name in takers else each
        for each in objectives
    ]


def reward_names(objectives: Iterable[Objective]) -> dict[str, list[str]]:
    """Name the rewards of each objective that has some.

    Args:
        objectives: The objectives, with their rewards.

    Returns:
        Names of functions, and of the classes of anything else, by objective.
    """
    found = {}
    for each in objectives:
        given = each.trainer_kwargs.get("reward_funcs") or []
        rewards = given if isinstance(given, list | tuple) else [given]
        if rewards:
            found[each.name] = [str(getattr(reward, "__name__", type(reward).__name__)) for reward in rewards]
    return found


def _is_empty(reward_funcs: Any) -> bool:
    return reward_funcs is None or (isinstance(reward_funcs, list | tuple) and not reward_funcs)
