"""What a user can set about elastic weight consolidation: fields, help and validation."""

from dataclasses import dataclass, field
from typing import Literal

from hbat.config.fields import check_choice, check_number, check_whole

Source = Literal["displacement", "fisher", "uniform", "random"]


Granularity = Literal["tensor", "element"]


Normalization = Literal["mean", "max", "softmax"]


Method = Literal["gradient", "proximal"]


AnchorDevice = Literal["model", "cpu"]


Estimator = Literal["gnb", "empirical"]


#: The scale that the authors' code applies to a displacement before it squares it.
AUTHORS_IMPORTANCE_SCALE = 1e10


@dataclass(kw_only=True)
class EWCConfig:
    """How elastic weight consolidation holds a stage back. The help of each field is its description."""

    preset: Literal["authors"] | None = field(
        default=None,
        metadata={
            "help": "`authors` sets the EWC of the authors' code, and nothing outside this section: `source: "
            "displacement`, `granularity: tensor`, `normalization: softmax`, `importance_scale: 1e10`, `method: "
            "gradient`, `freeze: 0`; `f_max` stays free. Their fresh optimizers and epochs are in "
            "examples/configs/authors.yaml. With real displacements this softmax picks a single tensor, so it is "
            "offered for comparison, not for use."
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
    anchor_device: AnchorDevice = field(
        default="model",
        metadata={
            "help": "Where anchor and importance lie during a stage: on the device of the `model`, or on the `cpu`, "
            "from where a GPU fetches them piece by piece at each optimizer step, two pieces ahead. `cpu` saves at "
            "most a copy of the weights for each of the two and costs the time of the transfer. Little is gained with "
            "an adapter, and nothing for the anchor in a preference stage of a full model, where it is the reference "
            "policy. Changes no result."
        },
    )
    freeze: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the tensors, those with the largest importance, that get no update at all in a "
            "stage. Below 1: at least one tensor always trains."
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
        check_choice("ewc.source", self.source, Source)
        check_choice("ewc.granularity", self.granularity, Granularity)
        check_choice("ewc.normalization", self.normalization, Normalization)
        check_choice("ewc.method", self.method, Method)
        check_choice("ewc.anchor_device", self.anchor_device, AnchorDevice)
        check_choice("ewc.estimator", self.estimator, Estimator)
        check_number("ewc.f_max", self.f_max, 0)
        check_number("ewc.importance_scale", self.importance_scale, 0)
        check_number("ewc.freeze", self.freeze, 0, 1)
        if self.freeze == 1:
            raise ValueError(f"`ewc.freeze` is {self.freeze!r}; it must be below 1, or nothing is left to train.")
        check_whole("ewc.fisher_samples", self.fisher_samples, 1)
        check_whole("ewc.fisher_batch_size", self.fisher_batch_size, 1)
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
