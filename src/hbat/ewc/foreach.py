"""The penalty's gradient for small tensors, such as an adapter's factors, many in one call.

There the calls cost more than the arithmetic: torch's `_foreach_*` functions take whole lists of tensors.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
