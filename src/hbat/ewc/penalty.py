r"""The EWC penalty, its gradient and its proximal step: written once, for any torch loop.

With anchor $\theta^*$ and importance $F \ge 0$ (of shape `()` or of its parameter), summed over elements, without a
factor 1/2, as in the authors' code:

$$\Omega(\theta) = \sum_k \sum_i F_{ki} (\theta_{ki} - \theta^*_{ki})^2$$
$$\partial\Omega / \partial\theta_{ki} = 2 F_{ki} (\theta_{ki} - \theta^*_{ki})$$

It is a sum over elements: of a tensor that processes share, each adds the pull on its own part, and none communicates.

All arithmetic subtracts first and is done in float32, whatever the dtype of the weights: `grad + parameter - anchor`
in bfloat16 is wrong by a quarter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbat.engines.sharded import parts_of, summed
from hbat.ewc.kernels import Block, add_small_pulls_, walk_blocks
from hbat.ewc.parameters import require_counterparts


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


def ewc_penalty(
    parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor | float]
) -> Tensor:
    r"""Weighted squared distance of `parameters` from `anchor`, to be added to a loss.

    $\Omega(\theta) = \sum_k F_k \lVert \theta_k - \theta^*_k \rVert^2$, summed over elements. Costs an autograd graph
    and about three copies of the weights in memory; `add_penalty_gradient_` gives the same gradient without them.

    Args:
        parameters: Parameters by name.
        anchor: Weights to pull to, same names and shapes.
        importance: $F \ge 0$ by name, times any strength; each a number, of shape `()`, or of its parameter's shape.

    Returns:
        Scalar of shape `()` in float32, differentiable in `parameters`.

    Raises:
        KeyError: If a parameter has no anchor or no importance.
    """
    require_counterparts(parameters, anchor, "anchor")
    require_counterparts(parameters, importance, "importance")
    terms = [
        (importance[name] * (each.float() - anchor[name].float()).square()).sum() for name, each in parameters.items()
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def add_penalty_gradient_(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    *,
    strength: float = 1.0,
    scale: float = 1.0,
    measure: bool = False,
) -> PenaltyStatistics | None:
    r"""Add the gradient of `strength` times the penalty to each parameter's `.grad`, in place.

    Equals autograd through `ewc_penalty` to rounding, with one read of parameter, anchor and gradient, one write of
    the gradient, and at most 4 MiB of scratch memory on a CPU. Parameters whose `.grad` is None get none: the
    optimizer skips them too.

    Args:
        parameters: Parameters by name, with gradients.
        anchor: Weights to pull to.
        importance: $F \ge 0$ by name.
        strength: Factor of the penalty, such as `f_max`.
        scale: Factor the gradients already carry (a loss scaler's), applied to the added part too.
        measure: Also read off the statistics, with the norm of the gradients as they were before.

    Returns:
        The statistics where `measure` is set, with the effect of `scale` taken out, else None.
    """
    # Measured apart, so that what is added does not depend on whether a step is logged.
    measured = (
        measure_penalty(parameters, anchor, importance, strength=strength, gradient_scale=scale) if measure else None
    )
    factor = 2.0 * scale * strength
    own, start, weight = parts_of(parameters), parts_of(anchor), parts_of(importance)
    large = add_small_pulls_(own, start, weight, factor)
    for block in walk_blocks(large, start, weight, with_gradient=True):
        _add_pull_(block, factor)
    return measured


@torch.no_grad()
def proximal_step_(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    *,
    strength: float,
    learning_rates: Mapping[str, float],
) -> None:
    r"""Pull each parameter towards its anchor, in place, after an optimizer step.

    $\theta \leftarrow \theta^* + (\theta - \theta^*) / (1 + 2 \eta c)$ with $c$ = `strength` times importance: the
    exact minimiser of $\lVert x - \theta \rVert^2 / (2\eta) + c \lVert x - \theta^* \rVert^2$, so it is stable for
    any strength. It does not pass through Adam's scaling, as AdamW's weight decay does not.

    Args:
        parameters: Parameters by name.
        anchor: Weights to pull to.
        importance: $F \ge 0$ by name.
        strength: Factor of the penalty.
        learning_rates: $\eta$ of the step just taken, by name; parameters without one stay as they are.
    """
    moved = parts_of({name: each for name, each in parameters.items() if name in learning_rates})
    for block in walk_blocks(moved, parts_of(anchor), parts_of(importance), with_gradient=False):
        shrink = 1.0 + 2.0 * learning_rates[block.name] * strength * block.importance
        block.parameter.copy_(block.difference.div_(shrink).add_(block.anchor))


def _add_pull_(block: Block, factor: float) -> None:
    # Each form reads and writes every block once; the general one passes over the scratch block once more.
    if not isinstance(block.importance, Tensor):
        block.gradient.add_(block.difference, alpha=factor * block.importance)
    elif block.gradient.dtype == block.importance.dtype == torch.float32 and block.importance.dim() > 0:
        block.gradient.addcmul_(block.difference, block.importance, value=factor)
    else:
        block.gradient.add_(block.difference.mul_(block.importance), alpha=factor)
