"""Batches of parameters for torch's `_foreach_*` functions.

Small tensors, such as an adapter's factors, share a batch: there, calls cost more than arithmetic. Large tensors are
split into flat pieces, which bounds the scratch memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from hbat.engines.sharded import parts_of

#: Elements of a batch, whose differences are the scratch memory: on a CPU they stay in the cache (1 MiB), while a GPU
#: wants few launches (64 MiB).
_CPU_BATCH = 1 << 18
_GPU_BATCH = 1 << 24

_Piece = tuple[str, Tensor, Tensor, Tensor, Any]  # name, parameter, anchor, gradient, importance


@dataclass
class Batch:
    """Tensors on one device, or flat pieces of large ones: lists whose n-th entries belong together."""

    names: list[str]
    parameters: list[Tensor]
    anchors: list[Tensor]
    gradients: list[Tensor]  # the parameters themselves if none were given
    importances: list[Any]  # either all numbers or all tensors, of shape () or of their piece's shape
    differences: list[Tensor]  # parameter - anchor, in float32; may be overwritten


def batches(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor | float],
    gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[Batch]:
    """Yield this process's parts of the parameters in batches; with `gradients`, of those alone that have one."""
    gradients = parameters if gradients is None else gradients
    pieces: list[_Piece] = []
    elements, kind = 0, None
    for piece in _pieces(parts_of(parameters), parts_of(anchor), parts_of(importance), parts_of(gradients)):
        _, parameter, _, _, weight = piece
        own_kind = parameter.device, isinstance(weight, Tensor)
        if pieces and (kind != own_kind or elements + parameter.numel() > _batch_elements(parameter)):
            yield _batch(pieces)
            pieces, elements = [], 0
        pieces.append(piece)
        elements, kind = elements + parameter.numel(), own_kind
    if pieces:
        yield _batch(pieces)


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is in `.grad`, by name; parameters without a gradient are skipped, as optimizers do."""
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def _batch(pieces: list[_Piece]) -> Batch:
    names, parameters, anchors, gradients, importances = (list(column) for column in zip(*pieces, strict=True))
    differences = torch._foreach_sub(  # noqa: SLF001 - torch has no public name for it
        [parameter.float() for parameter in parameters], [start.float() for start in anchors]
    )
    return Batch(names, parameters, anchors, gradients, importances, list(differences))


def _pieces(
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Any],
    given: Mapping[str, Tensor],
) -> Iterator[_Piece]:
    for name, gradient in given.items():
        parameter = parameters[name]
        size, start, weight = _batch_elements(parameter), anchor[name], importance[name]
        by_element = isinstance(weight, Tensor) and (weight.dim() > 0 or parameter.dim() == 0)
        if isinstance(weight, Tensor) and not by_element and weight.device.type == "cpu":
            weight = float(weight)  # of one on the device, that would synchronize
        if parameter.numel() <= size or not (parameter.is_contiguous() and gradient.is_contiguous()):
            shape = parameter.shape
            yield name, parameter, start.reshape(shape), gradient, weight.reshape(shape) if by_element else weight
            continue
        own, gradients = parameter.detach().view(-1).split(size), gradient.detach().view(-1).split(size)
        weights = weight.reshape(-1).split(size) if by_element else repeat(weight, len(own))
        yield from zip(repeat(name, len(own)), own, start.reshape(-1).split(size), gradients, weights, strict=True)


def _batch_elements(parameter: Tensor) -> int:
    return _CPU_BATCH if parameter.device.type == "cpu" else _GPU_BATCH
