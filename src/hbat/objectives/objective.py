"""The contract between a run and what its stages minimise: how one objective's trainer is built."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hbat.config.fields import build_section
from hbat.data.faults import RowCheck
from hbat.ewc.fisher import Example

#: Fields of a stage's configuration that belong to the run, and what to set instead.
_OWNED_BY_THE_RUN = {
    "output_dir": "every stage has its own folder inside the run's. Set the run's `output_dir`.",
    "report_to": "one set of reporters serves the whole run. Set the run's `report_to`.",
    "run_name": "one set of reporters serves the whole run. Set the run's `run_name`.",
    "push_to_hub": "stages are not pushed. Call `push_to_hub()` after training.",
    "resume_from_checkpoint": "the run resumes as a whole. Pass `resume_from_checkpoint` to `HBATTrainer.train`.",
    "load_best_model_at_end": "the next stage starts from this one's end. Use `end_weight` to hold a stage back.",
    "model_init_kwargs": "the model is loaded once for all stages. Set the run's `model_init_kwargs`.",
    "cast_lm_head_to_fp32": "it changes the model for all stages after this one. Load the model in float32.",
    "sync_ref_model": "the reference policy is the model at the stage's start. More rounds renew it more often.",
}


_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,49}")


_NO_LAMBDA_SCHEDULE = {"reduce_lr_on_plateau", "greedy"}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a stage minimises: a trainer class of TRL or of your own, and what a run must know about it.

    `sft`, `dpo`, `kto`, `ppo`, `grpo` and `rloo` are built in; any other `transformers.Trainer` that takes `model`,
    `args`, `train_dataset`, `eval_dataset`, `processing_class` and `callbacks` becomes an objective by naming it:

        Objective(name="code", trainer_class=SFTTrainer, config_class=SFTConfig)

    Attributes:
        name: Key of its data sets, prefix of its log entries.
        trainer_class: The trainer of its stages.
        config_class: The trainer's configuration.
        config: Fields of the configuration (mapping), or a ready configuration.
        uses_reference: Whether the trainer takes a reference policy as `ref_model`. It gets the model at the stage's
            start; with an adapter the host copies the adapter itself.
        faults: Finds what is wrong with a row of its data, before the first stage.
        examples: Turns a row of the trainer's tokenised data into sequences whose log-likelihood measures the Fisher.
        metric: Evaluation metric that stands for the objective in the table.
        greater_is_better: Whether more of it is better; of a loss, less is.
        takes_rewards: Whether the trainer takes `reward_funcs` and `reward_processing_classes`. It gets those of the
            run, unless `trainer_kwargs` has `reward_funcs`.
        minimum_rows: Rows that a stage needs at least, of the configuration; one where left out.
        epoch_steps: Optimizer steps of one epoch, of the configuration and the number of rows; where left out, a step
            takes `per_device_train_batch_size * gradient_accumulation_steps` rows on each process.
        keeps: Takes out of a trainer that has trained what the objective's next stage needs beside the model, such as
            a critic. It lies on disk with the run's state, and no penalty touches it.
        restores: Puts what `keeps` took into the next stage's trainer, before it trains. Where that goes on from a
            checkpoint of its own, the checkpoint has the last word.
        resumes_inside: Whether a stage that was cut off goes on from the trainer's own checkpoint: always, never, or
            as a function says of the configuration, the rows of the stage and the step of the checkpoint. It starts
            anew where going on would not end in the same weights.
        rehearses_all_rows: Whether the trainer finds faults in rows when it is built that `faults` cannot see, such as
            prompts that are too long for the model: before the first stage it is then built on all of them.
        trains_shards: Whether the trainer can train a model that is sharded (FSDP2).
        trains_zero: Whether the trainer was tested under DeepSpeed's ZeRO.
        derived: Fields that the configuration works out of others; they are worked out again for each stage.
        trainer_kwargs: More arguments for the trainer's constructor.
    """

    name: str
    trainer_class: type[Trainer]
    config_class: type[TrainingArguments]
    config: Mapping[str, Any] | TrainingArguments | None = None
    uses_reference: bool = False
    faults: RowCheck | None = None
    examples: Callable[[Mapping[str, Any]], Iterator[Example]] | None = None
    metric: str = "loss"
    greater_is_better: bool = False
    takes_rewards: bool = False
    minimum_rows: Callable[[Any], int] | None = None
    epoch_steps: Callable[[Any, int], int] | None = None
    keeps: Callable[[Any], Mapping[str, Tensor]] | None = None
    restores: Callable[[Any, Mapping[str, Tensor]], None] | None = None
    resumes_inside: Callable[[Any, int, int], bool] | bool = True
    rehearses_all_rows: bool = False
    trains_shards: bool = True
    trains_zero: bool = False
    derived: Collection[str] = ()
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"`Objective(name={self.name!r})`: the name becomes part of file names and keys of the log, so it is "
                "made of letters, digits, `_` and `-`, begins with a letter, and has at most 50 of them."
            )

    def rows_of_a_stage(self, args: TrainingArguments) -> int:
        """Say how many rows a stage needs at least.

        Args:
            args: The objective's configuration.

        Returns:
            At least one.
        """
        return 1 if self.minimum_rows is None else self.minimum_rows(args)

    def resumes_at(self, args: TrainingArguments, rows: int, step: int) -> bool:
        """Say whether a stage goes on from a checkpoint of its trainer.

        Args:
            args: The objective's configuration.
            rows: Rows of the stage.
            step: Step of the checkpoint.

        Returns:
            Whether it does; otherwise it starts anew.
        """
        return self.resumes_inside if isinstance(self.resumes_inside, bool) else self.resumes_inside(args, rows, step)

    def base_args(self, output_dir: str) -> TrainingArguments:
        """Build and check the objective's configuration.

        Args:
            output_dir: Any folder; each stage sets its own.

        Returns:
            The configuration as the user gave it.

        Raises:
            ValueError: If it cannot work inside a run.
            TypeError: If a ready configuration is of another class.
        """
        if isinstance(self.config, TrainingArguments):
            if not isinstance(self.config, self.config_class):
                raise TypeError(
                    f"`{self.name}` is a {type(self.config).__name__}; it must be a {self.config_class.__name__}, or "
                    "a mapping of its fields."
                )
            args = self.config
        else:
            values = dict(self.config or {})
            if values.get("report_to") in ("none", ["none"]):  # what every stage sets
                del values["report_to"]
            build = {"output_dir": output_dir, "report_to": "none"}
            reserved = {key: why for key, why in _OWNED_BY_THE_RUN.items() if key in values}
            args = build_section(self.name, self.config_class, build | values, owned=reserved)
        for key in ("load_best_model_at_end", "sync_ref_model", "cast_lm_head_to_fp32"):
            if getattr(args, key, False):
                raise ValueError(f"`{self.name}.{key}` cannot be set here: {_OWNED_BY_THE_RUN[key]}")
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in _NO_LAMBDA_SCHEDULE:
            raise ValueError(
                f"`{self.name}.lr_scheduler_type` is {args.lr_scheduler_type!s}, which depends on evaluations inside "
                "a stage. Take a schedule of the step alone, such as 'cosine' or 'constant_with_warmup'."
            )
        return args

    def stage_args(
        self, base: TrainingArguments, output_dir: str, seed_offset: int, **changes: Any
    ) -> TrainingArguments:
        """Make the configuration of one stage. Must directly precede the trainer's construction.

        Building a configuration resets accelerate's global state, which breaks a trainer that is alive.

        Args:
            base: The objective's configuration.
            output_dir: The stage's folder.
            seed_offset: Added to the seed, so that stages do not replay one shuffle.
            **changes: Other values of further fields.

        Returns:
            A new configuration.
        """
        worked_out_again: dict[str, Any] = dict.fromkeys(self.derived)
        return dataclasses.replace(
            base,
            output_dir=output_dir,
            seed=base.seed + seed_offset,
            report_to="none",
            disable_tqdm=True,
            data_seed=None if base.data_seed is None else base.data_seed + seed_offset,
            logging_nan_inf_filter=False,  # a stage stops at such a loss, so the host need not look for it as well
            push_to_hub=False,
            save_total_limit=base.save_total_limit or 1,
            **(worked_out_again | changes),
        )

    def build_trainer(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: Any,
        reference: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> Trainer:
        """Build the trainer of one stage.

        Args:
            model: The model, with its adapter where there is one.
            args: The stage's configuration.
            train_dataset: The rows of the stage.
            eval_dataset: Rows to evaluate on.
            processing_class: The tokenizer.
            reference: A full model as reference policy; None where the host takes the adapter's copy.
            callbacks: Callbacks of the stage.

        Returns:
            The trainer.
        """
        extra = dict(self.trainer_kwargs)
        if self.uses_reference and reference is not None:
            # Left out, TRL would load the weights that lie on disk under the model's name, not the present ones.
            extra["ref_model"] = reference
        trainer = self.trainer_class(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
