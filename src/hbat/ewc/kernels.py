"""The penalty's gradient for small tensors, such as an adapter's factors, many in one call.

There the calls cost more than the arithmetic: torch's `_foreach_*` functions take whole lists of tensors.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbat.ewc.offload import Offloaded

#: Elements below which a tensor is small.
_SMALL = 1 << 20


#: Elements of a batch of several tensors. Its differences are the scratch memory: on a CPU they should stay in the
#: cache (1 MiB), while a GPU wants few launches (32 MiB).
_CPU_BATCH = 1 << 18


_GPU_BATCH = 1 << 23


_Entry = tuple[Tensor, Tensor, Tensor, Tensor | float]  # parameter, anchor, gradient, importance


def add_small_pulls_(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    factor: float,
) -> dict[str, Tensor]:
    r"""Add $c F (\theta - \theta^*)$ to the gradients of small tensors, with $c$ = `factor`, in place.

    Args:
        parameters: Parameters by name, with gradients.
        anchor: Weights to pull to.
        importance: $F$ by name.
        factor: $c$.

    Returns:
        The parameters that are left: large ones, and those with anything that is not float32, contiguous or in place.
    """
    groups: dict[tuple[torch.device, str], list[_Entry]] = {}
    rest = {}
    for name, each in parameters.items():
        gradient = each.grad
        if gradient is None:
            continue
        entry = (each, anchor[name], gradient, importance[name])
        kind = _kind(*entry)
        if kind is None:
            rest[name] = each
        else:
            groups.setdefault((each.device, kind), []).append(entry)
    for (device, kind), entries in groups.items():
        for batch in _batches(entries, _CPU_BATCH if device.type == "cpu" else _GPU_BATCH):
            _add_batch_(batch, kind, factor)
    return rest


def _kind(parameter: Tensor, anchor: Tensor, gradient: Tensor, importance: Tensor | float) -> str | None:
    device = parameter.device
    if not (
        parameter.numel() < _SMALL
        and parameter.dtype == anchor.dtype == gradient.dtype == torch.float32
        and parameter.shape == anchor.shape
        and anchor.device == device
        and parameter.is_contiguous()
        and gradient.is_contiguous()
    ):
        return None
    if not isinstance(importance, Tensor):
        return "number"
    if importance.dim() == 0 and importance.device.type == "cpu":
        return "number"
    if importance.dtype != torch.float32 or importance.device != device:
        return None
    if importance.dim() == 0:
        return "scalar"
    return "element" if importance.shape == parameter.shape else None


def _batches(entries: list[_Entry], size: int) -> Iterator[list[_Entry]]:
    batch: list[_Entry] = []
    elements = 0
    for entry in entries:
        if batch and elements + entry[0].numel() > size:
            yield batch
            batch, elements = [], 0
        batch.append(entry)
        elements += entry[0].numel()
    yield batch


def _add_batch_(batch: list[_Entry], kind: str, factor: float) -> None:
    parameters, anchors, gradients, importances = (list(each) for each in zip(*batch, strict=True))
    differences = torch._foreach_sub(parameters, anchors)  # noqa: SLF001 - torch has no public name for these
    if kind == "element":
        torch._foreach_addcmul_(gradients, differences, importances, value=factor)
    elif kind == "number":
        torch._foreach_mul_(differences, [factor * float(each) for each in importances])
        torch._foreach_add_(gradients, differences)
    else:  # numbers on the device, which are not waited for
        torch._foreach_mul_(differences, importances)
        torch._foreach_add_(gradients, differences, alpha=factor)


#: Elements handled at a time. On a CPU the scratch block (1 MiB of float32) stays in the cache, which brings the step
#: near the memory bandwidth; a GPU wants few, large kernels.
_CPU_BLOCK = 1 << 18


_GPU_BLOCK = 1 << 26


@dataclass
class Block:
    """A run of n elements of one parameter, as flat views of shape (n,); `difference` is scratch in float32."""

    name: str
    parameter: Tensor
    anchor: Tensor
    gradient: Tensor  # the parameter itself where no gradient was asked for
    importance: Tensor | float  # of shape () or (n,)
    difference: Tensor  # parameter - anchor


def block_elements(device: torch.device) -> int:
    """Give the size of a block.

    Args:
        device: Where the parameters are.

    Returns:
        Its elements at most.
    """
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def walk_blocks(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    *,
    with_gradient: bool,
) -> Iterator[Block]:
    """Walk through parameters block by block.

    Args:
        parameters: Parameters by name.
        anchor: Weights to subtract.
        importance: Importance by name.
        with_gradient: Only those with a gradient, and give its elements too.

    Yields:
        Blocks; the next one reuses the scratch of the last.
    """
    scratch = torch.empty(0)
    for name, each in parameters.items():
        gradient = each.grad if with_gradient else each
        if gradient is None:
            continue
        size = max(1, min(each.numel(), block_elements(each.device)))
        if scratch.numel() < size or scratch.device != each.device:
            scratch = torch.empty(size, dtype=torch.float32, device=each.device)
        own = _flat(each).split(size)
        starts, weights = _pieces(anchor, name, size), _weights(importance, name, size, len(own))
        for piece, start, gradient_piece, weight in zip(
            own, starts, _flat(gradient).split(size), weights, strict=True
        ):
            yield Block(name, piece, start, gradient_piece, weight, _subtract(piece, start, scratch[: piece.numel()]))


def _weights(
    importance: Mapping[str, Tensor | float], name: str, size: int, count: int
) -> Iterable[Tensor] | Iterable[Tensor | float]:
    own = importance[name]
    if not isinstance(own, Tensor):
        return itertools.repeat(own, count)
    if own.dim() == 0:
        return itertools.repeat(float(own) if own.device.type == "cpu" else own, count)
    return _pieces(importance, name, size)


def _pieces(tensors: Mapping[str, Any], name: str, size: int) -> Iterable[Tensor]:
    if isinstance(tensors, Offloaded):
        return tensors.pieces(name)
    pieces: tuple[Tensor, ...] = tensors[name].reshape(-1).split(size)
    return pieces


def _subtract(parameter: Tensor, anchor: Tensor, out: Tensor) -> Tensor:
    if parameter.dtype == anchor.dtype == torch.float32:
        return torch.sub(parameter, anchor, out=out)
    return out.copy_(parameter).sub_(anchor)  # with `out=`, torch would subtract in the operands' own precision


def _flat(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"A parameter of shape {tuple(tensor.shape)} or its gradient is not contiguous, so it cannot be changed "
            "in place block by block. Call `.contiguous()` on it before training."
        )
    return tensor.detach().view(-1)
