r"""Importance of each tensor or element of a model to an objective: measured, accumulated, normalized.

A stage yields raw importance (squared displacement or Fisher information); the penalty takes normalized importance.
Both are float32, finite and non-negative, with one value per tensor (shape `()`) or per element (the tensor's shape).
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

    The importance that HBAT takes (arXiv:2406.15178). Subtracted and squared in float32.

    Args:
        parameters: Weights $\theta$ at the stage's end, by name, of any floating dtype.
        anchor: Weights $\theta^*$ at its start, of the same names and shapes.
        granularity: `element`, or `tensor` for the mean of $d$ over each tensor's elements.
        device: Device of the result, to which each tensor's moves before the next is computed; default: the
            parameters' own.

    Returns:
        Raw importance in float32, in squared units of the weights.

    Raises:
        KeyError: If a parameter has no anchor.
        ValueError: If a shape does not match or a change is not finite.
    """
    require_counterparts(parameters, anchor, "anchor")
    result, extremes, sums = {}, [], []
    for name, parameter in parameters.items():
        squared = (part_of(parameter).float() - part_of(anchor[name]).to(parameter.device).float()).square_()
        extremes.append(_extremes(squared))
        if granularity == "element":
            result[name] = as_part(squared, parameter).to(device or parameter.device)
        else:
            sums.append(_sum(squared))
    _require_valid(parameters, extremes, "displacement")
    if granularity == "element":
        return result
    means = _means(parameters, sums).float()
    return {
        name: mean.to(device or parameter.device)
        for (name, parameter), mean in zip(parameters.items(), means, strict=True)
    }


@torch.no_grad()
def accumulate(total: dict[str, Tensor], addition: Mapping[str, Tensor]) -> None:
    """Add a stage's raw importance to the sum of its objective, in place: $A_n = A_{n-1} + d_n$.

    A plain sum over the objective's stages, without decay.

    Args:
        total: The sum $A_{n-1}$ so far, by name; an empty dict before the first stage is filled with copies.
        addition: Raw importance $d_n$ of the stage, of the same shapes.

    Raises:
        KeyError: If `addition` lacks a name of `total`.
        ValueError: If a shape does not match.
    """
    if not total:
        total.update({name: tensor.clone() for name, tensor in addition.items()})
        return
    require_counterparts(total, addition, "importance")
    for name, tensor in total.items():
        tensor.add_(addition[name].to(tensor.device))


@torch.no_grad()
def relative_importance(
    moved: Mapping[str, Tensor], path: Mapping[str, Tensor] | None = None, damping: float = 1.0
) -> dict[str, Tensor]:
    r"""Importance of keeping still what another objective hardly moved: $\max(0, w_i) / (A_i + \xi M_k)$.

    With $w = 1$ it depends on the relative movement alone. With the path integral $w$ it is that of Zenke et al.
    (arXiv:1703.04200) with a damping $\xi M_k$ that has the scale of each tensor. Zero where nothing moved.

    Args:
        moved: Accumulated squared displacement $A$ of the objective, by name, one value per element or per tensor.
        path: Its accumulated path integral $w$ (see `add_path_`), of the same shapes; None for $w = 1$.
        damping: $\xi \ge 0$, a multiple of $M_k$, the mean of $A$ over tensor k.

    Returns:
        Raw importance in float32, in units of $w / A$.

    Raises:
        KeyError: If `path` lacks a name.
        ValueError: If a shape does not match.
    """
    if path is not None:
        require_counterparts(moved, path, "path integral")
    result = {}
    for (name, tensor), mean in zip(moved.items(), tensor_means(moved).tolist(), strict=True):
        squared = part_of(tensor).float()
        divisor = squared + damping * mean
        worth = torch.ones_like(squared) if path is None else part_of(path[name]).float().clamp(min=0.0)
        quotient = worth / divisor.clamp(min=torch.finfo(torch.float32).tiny)
        result[name] = as_part(quotient.where(divisor > 0.0, 0.0), tensor)
    return result


@torch.no_grad()
def normalize_to_stage(
    raw: Mapping[str, Tensor], moved: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    r"""Give importance a unit: $F_i = \Omega_i / \sum_j \Omega_j A_j$, with the sum over all elements.

    A stage that moves every element as far as the other objective has moved it then pays a penalty
    $\sum_i F_i (\theta_i - \theta^*_i)^2$ of exactly 1. Learning rate, batch size, model size, the rank of an adapter
    and the scale of the loss cancel.

    Args:
        raw: Raw importance $\Omega$ by name, one value per element or per tensor.
        moved: Accumulated squared displacement $A$ of the same objective; per tensor, its mean over the elements.
        sizes: Number of elements of each parameter; needed for values per tensor.

    Returns:
        Importance in float32, in inverse squared units of the weights; all zero if nothing important moved.

    Raises:
        ValueError: If an entry is negative or not finite.
    """
    _require_valid(raw, [_extremes(part_of(tensor)) for tensor in raw.values()], "importance")
    divisor = weighted_sum(raw, moved, sizes)
    if divisor < torch.finfo(torch.float32).tiny:  # float32 would not hold the quotients
        return {name: torch.zeros_like(tensor) for name, tensor in raw.items()}
    return {name: _divided(tensor, divisor) for name, tensor in raw.items()}


@torch.no_grad()
def weighted_sum(
    weights: Mapping[str, Tensor], values: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None
) -> float:
    r"""Sum $\sum_i F_i d_i$ over all elements, in float64; a value per tensor counts for each of its elements."""
    sums = []
    for name, value in values.items():
        weight, part = part_of(weights[name]), part_of(value)
        inner = float(weight) * _sum(part) if weight.dim() == 0 else _dot(weight, part)
        sums.append(inner * (sizes[name] if sizes is not None and part.dim() == 0 else 1))
    return float(summed(torch.tensor(sums, dtype=torch.float64), values.values()).sum())


@torch.no_grad()
def normalize(raw: Mapping[str, Tensor], normalization: str = "mean", scale: float = 1.0) -> dict[str, Tensor]:
    r"""Turn raw importance $A$ into the dimensionless $F$ of the penalty.

    With K tensors: `mean` gives $F = A / (K \cdot \mathrm{mean}(A))$, the mean over all entries (elements or tensors),
    so that $F$ does not depend on the scale of $A$ and a uniform $A$ gives $1/K$ everywhere; over tensors, $F$ sums to
    one. `max` gives $F = A / \max(A)$. `softmax` gives $F = \mathrm{softmax}_k(s^2 A_k)$ over tensors, as
    in the code of HBAT (arXiv:2406.15178), which depends on the scale of $A$: with its $s = 10^{10}$ it is one-hot
    for real displacements.

    Args:
        raw: Raw importance by name.
        normalization: `mean`, `max` or `softmax`.
        scale: $s$ of the softmax.

    Returns:
        Importance in float32, of the same shapes; all zero if `raw` is.

    Raises:
        ValueError: If an entry is negative or not finite, or the softmax is requested over elements.
    """
    extremes = _require_valid(raw, [_extremes(part_of(tensor)) for tensor in raw.values()], "importance")
    if not raw:
        return {}
    if normalization == "softmax":
        return _softmax(raw, scale)
    if normalization == "max":
        divisor = -float(extremes[:, 1].min())
    else:
        entries = sum(tensor.numel() for tensor in raw.values())
        sums = torch.tensor([_sum(part_of(tensor)) for tensor in raw.values()], dtype=torch.float64)
        divisor = math.fsum(summed(sums, raw.values()).tolist()) / entries * len(raw)
    if divisor == 0.0:
        return {name: torch.zeros_like(tensor) for name, tensor in raw.items()}
    return {name: _divided(tensor, divisor) for name, tensor in raw.items()}


def effective_tensors(importance: Mapping[str, Tensor]) -> float:
    r"""Effective number of tensors that share the penalty: $1 / \sum_k p_k^2$.

    $p_k$ is the mean importance of tensor k, over the sum of these means (the inverse participation ratio).

    Args:
        importance: Raw or normalized importance by name.

    Returns:
        From 1 (a single tensor has it all) to the number of tensors; 0 if all importance is zero.
    """
    means = tensor_means(importance)
    total = float(means.sum())
    return 0.0 if total == 0.0 else float(1.0 / (means / total).square().sum())


def most_important(raw: Mapping[str, Tensor], fraction: float) -> set[str]:
    """Names of the `fraction` of tensors (rounded down, never all) with the largest mean importance."""
    count = max(0, min(int(fraction * len(raw)), len(raw) - 1))
    order = torch.argsort(tensor_means(raw), descending=True, stable=True)[:count].tolist()
    names = list(raw)
    return {names[index] for index in order}


def tensor_means(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean of each tensor, in float64 on the CPU, in the same order. With sharded tensors: one collective."""
    return _means(tensors, [_sum(part_of(tensor)) for tensor in tensors.values()])


def _means(tensors: Mapping[str, Tensor], sums: Sequence[float]) -> Tensor:
    counts = torch.tensor([tensor.numel() for tensor in tensors.values()], dtype=torch.float64)
    return summed(torch.tensor(sums, dtype=torch.float64), tensors.values()) / counts


def _sum(tensor: Tensor) -> float:
    # In pieces: to sum in float64, torch converts all of its input first.
    pieces = tensor.reshape(-1).split(_BLOCK)
    return float(torch.stack([piece.sum(dtype=torch.float64) for piece in pieces]).sum())


def _dot(left: Tensor, right: Tensor) -> float:
    pieces = zip(left.reshape(-1).split(_BLOCK), right.reshape(-1).split(_BLOCK), strict=True)
    return float(sum(torch.dot(one.double(), other.double()) for one, other in pieces))


def _divided(tensor: Tensor, divisor: float) -> Tensor:
    factor, limits = 1.0 / divisor, torch.finfo(torch.float32)
    if tensor.dtype == torch.float32 and limits.tiny <= factor <= limits.max:
        return tensor * factor
    return (tensor.double() / divisor).float()  # a factor that float32 does not hold


def _softmax(raw: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    if any(tensor.dim() > 0 for tensor in raw.values()):
        raise ValueError("`normalization='softmax'` runs over tensors but the importance is per element; use 'mean'.")
    exponents = torch.stack([tensor.double().cpu() for tensor in raw.values()]) * scale**2
    shares = torch.softmax(exponents, dim=0).float()
    return {name: share.to(tensor.device) for (name, tensor), share in zip(raw.items(), shares, strict=True)}


def _extremes(part: Tensor) -> Tensor:
    # Smallest and negated largest entry, so that both reduce by minimum. A part may be empty; zero changes no verdict.
    if part.numel() == 0:
        return part.new_zeros(2, dtype=torch.float32)
    low, high = part.aminmax()
    return torch.stack([low, -high]).float()


def _require_valid(tensors: Mapping[str, Tensor], extremes: Sequence[Tensor], what: str) -> Tensor:
    if not tensors:
        return torch.empty(0, 2)
    found = smallest(torch.stack([pair.to(extremes[0].device) for pair in extremes]), tensors.values())
    valid = (found[:, 0] >= 0) & torch.isfinite(found[:, 1])  # NaN fails the first comparison
    for index in (~valid).nonzero().flatten().tolist():
        low, high = found[index].tolist()
        raise ValueError(
            f"The {what} of {list(tensors)[index]!r} is not finite and non-negative (smallest {low}, largest "
            f"{-high}). The weights have diverged: lower the learning rate."
        )
    return found
