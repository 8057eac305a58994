"""What the stages of a run found important, by objective, and what it makes of the next stage's penalty."""

import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hbat.config.ewc import EWCConfig
from hbat.engines.sharded import shared_as, whole_shape
from hbat.ewc.importance import (
    accumulate,
    effective_tensors,
    most_important,
    normalize,
    normalize_to_stage,
    relative_importance,
    tensor_means,
    weighted_sum,
)
from hbat.state.plan import Stage

_SATURATED_BELOW = 2.0

#: What a stage leaves, by parameter name: its squared displacement; and its path integral or Fisher information, if
#: the source is one of these.
DISPLACEMENT, IMPORTANCE = "displacement", "importance"
KINDS = (DISPLACEMENT, IMPORTANCE)

Record = Mapping[str, Mapping[str, Tensor]]  # tensors by kind and parameter name


class SaturationWarning(UserWarning):
    """The softmax gave (nearly) all importance to one tensor, so the penalty holds back nothing else."""


class Consolidation:
    """What each objective accumulated. A stage is held back by that of the *other* objectives."""

    def __init__(self, config: EWCConfig, seed: int) -> None:
        self.config = config
        self._seed = seed
        self.accumulated: dict[str, dict[str, dict[str, Tensor]]] = {}

    def add(self, objective: str, record: Record) -> None:
        """Add what a stage leaves to its objective's sums, on the CPU."""
        sums = self.accumulated.setdefault(objective, {})
        for kind, tensors in record.items():
            addition = {name: tensor.cpu() for name, tensor in tensors.items()}
            if kind in sums:
                accumulate(sums[kind], addition)
            else:
                sums[kind] = addition  # not copied: it can be model-sized

    def importance(self, stage: Stage, parameters: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Normalized importance for a stage's penalty, on the CPU, summed over the objectives that hold it back.

        Of the trained `parameters` only the shapes count. None if no other objective has trained yet.
        """
        parts = [self._normalized(record, stage, _sizes(parameters)) for _, record in self._others(stage)]
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            accumulate(total, part)
        shared = effective_tensors(total)
        if self.config.normalization == "softmax" and self.config.strength > 0 and shared < _SATURATED_BELOW:
            warnings.warn(
                f"{stage}: the softmax is saturated, the penalty holds {shared:.2f} effective tensors of "
                f"{len(total)}. Set `ewc.normalization: stage`, or lower `ewc.importance_scale`.",
                SaturationWarning,
                stacklevel=2,
            )
        return total

    def frozen(self, stage: Stage, parameters: Mapping[str, Tensor]) -> set[str]:
        """Names of the `freeze` fraction of tensors with the largest importance, which a stage does not update."""
        total: dict[str, Tensor] = {}
        for _, record in self._others(stage) if self.config.freeze > 0 else ():
            moved, sizes = record[DISPLACEMENT], _sizes(parameters)
            accumulate(total, normalize_to_stage(self._raw(record, stage), moved, sizes))
        return most_important(total, self.config.freeze)

    def predicted(
        self, stage: Stage, moved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> dict[str, float]:
        r"""Predict by how much a stage raised the loss of each other objective: $\sum_j w_j \cdot \sum_i F_i d_i$.

        The sum of the path integral is what the objective's stages took off its loss, the other one how much of
        their way the stage went, whose squared displacement is `moved`. Empty unless the source is `path`.
        """
        if self.config.source != "path":
            return {}
        sizes, increase = _sizes(parameters), {}
        for objective, record in self._others(stage):
            importance = normalize_to_stage(self._raw(record, stage), record[DISPLACEMENT], sizes)
            counts = [sizes[name] for name in record[IMPORTANCE]]
            gained = float(tensor_means(record[IMPORTANCE]) @ torch.tensor(counts, dtype=torch.float64))
            increase[objective] = max(gained, 0.0) * weighted_sum(importance, moved, sizes)
        return increase

    def _others(self, stage: Stage) -> Iterator[tuple[str, Record]]:
        return ((name, record) for name, record in self.accumulated.items() if name != stage.objective and record)

    def _normalized(self, record: Record, stage: Stage, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        config, moved, raw = self.config, record[DISPLACEMENT], self._raw(record, stage)
        if config.normalization != "stage":
            return normalize(raw, config.normalization, config.importance_scale if config.source != "random" else 1.0)
        importance = normalize_to_stage(raw, moved, sizes)
        if config.method == "gradient":
            return importance
        # So that 1 + 2 lr strength F of the proximal step is 1 + strength u lr / s: see the help of `method`.
        elements = sum(sizes.values())
        mean = weighted_sum(dict.fromkeys(moved, torch.ones(())), moved, sizes) / elements
        return {name: tensor * (0.5 * elements * math.sqrt(mean)) for name, tensor in importance.items()}

    def _raw(self, record: Record, stage: Stage) -> Mapping[str, Tensor]:
        source, moved = self.config.source, record[DISPLACEMENT]
        if source == "displacement":
            return moved
        if source in {"path", "relative"}:
            return relative_importance(moved, record.get(IMPORTANCE), self.config.damping)
        if source == "fisher":
            return record[IMPORTANCE]
        if source == "uniform":
            return {name: torch.ones(()) for name in moved}
        generator = torch.Generator().manual_seed(self._seed + stage.index)
        return {
            name: shared_as(torch.rand(whole_shape(tensor), generator=generator), tensor).cpu()
            for name, tensor in moved.items()
        }


def _sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: math.prod(whole_shape(parameter)) for name, parameter in parameters.items()}
