"""What the EWC penalty amounts to at one point: numbers for the log."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbat.ewc.blocks import Block, walk_blocks
from hbat.ewc.shards import parts_of, summed


@dataclass(frozen=True)
class PenaltyStatistics:
    """What the penalty amounts to at one point. Scalars of shape `()` in float64, on the parameters' device.

    Attributes:
        penalty: Value of the penalty.
        squared_drift: Sum of squared differences from the anchor.
        gradient_norm: 2-norm of the penalty's gradient.
        task_gradient_norm: 2-norm of the gradients as they were; 0 where none were read.
        inner_product: Inner product of those with the penalty's gradient.
        count: Number of elements.
    """

    penalty: Tensor
    squared_drift: Tensor
    gradient_norm: Tensor
    task_gradient_norm: Tensor
    inner_product: Tensor
    count: int

    @property
    def drift(self) -> Tensor:
        """Root mean square of the difference from the anchor."""
        return (self.squared_drift / max(self.count, 1)).sqrt()


@torch.no_grad()
def measure_penalty(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    *,
    strength: float = 1.0,
    gradient_scale: float | None = None,
) -> PenaltyStatistics:
    r"""Read off the penalty's statistics without changing anything. With shared parameters: one collective.

    Args:
        parameters: Parameters by name.
        anchor: Weights to pull to.
        importance: $F \ge 0$ by name.
        strength: Factor of the penalty.
        gradient_scale: Read the gradients too and take this factor out of them; parameters without one are left out.

    Returns:
        The statistics.
    """
    tally = _Tally()
    own, start, weight = parts_of(parameters), parts_of(anchor), parts_of(importance)
    for block in walk_blocks(own, start, weight, with_gradient=gradient_scale is not None):
        tally.add(block, gradient_scale)
    return tally.result(strength, parameters)


class _Tally:
    """Sums over blocks, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (5,): F d^2, d^2, (F d)^2, g^2, g F d
        self._count = 0

    def add(self, block: Block, scale: float | None = None) -> None:
        # Before the block's difference is changed; with a `scale`, its gradient too.
        pull = (block.difference * block.importance).float()  # the importance may be of another precision
        task = torch.zeros_like(pull) if scale is None else block.gradient.float() / scale
        sums = torch.stack([
            torch.dot(pull, block.difference),
            torch.dot(block.difference, block.difference),
            torch.dot(pull, pull),
            torch.dot(task, task),
            torch.dot(task, pull),
        ]).double()
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)
        self._count += block.parameter.numel()

    def result(self, strength: float, parameters: Mapping[str, Tensor]) -> PenaltyStatistics:
        sums = torch.zeros(5, dtype=torch.float64) if self._sums is None else self._sums
        sums = summed(torch.cat([sums, sums.new_tensor([self._count])]), parameters.values())
        return PenaltyStatistics(
            penalty=strength * sums[0],
            squared_drift=sums[1],
            gradient_norm=2.0 * strength * sums[2].sqrt(),
            task_gradient_norm=sums[3].sqrt(),
            inner_product=2.0 * strength * sums[4],
            count=int(sums[5]),
        )
