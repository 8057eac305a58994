"""What the stages of a run found important, by objective, and what it makes of the next stage's penalty."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from hbat.config.ewc import EWCConfig
from hbat.engines.sharded import shared_as
from hbat.ewc.importance import accumulate, effective_tensors, most_important, normalize
from hbat.state.plan import Stage

_SATURATED_BELOW = 2.0


class SaturationWarning(UserWarning):
    """The softmax gave (nearly) all importance to one tensor, so the penalty holds back nothing else."""


class Consolidation:
    """Raw importance accumulated by each objective. A stage is held back by that of the *other* objectives.

    Args:
        config: How importance is computed.
        seed: Seed of the random control.
    """

    def __init__(self, config: EWCConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self.accumulated: dict[str, dict[str, Tensor]] = {}

    def add(self, objective: str, raw: Mapping[str, Tensor]) -> None:
        """Add the raw importance that a stage yields to its objective's sum, on the CPU."""
        addition = {name: tensor.cpu() for name, tensor in raw.items()}
        if objective in self.accumulated and self.config.source in {"displacement", "fisher"}:
            accumulate(self.accumulated[objective], addition)
        else:
            # Controls do not add up: a sum of random numbers would turn uniform. Not copied: it can be model-sized.
            self.accumulated[objective] = addition

    def control(self, parameters: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Raw importance of the controls, which depend on no training: ones, or uniform random numbers from [0, 1)."""
        if self.config.source == "uniform":
            return {name: torch.ones(()) for name in parameters}
        generator = torch.Generator().manual_seed(self._seed + stage.index)
        drawn = {}
        for name, parameter in parameters.items():
            shape = parameter.shape if self.config.granularity == "element" else ()
            drawn[name] = shared_as(torch.rand(shape, generator=generator), parameter).cpu()
        return drawn

    def importance(self, stage: Stage) -> dict[str, Tensor] | None:
        """Normalized importance for a stage's penalty, on the CPU; None if no other objective has trained yet."""
        raw = self._raw(stage)
        if raw is None:
            return None
        config = self.config
        scale = config.importance_scale if config.source != "random" else 1.0
        importance = normalize(raw, config.normalization, scale)
        shared = effective_tensors(importance)
        if config.normalization == "softmax" and config.f_max > 0 and shared < _SATURATED_BELOW:
            warnings.warn(
                f"{stage}: the softmax is saturated, the penalty holds {shared:.2f} effective tensors of "
                f"{len(importance)}. Set `ewc.normalization: mean`, or lower `ewc.importance_scale`.",
                SaturationWarning,
                stacklevel=2,
            )
        return importance

    def frozen(self, stage: Stage) -> set[str]:
        """Names of the `freeze` fraction of tensors with the largest raw importance, which a stage does not update."""
        raw = self._raw(stage) if self.config.freeze > 0 else None
        return set() if raw is None else most_important(raw, self.config.freeze)

    def _raw(self, stage: Stage) -> dict[str, Tensor] | None:
        others = [raw for objective, raw in self.accumulated.items() if objective != stage.objective and raw]
        if len(others) <= 1:
            return others[0] if others else None
        total: dict[str, Tensor] = {}
        for raw in others:
            accumulate(total, raw)
        return total
