"""How much each tensor or element of a model matters to an objective: measured, accumulated, normalised.

Raw importance is what a stage yields (squared displacement or Fisher); normalised importance is what the penalty
takes. Both are float32, finite and non-negative, of shape `()` for a tensor as a whole or of the tensor's own shape.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hbat.engines.sharded import as_part, part_of, smallest, summed
from hbat.ewc.parameters import require_counterparts

#: Elements that are summed in float64 at a time.
_BLOCK = 1 << 22


@torch.no_grad()
def displacement(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    granularity: str = "element",
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    r"""Squared change of each parameter over a stage: $d_i = (\theta_i - \theta^*_i)^2$.

    Args:
        parameters: Weights at the stage's end, by name.
        anchor: Weights at its start, same names and shapes.
        granularity: `element`, or `tensor` for the mean of $d$ over each tensor's elements.
        device: Where the result shall lie; each tensor's goes there before the next one is worked on.

    Returns:
        Raw importance in float32, on the device of the parameters where no other is asked for.

    Raises:
        ValueError: If a change is not finite.
    """
    require_counterparts(parameters, anchor, "anchor")
    result, extremes, sums = {}, [], []
    for name, each in parameters.items():
        squared = (part_of(each).float() - part_of(anchor[name]).to(each.device).float()).square_()
        extremes.append(_extremes(squared))
        if granularity == "element":
            result[name] = as_part(squared, each).to(device or each.device)
        else:
            sums.append(_sum(squared))
    _require_valid(parameters, extremes, "displacement")
    if granularity == "element":
        return result
    means = _means(parameters, sums).float()
    return {name: mean.to(device or each.device) for (name, each), mean in zip(parameters.items(), means, strict=True)}


@torch.no_grad()
def accumulate(total: dict[str, Tensor], addition: Mapping[str, Tensor]) -> None:
    """Add a stage's raw importance to an objective's sum, in place: $A_n = A_{n-1} + d_n$.

    Args:
        total: The sum so far; empty before the first stage.
        addition: What the stage yields.
    """
    if not total:
        total.update({name: each.clone() for name, each in addition.items()})
        return
    require_counterparts(total, addition, "importance")
    for name, each in total.items():
        each.add_(addition[name].to(each.device))


@torch.no_grad()
def normalize(raw: Mapping[str, Tensor], normalization: str = "mean", scale: float = 1.0) -> dict[str, Tensor]:
    r"""Turn raw importance into the penalty's $F$.

    With K tensors: `mean` gives $F = A / (K \cdot \mathrm{mean}(A))$, where the mean runs over all entries (elements
    or tensors), so that $F$ is free of $A$'s scale and a uniform $A$ gives $1/K$ everywhere; over tensors it sums to
    one. `max` gives $F = A / \max(A)$. `softmax` gives $F = \mathrm{softmax}_k(s^2 A_k)$ over tensors, which depends
    on $A$'s scale: with the authors' $s = 10^{10}$ it is one-hot for real displacements.

    Args:
        raw: Raw importance by name.
        normalization: `mean`, `max` or `softmax`.
        scale: $s$ of the softmax.

    Returns:
        Importance of the same shapes; all zero where `raw` is.

    Raises:
        ValueError: If an entry is negative or not finite, or the softmax is asked for over elements.
    """
    extremes = _require_valid(raw, [_extremes(part_of(each)) for each in raw.values()], "importance")
    if not raw:
        return {}
    if normalization == "softmax":
        return _softmax(raw, scale)
    if normalization == "max":
        divisor = -float(extremes[:, 1].min())
    else:
        entries = sum(each.numel() for each in raw.values())
        sums = torch.tensor([_sum(part_of(each)) for each in raw.values()], dtype=torch.float64)
        divisor = math.fsum(summed(sums, raw.values()).tolist()) / entries * len(raw)
    if divisor == 0.0:
        return {name: torch.zeros_like(each) for name, each in raw.items()}
    return {name: _divided(each, divisor) for name, each in raw.items()}


def effective_tensors(importance: Mapping[str, Tensor]) -> float:
    r"""How many tensors share the penalty: $1 / \sum_k p_k^2$ with $p$ the tensors' mean importance over its sum.

    Args:
        importance: Importance by name.

    Returns:
        Between 1 (a single tensor holds it all) and the number of tensors; 0 where all importance is zero.
    """
    means = tensor_means(importance)
    total = float(means.sum())
    return 0.0 if total == 0.0 else float(1.0 / (means / total).square().sum())


def most_important(raw: Mapping[str, Tensor], fraction: float) -> set[str]:
    """Pick the tensors with the largest mean importance.

    Args:
        raw: Importance by name.
        fraction: Share of the tensors to pick, rounded down.

    Returns:
        Their names; never those of all tensors.
    """
    count = max(0, min(int(fraction * len(raw)), len(raw) - 1))
    order = torch.argsort(tensor_means(raw), descending=True, stable=True)[:count].tolist()
    names = list(raw)
    return {names[index] for index in order}


def tensor_means(tensors: Mapping[str, Tensor]) -> Tensor:
    """Average each tensor over all its elements, wherever they lie: one collective.

    Args:
        tensors: Tensors by name.

    Returns:
        Means in float64 on the CPU, in the same order.
    """
    return _means(tensors, [_sum(part_of(each)) for each in tensors.values()])


def _means(tensors: Mapping[str, Tensor], sums: Sequence[float]) -> Tensor:
    counts = torch.tensor([each.numel() for each in tensors.values()], dtype=torch.float64)
    return summed(torch.tensor(sums, dtype=torch.float64), tensors.values()) / counts


def _sum(tensor: Tensor) -> float:
    # In float64, which torch converts to before it adds up: so never the whole tensor at once.
    pieces = tensor.reshape(-1).split(_BLOCK)
    return float(torch.stack([piece.sum(dtype=torch.float64) for piece in pieces]).sum())


def _divided(tensor: Tensor, divisor: float) -> Tensor:
    factor, limits = 1.0 / divisor, torch.finfo(torch.float32)
    if tensor.dtype == torch.float32 and limits.tiny <= factor <= limits.max:
        return tensor * factor
    return (tensor.double() / divisor).float()  # a factor that float32 does not hold


def _softmax(raw: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    if any(each.dim() > 0 for each in raw.values()):
        raise ValueError("`normalization='softmax'` runs over tensors but the importance is per element; use 'mean'.")
    exponents = torch.stack([each.double().cpu() for each in raw.values()]) * scale**2
    shares = torch.softmax(exponents, dim=0).float()
    return {name: share.to(each.device) for (name, each), share in zip(raw.items(), shares, strict=True)}


def _extremes(part: Tensor) -> Tensor:
    # Smallest and negated largest entry, so that both are minima. A part may be empty; zero changes no verdict.
    if part.numel() == 0:
        return part.new_zeros(2, dtype=torch.float32)
    low, high = part.aminmax()
    return torch.stack([low, -high]).float()


def _require_valid(tensors: Mapping[str, Tensor], extremes: Sequence[Tensor], what: str) -> Tensor:
    if not tensors:
        return torch.empty(0, 2)
    found = smallest(torch.stack([each.to(extremes[0].device) for each in extremes]), tensors.values())
    valid = (found[:, 0] >= 0) & torch.isfinite(found[:, 1])  # NaN fails the first comparison
    for index in (~valid).nonzero().flatten().tolist():
        low, high = found[index].tolist()
        raise ValueError(
            f"The {what} of {list(tensors)[index]!r} is not finite and non-negative (smallest {low}, largest "
            f"{-high}). The weights have diverged: lower the learning rate."
        )
    return found
