"""Options of elastic weight consolidation, with their help texts and checks."""

from dataclasses import dataclass, field
from typing import Literal

from hbat.config.fields import check_choice, check_number, check_whole

Source = Literal["path", "relative", "displacement", "fisher", "uniform", "random"]
Granularity = Literal["tensor", "element"]
Normalization = Literal["stage", "mean", "max", "softmax"]
Method = Literal["gradient", "proximal"]
Estimator = Literal["gnb", "empirical"]

#: The factor by which the authors' code multiplies a displacement before squaring it.
AUTHORS_IMPORTANCE_SCALE = 1e10

_AUTHORS_PRESET = {
    "source": "displacement",
    "granularity": "tensor",
    "normalization": "softmax",
    "importance_scale": AUTHORS_IMPORTANCE_SCALE,
    "method": "gradient",
    "freeze": 0.0,
}


@dataclass(kw_only=True)
class EWCConfig:
    """Configuration of elastic weight consolidation (EWC). Each field is described by its `help`."""

    preset: Literal["authors"] | None = field(
        default=None,
        metadata={
            "help": "Named set of options. `authors` reproduces the EWC of the authors' code: `source: displacement`, "
            "`granularity: tensor`, `normalization: softmax`, `importance_scale: 1e10`, `method: gradient` and "
            "`freeze: 0`. `strength` and all other sections keep their values; examples/configs/authors.yaml also "
            "sets the authors' optimizers and epochs. With real displacements this softmax selects a single tensor, "
            "so use the preset for comparison only."
        },
    )
    strength: float = field(
        default=0.5,  # the best of five in docs/does-it-work.md, sampled; greedily as good as 1
        metadata={
            "help": "Strength of the penalty, the paper's F_max. With `normalization: stage` it is what a stage pays, "
            "in the unit of its loss, for moving every weight as far as the other objective has moved it: one value "
            "serves every learning rate, batch size, model size and adapter rank. `0` disables the penalty."
        },
    )
    source: Source = field(
        default="path",  # docs/does-it-work.md, "What brings it": ahead of every other source
        metadata={
            "help": "What importance is computed from. `path`: how much of the other objective's loss decrease "
            "each weight brought (its path integral), over how far it moved; needs one float32 number per"
            " trained weight while a stage trains, and a copy of the gradient during each step (on a CPU "
            "all the time). `relative`: one over how far the other objective moved each weight. "
            "`displacement`: how far it moved, as in the paper. `fisher`: the diagonal Fisher information"
            " of the log-likelihood on its data. `uniform` (plain L2 penalty) and `random` are controls."
        },
    )
    damping: float = field(
        default=1.0,  # docs/does-it-work.md, "What brings it": neither a tenth nor ten times is better
        metadata={
            "help": "Multiple of a tensor's mean squared displacement that is added to the squared displacement of "
            "each of its weights before `path` and `relative` divide by it."
        },
    )
    granularity: Granularity = field(
        default="element",  # the same place: as good as "tensor", at a strength with a meaning
        metadata={
            "help": "Whether importance has one value per `element` of a tensor or one per `tensor`. The latter needs "
            "almost no memory."
        },
    )
    normalization: Normalization = field(
        default="stage",
        metadata={
            "help": "How importance is normalized, for each other objective before they are added. `stage`: such that "
            "moving every weight as far as that objective moved it costs `strength`. `mean`: the mean over all "
            "elements is 1/K for K tensors, so one value per tensor sums to 1. `max`: the largest value is 1. "
            "`softmax`: a softmax over tensors, as in the authors' code; requires `granularity: tensor` and depends "
            "on `importance_scale`."
        },
    )
    importance_scale: float = field(
        default=AUTHORS_IMPORTANCE_SCALE,
        metadata={
            "help": "Factor by which the displacement is multiplied before squaring, so the softmax is taken of "
            "`importance_scale`^2 times the accumulated squared displacement. The default is that of the authors' "
            "code. Only used with `normalization: softmax`."
        },
    )
    method: Method = field(
        default="gradient",
        metadata={
            "help": "How the penalty is applied. `gradient`: its gradient is added to the loss gradient before "
            "clipping, as if it were part of the loss. `proximal`: after each optimizer step the distance to the "
            "anchor is divided by 1 + `strength` * u * lr / s, where s is the root mean square of how far the other "
            "objective moved the weights, and u the importance with a mean of 1 over what it moved; independent of "
            "the optimizer's scaling and of the learning rate, and stable at any strength."
        },
    )
    freeze: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of tensors, those with the largest importance, that are not updated during a stage. "
            "Must be below 1; at least one tensor always trains."
        },
    )
    estimator: Estimator = field(
        default="gnb",
        metadata={
            "help": "Estimator of the Fisher information. `gnb`: Gauss-Newton-Bartlett with labels sampled from the "
            "model; unbiased, one backward pass per batch. `empirical`: uses the labels of the data, one backward "
            "pass per sample. Only used with `source: fisher`."
        },
    )
    fisher_samples: int = field(
        default=256,
        metadata={
            "help": "Maximum number of rows of a stage's data that the Fisher information is estimated on. Only used "
            "with `source: fisher`."
        },
    )
    fisher_batch_size: int = field(
        default=8,
        metadata={
            "help": "Number of rows per batch of the `gnb` estimator. Does not change the expected value of the "
            "estimate. Only used with `source: fisher`."
        },
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
        check_choice("ewc.estimator", self.estimator, Estimator)
        check_number("ewc.strength", self.strength, 0)
        check_number("ewc.damping", self.damping, 0)
        check_number("ewc.importance_scale", self.importance_scale, 0)
        check_number("ewc.freeze", self.freeze, 0, 1)
        if self.freeze == 1:
            raise ValueError(f"`ewc.freeze` is {self.freeze!r}; it must be below 1, or nothing is left to train.")
        check_whole("ewc.fisher_samples", self.fisher_samples, 1)
        check_whole("ewc.fisher_batch_size", self.fisher_batch_size, 1)
        if self.normalization == "softmax" and self.granularity == "element":
            raise ValueError(
                "`ewc.normalization: softmax` is taken over tensors, but `ewc.granularity` is 'element'. "
                "Set `granularity: tensor` or `normalization: stage`."
            )

    def _apply_authors_preset(self) -> None:
        for name, value in _AUTHORS_PRESET.items():
            given = getattr(self, name)
            if given not in {type(self).__dataclass_fields__[name].default, value}:
                raise ValueError(
                    f"`ewc.preset: authors` sets `ewc.{name}` to {value!r}, but {given!r} was given. Remove one of "
                    "them."
                )
            setattr(self, name, value)
