"""What GRPO and RLOO share: the stage-start model as their reference, and how many rows and steps a rollout takes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hbat.data.formats import prompt_faults
from hbat.objectives.objective import Objective

#: The function of TRL's modules with which GRPO and RLOO load their reference (TRL 1.0-1.16).
_LOADER = "create_model_from_path"


class ReferencePassed:
    """Lets a trainer of TRL that takes no `ref_model` take one. Stands before the trainer among a class's bases.

    For a full model TRL loads the reference from the files under the model's name: the base model's weights instead of
    the present ones, and a second copy in memory. Here it is given the model that is there instead, at the very place
    where it would load one, so that all that TRL then does to its reference is done as ever. With an adapter TRL makes
    its own reference, and nothing is passed.
    """

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if kwargs.get("eval_dataset") is not None:
            _require_whole_groups(kwargs["args"])
        with _handing_over(type(self), ref_model):
            super().__init__(*args, **kwargs)
        own: Any = self
        if ref_model is not None and own.beta != 0 and own.accelerator.unwrap_model(own.ref_model) is not ref_model:
            raise NotImplementedError(
                f"{type(self).__name__} of this TRL does not take the reference policy that it is given. Use a TRL "
                "version from 1.0 to 1.16, or an adapter (`peft_config`)."
            )


@contextmanager
def _handing_over(trainer_class: type, reference: Any) -> Iterator[None]:
    modules = [sys.modules[each.__module__] for each in trainer_class.__mro__]
    loading = [each for each in modules if each.__name__.startswith("trl.") and hasattr(each, _LOADER)]
    if reference is None or not loading:
        yield
        return
    before = getattr(loading[0], _LOADER)

    def hand_over(*_: Any, **__: Any) -> Any:
        return reference

    setattr(loading[0], _LOADER, hand_over)
    try:
        yield
    finally:
        setattr(loading[0], _LOADER, before)


def online_objective(
    name: str, trainer_class: type[Trainer], config_class: type[TrainingArguments], config: Any
) -> Objective:
    """Describe an objective of one of TRL's trainers that generate completions and compare them in groups.

    A stage that was cut off goes on from TRL's checkpoint where that lies between two rollouts of the first epoch, and
    starts anew elsewhere: the checkpoint holds neither the completions that are still to be trained on nor the order
    of prompts in later epochs, so TRL would go on with others.

    Args:
        name: Its name.
        trainer_class: The trainer, with `ReferencePassed` before it.
        config_class: The trainer's configuration.
        config: Fields of it, or a ready one.

    Returns:
        The objective.
    """
    given = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    return Objective(
        name=name,
        trainer_class=trainer_class,
        config_class=config_class,
        config=config,
        uses_reference=given.get("beta", _default(config_class, "beta")) != 0,
        takes_rewards=True,
        faults=prompt_faults,
        metric="reward",
        greater_is_better=True,
        minimum_rows=prompts_of_a_rollout,
        epoch_steps=epoch_steps,
        resumes_inside=is_between_rollouts,
        trains_shards=False,
        derived=("generation_batch_size",),
    )


def prompts_of_a_rollout(args: Any) -> int:
    """Say how many prompts one generation takes.

    Args:
        args: A `GRPOConfig` or `RLOOConfig`.

    Returns:
        Different prompts, over all processes.
    """
    return int(args.generation_batch_size) // int(args.num_generations)


def epoch_steps(args: Any, rows: int) -> int:
    """Say how many optimizer steps an epoch has; prompts that do not fill a last rollout are left out.

    Args:
        args: A `GRPOConfig` or `RLOOConfig`.
        rows: Number of prompts.

    Returns:
        Optimizer steps.
    """
    rollouts = rows // prompts_of_a_rollout(args)
    batches = rollouts * int(args.num_iterations) * int(args.steps_per_generation)
    return -(-batches // int(args.gradient_accumulation_steps))


def is_between_rollouts(args: Any, rows: int, step: int) -> bool:
    """Say whether TRL goes on exactly from a checkpoint.

    Args:
        args: A `GRPOConfig` or `RLOOConfig`.
        rows: Number of prompts.
        step: Optimizer step of the checkpoint.

    Returns:
        Whether all completions were used, in the first epoch, and nothing else is lost that TRL adapts by the step.
    """
    batches_a_rollout = int(args.num_iterations) * int(args.steps_per_generation)
    whole = step * int(args.gradient_accumulation_steps) % batches_a_rollout == 0
    return whole and step < epoch_steps(args, rows) and not getattr(args, "use_adaptive_entropy", False)


def _require_whole_groups(args: Any) -> None:
    group = getattr(args, "num_generations_eval", None) or args.num_generations
    batch = args.per_device_eval_batch_size * args.world_size
    if batch % group:
        raise ValueError(
            f"`per_device_eval_batch_size` makes batches of {batch} completions, which are no whole groups of {group} "
            "(`num_generations_eval`, else `num_generations`). Set it to a multiple, or the number of generations to "
            "a divisor."
        )


def _default(config_class: type, name: str) -> Any:
    return config_class.__dataclass_fields__[name].default  # type: ignore[attr-defined]


class StageGRPOTrainer(ReferencePassed, GRPOTrainer):
    """TRL's GRPOTrainer, whose reference policy is passed as `ref_model`."""


def grpo(config: Any) -> Objective:
    """Describe GRPO with TRL's GRPOTrainer. Its `beta` is 0 by default, which needs no reference policy.

    Args:
        config: Fields of `trl.GRPOConfig`, or a ready one.

    Returns:
        The objective `grpo`.
    """
    return online_objective("grpo", StageGRPOTrainer, GRPOConfig, config)


class StageRLOOTrainer(ReferencePassed, RLOOTrainer):
    """TRL's RLOOTrainer, whose reference policy is passed as `ref_model`."""


def rloo(config: Any) -> Objective:
    """Describe RLOO with TRL's RLOOTrainer.

    Args:
        config: Fields of `trl.RLOOConfig`, or a ready one.

    Returns:
        The objective `rloo`.
    """
    return online_objective("rloo", StageRLOOTrainer, RLOOConfig, config)
