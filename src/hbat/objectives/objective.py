"""The contract between a run and what its stages minimise."""

import copy
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hbat.config.fields import build_section
from hbat.config.foreign import OWNED_BY_RUN
from hbat.data.faults import Fault, RowCheck
from hbat.data.formats import prompt_faults
from hbat.engines.environment import without_deprecations
from hbat.engines.processes import process_count
from hbat.ewc.fisher import IGNORED, Example

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,49}")
_NO_LAMBDA_SCHEDULE = {"reduce_lr_on_plateau", "greedy"}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a stage minimises: a trainer class of TRL or of your own, and what a run must know about it.

    `sft`, `dpo`, `kto`, `ppo`, `grpo` and `rloo` are built in. Any other `transformers.Trainer` that takes `model`,
    `args`, `train_dataset`, `eval_dataset`, `processing_class` and `callbacks` becomes an objective by naming it:

        Objective(name="code", trainer_class=SFTTrainer, config_class=SFTConfig)

    Subclass it and override methods where the trainer keeps a state of its own, or rows should be checked.

    Attributes:
        name: Key of its data sets, prefix of its log entries.
        trainer_class: The trainer of its stages.
        config_class: The trainer's arguments.
        config: Fields of the arguments (mapping), or ready ones.
        uses_reference: Whether the trainer takes a reference policy as `ref_model`. It gets the model at the start of
            the stage; with an adapter TRL computes it with the adapter `ref`.
        metric: Evaluation metric that stands for the objective in the forgetting matrix.
        greater_is_better: Whether a larger metric is better.
        takes_rewards: Whether the trainer takes `reward_funcs` and `reward_processing_classes`. It gets those of the
            run, unless `trainer_kwargs` has `reward_funcs`.
        rehearses_all_rows: Whether the trainer finds faults of rows at construction that `check_row` cannot see, such
            as prompts that are too long for the model: before the first stage it is then built on all rows.
        engines: Engines that it was tested with: `ddp` (and one process), `fsdp2`, `deepspeed`.
        recomputed_fields: Fields that the arguments compute from others; every stage computes them again.
        trainer_kwargs: More arguments for the trainer's constructor.
    """

    name: str
    trainer_class: type[Trainer]
    config_class: type[TrainingArguments]
    config: Mapping[str, Any] | TrainingArguments | None = None
    uses_reference: bool = False
    metric: str = "loss"
    greater_is_better: bool = False
    takes_rewards: bool = False
    rehearses_all_rows: bool = False
    engines: Collection[str] = ("ddp", "fsdp2")
    recomputed_fields: Collection[str] = ()
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"`Objective(name={self.name!r})`: the name becomes part of file names and log keys. Use letters, "
                "digits, `_` and `-`, at most 50, and begin with a letter."
            )

    # --- what to override --------------------------------------------------------------------------------------------

    def check_row(self, row: Mapping[str, Any]) -> Iterator[Fault]:
        """Find what is wrong with a row of its data, before the first stage. The default accepts every row."""
        check = self.row_check()
        return iter(()) if check is None else check(row)

    def fisher_sequences(self, row: Mapping[str, Any]) -> Iterator[Example]:
        """Turn a row of the trainer's tokenised data into sequences whose log-likelihood measures the Fisher.

        Raises:
            NotImplementedError: If it is not overridden: `ewc.source: fisher` is then refused.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `fisher_sequences`.")

    def minimum_rows(self, args: Any) -> int:
        """Minimum number of rows of a stage: one, or a batch where the last one is dropped unless it is full."""
        return int(args.per_device_train_batch_size) * process_count() if args.dataloader_drop_last else 1

    def epoch_steps(self, args: Any, rows: int) -> int:
        """Optimizer steps of one epoch over `rows` rows."""
        batch: int = args.per_device_train_batch_size * args.gradient_accumulation_steps * process_count()
        return math.ceil(rows / batch)

    def state_dict(self, trainer: Any) -> Mapping[str, Tensor]:
        """What the objective's next stage needs of a trained trainer beside the model, such as a critic.

        It is saved with the state of the run, and no penalty touches it.
        """
        return {}

    def load_state_dict(self, trainer: Any, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` gave into the next stage's trainer, before it trains.

        Where the stage resumes from a checkpoint of its own, the checkpoint has the last word.
        """

    def can_resume_at(self, args: Any, rows: int, step: int) -> bool:
        """Whether a stage of `rows` rows ends in the same weights if it resumes from the checkpoint of a step.

        Otherwise the stage starts again.
        """
        return True

    # --- what a run calls --------------------------------------------------------------------------------------------

    def row_check(self) -> RowCheck | None:
        """The check of rows; None if every row is accepted."""
        return None if type(self).check_row is Objective.check_row else self.check_row

    @property
    def has_fisher(self) -> bool:
        """Whether it turns rows into sequences for the Fisher."""
        return type(self).fisher_sequences is not Objective.fisher_sequences

    def given(self, name: str, default: Any) -> Any:
        """A field of `config` as the user gave it."""
        fields = self.config if isinstance(self.config, Mapping) else vars(self.config) if self.config else {}
        return fields.get(name, default)

    def base_args(self, output_dir: str, shared: Mapping[str, Any] | None = None) -> TrainingArguments:
        """Build and check the arguments of its trainer.

        Args:
            output_dir: Any folder; each stage sets its own.
            shared: Fields of the run for sections that do not set them.

        Raises:
            ValueError: If they cannot work inside a run.
            TypeError: If ready ones are of another class.
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
            build = {"output_dir": output_dir, "report_to": "none", **(shared or {})}
            if "fp16" in values:
                build.pop("bf16", None)
            owned = {key: why for key, why in OWNED_BY_RUN.items() if key in values}
            with without_deprecations():  # TRL sets fields that transformers renames
                args = build_section(self.name, self.config_class, build | values, owned=owned)
        for key in ("load_best_model_at_end", "sync_ref_model", "cast_lm_head_to_fp32"):
            if getattr(args, key, False):
                raise ValueError(f"`{self.name}.{key}` cannot be set here: {OWNED_BY_RUN[key]}")
        if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) in _NO_LAMBDA_SCHEDULE:
            raise ValueError(
                f"`{self.name}.lr_scheduler_type` is {args.lr_scheduler_type!s}, which depends on evaluations inside "
                "a stage. Use a schedule of the step alone, such as 'cosine' or 'constant_with_warmup'."
            )
        return args

    def stage_args(
        self, base: TrainingArguments, output_dir: str, seed_offset: int, **changes: Any
    ) -> TrainingArguments:
        """Derive the arguments of one stage. Must directly precede the trainer's construction.

        `TrainingArguments` reset accelerate's global state when they are built, which breaks a trainer that is alive.

        Args:
            base: The objective's arguments.
            output_dir: The stage's folder.
            seed_offset: Added to the seeds, so that stages do not replay one shuffle.
            **changes: Other values of further fields.
        """
        recomputed: dict[str, Any] = dict.fromkeys(self.recomputed_fields)
        # TRL changes them in place.
        values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.init}
        nested = {name: copy.deepcopy(value) for name, value in values.items() if isinstance(value, dict)}
        return dataclasses.replace(
            base,
            output_dir=output_dir,
            seed=base.seed + seed_offset,
            report_to="none",
            disable_tqdm=True,
            max_grad_norm=base.max_grad_norm or 0.0,  # transformers 5 takes None, and fails at the first step
            data_seed=None if base.data_seed is None else base.data_seed + seed_offset,
            logging_nan_inf_filter=False,  # a stage stops at such a loss, so transformers need not look for it as well
            push_to_hub=False,
            save_total_limit=base.save_total_limit or 1,
            **(nested | recomputed | changes),
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
            model: The model, with its adapter if it has one.
            args: The stage's arguments.
            train_dataset: The rows of the stage.
            eval_dataset: Rows to evaluate on.
            processing_class: The tokenizer.
            reference: A full model as reference policy; None with an adapter.
            callbacks: Callbacks of the stage.
        """
        extra = dict(self.trainer_kwargs)
        if self.uses_reference and reference is not None:
            # By default TRL would load the weights on disk under the model's name, not the present ones.
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


@dataclass(frozen=True, kw_only=True)
class OnlineObjective(Objective):
    """An objective that learns from rewards of its own completions of prompts."""

    metric: str = "reward"
    greater_is_better: bool = True
    takes_rewards: bool = True

    def row_check(self) -> RowCheck:
        """The check of prompts."""
        return prompt_faults


def completion_example(prompt: Sequence[int], completion: Sequence[int]) -> Example:
    """A sequence for the Fisher, of which the completion alone is the target."""
    return Example([*prompt, *completion], [IGNORED] * len(prompt) + list(completion))
