"""Distillation from a teacher: the student's own answers, and the teacher's probabilities for their tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hbat.data.faults import RowCheck
from hbat.data.formats import prompt_faults
from hbat.engines.processes import process_count
from hbat.objectives.objective import Objective

try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError as error:
    raise ImportError(
        "The objective 'distillation' needs a TRL that has `DistillationTrainer`, such as 1.16. Install a newer one."
    ) from error


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """Distillation with TRL's DistillationTrainer, from `teacher_model_name_or_path` of its section.

    The teacher is loaded once for all stages. A stage that was cut off begins again.

    Attributes:
        teacher: The loaded teacher, by name.
    """

    name: str = "distillation"
    trainer_class: type[Trainer] = DistillationTrainer
    config_class: type[TrainingArguments] = DistillationConfig
    engines: tuple[str, ...] = ("ddp",)
    teacher: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def row_check(self) -> RowCheck:
        """The check of prompts."""
        return prompt_faults

    def base_args(self, output_dir: str, shared: Mapping[str, Any] | None = None) -> TrainingArguments:
        """As `Objective.base_args`; raises ValueError without a teacher too."""
        args: Any = super().base_args(output_dir, shared)
        if not args.teacher_model_name_or_path and "teacher_model" not in self.trainer_kwargs:
            raise ValueError(
                f"`{self.name}.teacher_model_name_or_path` is missing: name the model that the answers are scored by."
            )
        return args  # type: ignore[no-any-return]

    def minimum_rows(self, args: Any) -> int:
        """Prompts of an optimizer step, over all processes: TRL drops those that do not fill one."""
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps) * process_count()

    def epoch_steps(self, args: Any, rows: int) -> int:
        """Optimizer steps of one epoch."""
        return rows // self.minimum_rows(args)

    def can_resume_at(self, args: Any, rows: int, step: int) -> bool:
        """Never: whether TRL's trainer resumes with the same answers is not tested."""
        return False

    def build_trainer(self, *, args: Any, **given: Any) -> Trainer:
        """As `Objective.build_trainer`, with the teacher."""
        if "teacher_model" in self.trainer_kwargs:
            return super().build_trainer(args=args, **given)
        name = args.teacher_model_name_or_path
        if name not in self.teacher:
            options = dict(args.teacher_model_init_kwargs or {})
            if args.teacher_model_revision is not None:
                options.setdefault("revision", args.teacher_model_revision)
            self.teacher[name] = AutoModelForCausalLM.from_pretrained(name, **options)
        args.teacher_model_init_kwargs = None  # TRL refuses them beside a loaded teacher
        taught = replace(self, trainer_kwargs={**self.trainer_kwargs, "teacher_model": self.teacher[name]})
        return Objective.build_trainer(taught, args=args, **given)
