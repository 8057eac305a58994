"""Walking through parameters a block at a time, with the difference from the anchor in float32. Owns no formula."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
        size = max(1, min(each.numel(), _CPU_BLOCK if each.device.type == "cpu" else _GPU_BLOCK))
        if scratch.numel() < size or scratch.device != each.device:
            scratch = torch.empty(size, dtype=torch.float32, device=each.device)
        own = importance[name]
        if isinstance(own, Tensor) and own.dim() == 0 and own.device.type == "cpu":
            own = float(own)
        own_pieces = own.reshape(-1).split(size) if isinstance(own, Tensor) and own.dim() > 0 else None
        pieces = zip(
            _flat(each).split(size), anchor[name].reshape(-1).split(size), _flat(gradient).split(size), strict=True
        )
        for index, (parameter, start, gradient_piece) in enumerate(pieces):
            difference = _subtract(parameter, start, scratch[: parameter.numel()])
            weight = own if own_pieces is None else own_pieces[index]
            yield Block(name, parameter, start, gradient_piece, weight, difference)


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
