"""Walking through parameters a block at a time, with the difference from the anchor in float32. Owns no formula."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbat.ewc.offload import Offloaded

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
