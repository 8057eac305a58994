"""What a user can set: the fields of a run and of EWC, their help and their validation. Imports no trainer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hbat.sections import build_section, nearest

Source = Literal["displacement", "fisher", "uniform", "random"]
Granularity = Literal["tensor", "element"]
Normalization = Literal["mean", "max", "softmax"]
Method = Literal["gradient", "proximal"]
Estimator = Literal["gnb", "empirical"]
OptimizerState = Literal["reset", "carry"]
LRSchedule = Literal["stage", "run", "decay"]
OnBadRows = Literal["raise", "drop"]

#: The scale that the authors' code applies to a displacement before it squares it.
AUTHORS_IMPORTANCE_SCALE = 1e10


def _check_choice(name: str, value: object, choices: object) -> None:
    valid = get_args(choices)
    if value not in valid:
        raise ValueError(
            f"`{name}` is {value!r}, which is not one of {', '.join(map(repr, valid))}.{nearest(str(value), valid)}"
        )


def _check_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        bound = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"`{name}` is {value!r}; it must be a number {bound}.")


def _check_whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {low}.")


@dataclass(kw_only=True)
class EWCConfig:
    """How elastic weight consolidation holds a stage back. The help of each field is its description."""

    preset: Literal["authors"] | None = field(
        default=None,
        metadata={
            "help": "`authors` reproduces the authors' code: displacement per tensor, softmax of the displacement "
            "scaled by 1e10 inside the square, penalty by gradient. Only `f_max` can be set beside it. With real "
            "displacements this softmax picks a single tensor, so it is offered for comparison, not for use."
        },
    )
    f_max: float = field(
        default=10.0,
        metadata={
            "help": "Strength of the penalty: the coefficient of an element is f_max times its importance. 0 switches "
            "the penalty off. The best value depends on the learning rate; `ewc/grad_norm_ratio` shows its effect."
        },
    )
    source: Source = field(
        default="displacement",
        metadata={
            "help": "What importance is computed from: how far the other objectives' stages moved the weights "
            "(`displacement`, no pass over the data), the diagonal `fisher` of the log-likelihood on their data, or "
            "the controls `uniform` (plain L2 pull to the anchor) and `random`."
        },
    )
    granularity: Granularity = field(
        default="element",
        metadata={
            "help": "One importance for each `element` of a tensor, or one for each `tensor` (almost no memory)."
        },
    )
    normalization: Normalization = field(
        default="mean",
        metadata={
            "help": "`mean`: importance of K tensors sums to one over tensors (its mean over elements is 1/K). `max`: "
            "the largest is one. `softmax`: over tensors, as in the authors' code; depends on `importance_scale`."
        },
    )
    importance_scale: float = field(
        default=AUTHORS_IMPORTANCE_SCALE,
        metadata={
            "help": "Only for `softmax`: the displacement is multiplied by this before it is squared, so the softmax "
            "sees importance_scale^2 times the accumulated displacement. 1e10 is the authors' code."
        },
    )
    method: Method = field(
        default="gradient",
        metadata={
            "help": "`gradient`: the penalty's gradient joins the task's before clipping, as if it were part of the "
            "loss. `proximal`: after the optimizer step the weights are pulled towards the anchor by 1/(1 + 2 lr c); "
            "independent of Adam's scaling, stable for any strength, and needs a larger `f_max`."
        },
    )
    freeze: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the tensors, those with the largest importance, that get no update at all in a stage."
        },
    )
    estimator: Estimator = field(
        default="gnb",
        metadata={
            "help": "For `source: fisher`. `gnb` samples the labels from the model and is unbiased with one backward "
            "pass a batch; `empirical` uses the labels of the data, one backward pass a sample."
        },
    )
    fisher_samples: int = field(
        default=256, metadata={"help": "For `source: fisher`: at most this many rows of a stage's data are used."}
    )
    fisher_batch_size: int = field(
        default=8,
        metadata={"help": "For `source: fisher` with `gnb`: rows in a batch. Does not change the expectation."},
    )

    def __post_init__(self) -> None:
        if self.preset == "authors":
            self._apply_authors_preset()
        elif self.preset is not None:
            raise ValueError(f"`ewc.preset` is {self.preset!r}; the only preset is 'authors'.")
        _check_choice("ewc.source", self.source, Source)
        _check_choice("ewc.granularity", self.granularity, Granularity)
        _check_choice("ewc.normalization", self.normalization, Normalization)
        _check_choice("ewc.method", self.method, Method)
        _check_choice("ewc.estimator", self.estimator, Estimator)
        _check_number("ewc.f_max", self.f_max, 0)
        _check_number("ewc.importance_scale", self.importance_scale, 0)
        _check_number("ewc.freeze", self.freeze, 0, 1)
        _check_whole("ewc.fisher_samples", self.fisher_samples, 1)
        _check_whole("ewc.fisher_batch_size", self.fisher_batch_size, 1)
        if self.normalization == "softmax" and self.granularity == "element":
            raise ValueError(
                "`ewc.normalization: softmax` runs over tensors but `ewc.granularity` is 'element'. "
                "Set `granularity: tensor`, or take `normalization: mean`."
            )

    def _apply_authors_preset(self) -> None:
        fixed: dict[str, object] = {
            "source": "displacement",
            "granularity": "tensor",
            "normalization": "softmax",
            "importance_scale": AUTHORS_IMPORTANCE_SCALE,
            "method": "gradient",
            "freeze": 0.0,
        }
        for name, value in fixed.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in {default, value}:
                raise ValueError(
                    f"`ewc.preset: authors` sets `ewc.{name}` to {value!r}, but {getattr(self, name)!r} was given. "
                    "Leave one of the two out."
                )
            setattr(self, name, value)


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
        metadata={"help": "The objectives of a round in order: `sft`, `dpo`, or `Objective` objects of your own."},
    )
    sft: Any = field(
        default=None, metadata={"help": "Fields of trl.SFTConfig for the SFT stages (mapping or object)."}
    )
    dpo: Any = field(
        default=None, metadata={"help": "Fields of trl.DPOConfig for the DPO stages (mapping or object)."}
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
    average: Any = field(
        default=1.0,
        metadata={
            "help": "Weights after a stage = start + average * (end - start), one number for all objectives or a "
            "mapping by objective. 1.0 keeps the end as it is."
        },
    )
    on_bad_rows: OnBadRows = field(
        default="raise",
        metadata={
            "help": "Rows that cannot be trained on: `raise` an error that names them, or `drop` and count them."
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
        _check_whole("num_rounds", self.num_rounds, 1)
        _check_whole("seed", self.seed, 0)
        self._check_objectives()
        _check_choice("optimizer_state", self.optimizer_state, OptimizerState)
        _check_choice("on_bad_rows", self.on_bad_rows, OnBadRows)
        for name in self.objective_names:
            _check_choice("lr_schedule", self.lr_schedule_of(name), LRSchedule)
            _check_number("average", self.average_of(name), 0, 1)
        if isinstance(self.ewc, Mapping):
            self.ewc = build_section("ewc", EWCConfig, self.ewc)
        if not isinstance(self.ewc, EWCConfig | None):
            raise TypeError(f"`ewc` is a {type(self.ewc).__name__}; give a mapping, an EWCConfig or null.")

    def _check_objectives(self) -> None:
        if not isinstance(self.objectives, list | tuple) or not self.objectives:
            raise ValueError(f"`objectives` is {self.objectives!r}; give a list such as ['sft', 'dpo'].")
        names = self.objective_names
        if len(set(names)) != len(names):
            raise ValueError(f"`objectives` is {names}; an objective can stand in a round only once.")

    @property
    def objective_names(self) -> list[str]:
        """Names of the objectives of a round, in order."""
        return [each if isinstance(each, str) else str(each.name) for each in self.objectives]

    def lr_schedule_of(self, objective: str) -> str:
        """Learning-rate schedule of one objective.

        Args:
            objective: Its name.

        Returns:
            `stage`, `run` or `decay`.
        """
        return str(self._by_objective("lr_schedule", objective, "stage"))

    def average_of(self, objective: str) -> float:
        """Share of a stage's movement that is kept for one objective.

        Args:
            objective: Its name.

        Returns:
            A number between 0 and 1.
        """
        value: float = self._by_objective("average", objective, 1.0)
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
