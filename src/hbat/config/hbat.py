"""What a user can set about a run: fields, help and validation. Imports no trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hbat.config.ewc import EWCConfig
from hbat.config.fields import build_section, check_choice, check_number, check_whole, nearest, shown

OptimizerState = Literal["reset", "carry"]


LRSchedule = Literal["stage", "run", "decay"]


OnBadRows = Literal["raise", "drop"]


OnNaN = Literal["stop", "rollback"]


PPOBackend = Literal["hbat", "trl"]


@dataclass(kw_only=True)
class HBATConfig:
    """A run of hybrid alignment training. The help of each field is its description."""

    output_dir: str = field(
        metadata={"help": "Folder of the run: its state, the stages' checkpoints, the final model, logs and tables."}
    )
    num_rounds: int = field(
        default=4, metadata={"help": "N: into how many parts every data set is cut. 1 is ordinary two-stage training."}
    )
    objectives: list[Any] = field(
        default_factory=lambda: ["sft", "dpo"],
        metadata={
            "help": "The objectives of a round in order: `sft`, `dpo`, `kto`, `ppo`, `grpo`, `rloo`, and from Python "
            "`Objective` objects."
        },
    )
    sft: Any = field(
        default=None, metadata={"help": "Fields of trl.SFTConfig for the SFT stages (mapping or object)."}
    )
    dpo: Any = field(
        default=None, metadata={"help": "Fields of trl.DPOConfig for the DPO stages (mapping or object)."}
    )
    kto: Any = field(
        default=None, metadata={"help": "Fields of trl.KTOConfig for the KTO stages (mapping or object)."}
    )
    ppo: Any = field(
        default=None, metadata={"help": "Fields of hbat.PPOConfig for the PPO stages (mapping or object)."}
    )
    grpo: Any = field(
        default=None, metadata={"help": "Fields of trl.GRPOConfig for the GRPO stages (mapping or object)."}
    )
    rloo: Any = field(
        default=None, metadata={"help": "Fields of trl.RLOOConfig for the RLOO stages (mapping or object)."}
    )
    ppo_backend: PPOBackend = field(
        default="hbat",
        metadata={"help": "Whose PPO trainer: hbat's own, or `trl` for TRL's, which exists below TRL 1.13."},
    )
    ewc: Any = field(
        default_factory=EWCConfig,
        metadata={"help": "Elastic weight consolidation (mapping or EWCConfig). null: plain alternation."},
    )
    optimizer_state: OptimizerState = field(
        default="carry",
        metadata={
            "help": "What a stage's optimizer starts from: `carry` the moments of the same objective's last stage, or "
            "`reset`. Learning rates are always those of the stage's own schedule."
        },
    )
    lr_schedule: Any = field(
        default="stage",
        metadata={
            "help": "Learning-rate schedule of an objective, one word for all or a mapping by objective. `stage`: the "
            "host's schedule runs anew in every stage. `run`: one schedule over all stages of the objective. `decay`: "
            "as `stage`, times 1 - n/N in round n = 0 ... N-1."
        },
    )
    end_weight: Any = field(
        default=1.0,
        metadata={
            "help": "Weights after a stage = start + end_weight * (end - start), one number for all objectives or a "
            "mapping by objective. 1.0 keeps the end as it is."
        },
    )
    on_bad_rows: OnBadRows = field(
        default="raise",
        metadata={
            "help": "Rows that cannot be trained on: `raise` an error that names them, or `drop` and count them."
        },
    )
    on_nan: OnNaN = field(
        default="stop",
        metadata={
            "help": "A loss, gradient, weight or importance that is NaN or infinite: `stop` with an error that names "
            "it, or `rollback` to the stage's start and train it with half the learning rate."
        },
    )
    max_rollbacks: int = field(
        default=3, metadata={"help": "With `on_nan: rollback`: how often a stage is rolled back before the run stops."}
    )
    keep_states: int = field(
        default=2,
        metadata={
            "help": "Complete states of the run that are kept on disk. Where a file of the newest is damaged, the run "
            "goes on from the one before. Each beyond the first takes the room of the trainable weights, and of one "
            "objective's importance and Adam moments. 1: only the newest."
        },
    )
    seed: int = field(
        default=42,
        metadata={"help": "Cuts the data sets into parts and initialises new adapters. Stages seed by section."},
    )
    report_to: Any = field(
        default="none",
        metadata={"help": "Reporters of the whole run, as in transformers: tensorboard, wandb, none, ..."},
    )
    run_name: str | None = field(default=None, metadata={"help": "Name of the run for the reporters."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Arguments of `from_pretrained` when the model is given by name or path (dtype, revision, ...)."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ValueError(f"`output_dir` is {self.output_dir!r}; name a folder for the run.")
        check_whole("num_rounds", self.num_rounds, 1)
        check_whole("seed", self.seed, 0)
        check_whole("keep_states", self.keep_states, 1)
        self._check_objectives()
        check_choice("optimizer_state", self.optimizer_state, OptimizerState)
        check_choice("on_bad_rows", self.on_bad_rows, OnBadRows)
        check_choice("on_nan", self.on_nan, OnNaN)
        check_whole("max_rollbacks", self.max_rollbacks, 0)
        check_choice("ppo_backend", self.ppo_backend, PPOBackend)
        for name in self.objective_names:
            check_choice("lr_schedule", self.lr_schedule_of(name), LRSchedule)
            check_number("end_weight", self.end_weight_of(name), 0, 1)
        if isinstance(self.ewc, Mapping):
            self.ewc = build_section("ewc", EWCConfig, self.ewc)
        if not isinstance(self.ewc, EWCConfig | None):
            raise TypeError(f"`ewc` is a {type(self.ewc).__name__}; give a mapping, an EWCConfig or null.")

    def _check_objectives(self) -> None:
        if not isinstance(self.objectives, list | tuple) or not self.objectives:
            raise ValueError(f"`objectives` is {shown(self.objectives)}; give a list such as ['sft', 'dpo'].")
        names = self.objective_names
        if len(set(names)) != len(names):
            raise ValueError(f"`objectives` is {names}; an objective can stand in a round only once.")

    @property
    def objective_names(self) -> list[str]:
        """Names of the objectives of a round, in order."""
        return [each if isinstance(each, str) else str(getattr(each, "name", each)) for each in self.objectives]

    def lr_schedule_of(self, objective: str) -> str:
        """Learning-rate schedule of one objective.

        Args:
            objective: Its name.

        Returns:
            `stage`, `run` or `decay`.
        """
        return str(self._by_objective("lr_schedule", objective, "stage"))

    def end_weight_of(self, objective: str) -> float:
        """Share of a stage's movement that is kept for one objective.

        Args:
            objective: Its name.

        Returns:
            A number between 0 and 1.
        """
        value: float = self._by_objective("end_weight", objective, 1.0)
        return value

    def _by_objective(self, name: str, objective: str, default: Any) -> Any:
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return value
        for key in value:
            if key not in self.objective_names:
                raise ValueError(
                    f"`{name}` names the objective {key!r}, which is not among {self.objective_names}."
                    f"{nearest(str(key), self.objective_names)}"
                )
        return value.get(objective, default)
