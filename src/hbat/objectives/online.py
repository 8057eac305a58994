"""GRPO and RLOO with TRL's trainers: their reference policy, and how many rows and steps a rollout takes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hbat.engines.patches import given_reference
from hbat.objectives.objective import OnlineObjective
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.prompts import as_completions, completion_texts, prompt_tokens


class OnlineStage:
    """Lets a trainer of TRL that takes no `ref_model` take one. Stands before the trainer among a class's bases.

    For a full model TRL loads the reference policy from the files under the model's name: the base model's weights
    instead of the present ones, and a second copy in memory. Here it gets the model that is there instead, where it
    would load one, so that all that TRL then does to its reference is done as ever. With an adapter TRL makes its own
    reference, and nothing is passed.

    Rewards are what they are in PPO, and so is the text that they see. TRL leaves out a completion to which none
    applies, but some must be left.

    Attributes:
        rewards: The rewards.
        scores_rows: Whether rewards get columns of rows alone, and nothing of an environment.
    """

    processing_class: Any
    args: Any

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if kwargs.get("eval_dataset") is not None:
            _require_whole_groups(kwargs["args"])
        if kwargs.get("reward_funcs"):
            self.rewards = Rewards(kwargs["reward_funcs"], processing_classes=kwargs.get("reward_processing_classes"))
            kwargs["reward_funcs"] = self.rewards.for_trl
            self.scores_rows = not kwargs.keys() & {"rollout_func", "environment_factory"}
            if self.scores_rows:
                self.rewards.require(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        with given_reference(type(self), ref_model):
            super().__init__(*args, **kwargs)
        own: Any = self
        if ref_model is not None and own.beta != 0 and own.accelerator.unwrap_model(own.ref_model) is not ref_model:
            raise NotImplementedError(
                f"{type(self).__name__} of this TRL does not take the reference policy that it is given. Use a TRL "
                "version from 1.0 to 1.16, or an adapter (`peft_config`)."
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        tokenizer, rows = self.processing_class, [{"prompt": prompt} for prompt in prompts]
        if not hasattr(tokenizer, "tokenizer"):  # a processor's prompts hold more than text
            options = self.args.chat_template_kwargs or {}
            alone = as_completions(tokenizer.batch_decode(completion_ids, skip_special_tokens=True), rows)
            if completions == alone:  # nothing of TRL's own in them, such as calls of tools
                tokens = [prompt_tokens(prompt, tokenizer, options) for prompt in prompts]
                completions[:] = as_completions(completion_texts(tokenizer, tokens, completion_ids), rows)
        # Of all processes.
        values: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)  # type: ignore[misc]
        if values.isnan().all():
            raise self.rewards.unscored(range(len(completions)), completions)
        return values


class StageGRPOTrainer(OnlineStage, GRPOTrainer):
    """TRL's GRPOTrainer, whose reference policy is passed as `ref_model`."""


class StageRLOOTrainer(OnlineStage, RLOOTrainer):
    """TRL's RLOOTrainer, whose reference policy is passed as `ref_model`."""


@dataclass(frozen=True, kw_only=True)
class _Grouped(OnlineObjective):
    """A trainer of TRL's that generates completions and compares them in groups.

    A stage that was cut off resumes from TRL's checkpoint where that lies between two rollouts of the first epoch, and
    starts again elsewhere: the checkpoint holds neither the completions that are still to be trained on nor the order
    of prompts in later epochs, so TRL would continue with others.
    """

    engines: tuple[str, ...] = ("ddp",)
    recomputed_fields: tuple[str, ...] = ("generation_batch_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        default = self.config_class.__dataclass_fields__["beta"].default
        object.__setattr__(self, "uses_reference", self.given("beta", default) != 0)

    def minimum_rows(self, args: Any) -> int:
        """Different prompts of one generation, over all processes."""
        return int(args.generation_batch_size) // int(args.num_generations)

    def epoch_steps(self, args: Any, rows: int) -> int:
        """Optimizer steps of one epoch; prompts that do not fill a last rollout are dropped."""
        rollouts = rows // self.minimum_rows(args)
        batches = rollouts * int(args.num_iterations) * int(args.steps_per_generation)
        return -(-batches // int(args.gradient_accumulation_steps))

    def can_resume_at(self, args: Any, rows: int, step: int) -> bool:
        """Whether all completions were used, in the first epoch, and TRL adapts nothing else by the step."""
        batches_per_rollout = int(args.num_iterations) * int(args.steps_per_generation)
        between = step * int(args.gradient_accumulation_steps) % batches_per_rollout == 0
        return between and step < self.epoch_steps(args, rows) and not getattr(args, "use_adaptive_entropy", False)


@dataclass(frozen=True, kw_only=True)
class GRPO(_Grouped):
    """GRPO with TRL's GRPOTrainer. Its `beta` is 0 by default, which needs no reference policy."""

    name: str = "grpo"
    trainer_class: type[Trainer] = StageGRPOTrainer
    config_class: type[TrainingArguments] = GRPOConfig


@dataclass(frozen=True, kw_only=True)
class RLOO(_Grouped):
    """RLOO with TRL's RLOOTrainer."""

    name: str = "rloo"
    trainer_class: type[Trainer] = StageRLOOTrainer
    config_class: type[TrainingArguments] = RLOOConfig


def _require_whole_groups(args: Any) -> None:
    group = getattr(args, "num_generations_eval", None) or args.num_generations
    batch = args.per_device_eval_batch_size * args.world_size
    if batch % group:
        raise ValueError(
            f"`per_device_eval_batch_size` makes batches of {batch} completions, which is not a multiple of {group} "
            "(`num_generations_eval`, else `num_generations`). Set it to a multiple, or the number of generations to "
            "a divisor."
        )
