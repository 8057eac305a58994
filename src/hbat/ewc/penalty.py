r"""The EWC penalty, its gradient and its proximal step, for any torch loop.

With anchor $\theta^*$ and importance $F \ge 0$ (one number per parameter tensor, or one per element), summed over
elements, without the factor 1/2 that arXiv:1612.00796 has, as in the code of HBAT (arXiv:2406.15178):

$$\Omega(\theta) = \sum_k \sum_i F_{ki} (\theta_{ki} - \theta^*_{ki})^2$$
$$\partial\Omega / \partial\theta_{ki} = 2 F_{ki} (\theta_{ki} - \theta^*_{ki})$$

The sum runs over elements: on sharded tensors, each process pulls its own part without communication.

All arithmetic subtracts first and is done in float32, whatever the dtype of the weights: `grad + parameter - anchor`
in bfloat16 is wrong by a quarter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbat.engines.sharded import summed
from hbat.ewc.kernels import batches, gradients_of
from hbat.ewc.parameters import require_counterparts


@dataclass(frozen=True)
class PenaltyStatistics:
    """The penalty at one point. Scalars of shape `()` in float64, on the parameters' device.

    Attributes:
        penalty: Value of the penalty.
        squared_drift: Sum of squared differences from the anchor.
        gradient_norm: 2-norm of the penalty's gradient.
        task_gradient_norm: 2-norm of the gradients before the penalty was added; 0 if none were read.
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
    r"""Measure the penalty without changing anything. With sharded parameters: one collective.

    With `gradient_scale` the gradients are read as well, divided by it, and parameters without one are skipped.
    """
    sums, count = torch.zeros(5, dtype=torch.float64), 0  # F d^2, d^2, (F d)^2, g^2, g F d
    gradients = None if gradient_scale is None else gradients_of(parameters)
    for batch in batches(parameters, anchor, importance, gradients):
        sums = sums.to(batch.parameters[0].device)
        for difference, weight, gradient in zip(batch.differences, batch.importances, batch.gradients, strict=True):
            pull = (difference * weight).float()  # the importance may be of another precision
            task = torch.zeros_like(pull) if gradient_scale is None else gradient.float() / gradient_scale
            pairs = ((pull, difference), (difference, difference), (pull, pull), (task, task), (task, pull))
            sums += torch.stack([torch.dot(left.flatten(), right.flatten()) for left, right in pairs]).double()
            count += difference.numel()
    sums = summed(torch.cat([sums, sums.new_tensor([count])]), parameters.values())
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
    r"""EWC penalty, to be added to a loss: $\Omega(\theta) = \sum_k \sum_i F_{ki} (\theta_{ki} - \theta^*_{ki})^2$.

    Without the factor 1/2 of arXiv:1612.00796. Autograd keeps about three copies of the weights;
    `add_penalty_gradient_` adds the same gradient without them.

    Args:
        parameters: Parameters $\theta$ by name, of any floating dtype.
        anchor: Weights $\theta^*$ to pull to, by name, of the same shapes.
        importance: $F \ge 0$ by name, times any strength: a number, or a tensor of shape `()` or of the parameter's.

    Returns:
        Scalar of shape `()` in float32, differentiable in `parameters`.

    Raises:
        KeyError: If a parameter has no anchor or no importance.
        ValueError: If a shape does not match.
    """
    require_counterparts(parameters, anchor, "anchor")
    require_counterparts(parameters, importance, "importance")
    terms = [
        (importance[name] * (parameter.float() - anchor[name].float()).square()).sum()
        for name, parameter in parameters.items()
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
    r"""Add the penalty's gradient $2 c F (\theta - \theta^*)$, with $c$ = `strength`, to each `.grad` in place.

    Equals autograd through `strength * ewc_penalty(...)` up to rounding, needs no graph, and about 2 MiB of scratch
    memory on a CPU. Computed in float32 and rounded once to the gradient's dtype.

    Args:
        parameters: Parameters by name. One whose `.grad` is None is skipped, as optimizers skip it.
        anchor: Weights to pull to, by name, on the same devices.
        importance: $F \ge 0$ by name: a number, or a tensor of shape `()` or of the parameter's.
        strength: Factor of the penalty.
        scale: Loss scale that the gradients carry already; the added gradient is multiplied by it too.
        measure: Return statistics, with the norm of the gradients as they were before.

    Returns:
        The statistics, with `scale` divided out, if `measure` is set; otherwise None.

    Raises:
        KeyError: If a parameter has no anchor or no importance.
    """
    # Measured apart, so that the added gradient does not depend on whether the step is logged.
    measured = (
        measure_penalty(parameters, anchor, importance, strength=strength, gradient_scale=scale) if measure else None
    )
    factor = 2.0 * scale * strength
    for batch in batches(parameters, anchor, importance, gradients_of(parameters)):
        if isinstance(batch.importances[0], Tensor):
            torch._foreach_addcmul_(batch.gradients, batch.differences, batch.importances, value=factor)
        else:
            torch._foreach_mul_(batch.differences, [factor * weight for weight in batch.importances])
            torch._foreach_add_(batch.gradients, batch.differences)
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

    $\theta \leftarrow \theta^* + (\theta - \theta^*) / (1 + 2 \eta c F)$ with $c$ = `strength`: the exact minimizer
    of $\lVert x - \theta \rVert^2 / (2\eta) + c F \lVert x - \theta^* \rVert^2$, hence stable for any strength. Like
    AdamW's weight decay, it is not scaled by Adam's second moment.

    Args:
        parameters: Parameters by name.
        anchor: Weights to pull to, by name.
        importance: $F \ge 0$ by name: a number, or a tensor of shape `()` or of the parameter's.
        strength: Factor of the penalty.
        learning_rates: $\eta$ of the step just taken, by name; parameters without one are left unchanged.

    Raises:
        KeyError: If a parameter has no anchor or no importance.
    """
    moved = {name: parameter for name, parameter in parameters.items() if name in learning_rates}
    for batch in batches(moved, anchor, importance):
        for name, parameter, start, weight, difference in zip(
            batch.names, batch.parameters, batch.anchors, batch.importances, batch.differences, strict=True
        ):
            shrink = 1.0 + 2.0 * learning_rates[name] * strength * weight
            parameter.copy_(difference.div_(shrink).add_(start))
