"""What the stages of a run have learned is important, by objective, and what the next stage makes of it."""

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
    """The softmax left (nearly) all importance to one tensor, so the penalty holds nothing else."""


class Consolidation:
    """Raw importance accumulated by each objective. A stage is held by what the *other* objectives' stages yielded.

    Args:
        config: How importance is made.
        seed: Seed of the random control.
    """

    def __init__(self, config: EWCConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self.accumulated: dict[str, dict[str, Tensor]] = {}

    def add(self, objective: str, raw: Mapping[str, Tensor]) -> None:
        """Add what a stage yielded to its objective's sum, on the CPU.

        Args:
            objective: Objective of the stage.
            raw: Its raw importance, from `raw_importance` or `diagonal_fisher`.
        """
        addition = {name: each.cpu() for name, each in raw.items()}
        if objective in self.accumulated and self.config.source in {"displacement", "fisher"}:
            accumulate(self.accumulated[objective], addition)
        else:
            # Controls do not add up: a sum of random numbers would turn uniform. Not copied: it can be model-sized.
            self.accumulated[objective] = addition

    def control(self, parameters: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Raw importance of the controls, which look at no stage.

        Args:
            parameters: Trainable parameters by name.
            stage: Stage that yields it.

        Returns:
            Ones (`uniform`), or numbers drawn evenly from [0, 1) (`random`).
        """
        shapes = {
            name: each.shape if self.config.granularity == "element" else () for name, each in parameters.items()
        }
        if self.config.source == "uniform":
            return {name: torch.ones(()) for name in shapes}
        generator = torch.Generator().manual_seed(self._seed + stage.index)
        drawn = ((name, torch.rand(shape, generator=generator)) for name, shape in shapes.items())
        return {name: shared_as(each, parameters[name]).cpu() for name, each in drawn}

    def importance(self, stage: Stage) -> dict[str, Tensor] | None:
        """Normalised importance that holds a stage back.

        Args:
            stage: The stage about to train.

        Returns:
            Importance by parameter name on the CPU, or None where no other objective has trained yet.
        """
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
        """Tensors that get no update in a stage.

        Args:
            stage: The stage about to train.

        Returns:
            Names of the `freeze` fraction of tensors with the largest raw importance.
        """
        raw = self._raw(stage) if self.config.freeze > 0 else None
        return set() if raw is None else most_important(raw, self.config.freeze)

    def _raw(self, stage: Stage) -> dict[str, Tensor] | None:
        others = [each for objective, each in self.accumulated.items() if objective != stage.objective and each]
        if len(others) <= 1:
            return others[0] if others else None
        total: dict[str, Tensor] = {}
        for each in others:
            accumulate(total, each)
        return total
