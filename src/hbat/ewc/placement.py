"""Where anchor and importance lie while a trainer trains. Owns no formula."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hbat.engines.sharded import shared_as
from hbat.ewc.kernels import block_elements
from hbat.ewc.offload import Offloaded


def on_device(tensors: Mapping[str, Tensor | float], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Bring tensors to the device of their parameters, shared between processes as these are.

    Args:
        tensors: Tensors of the parameters' shapes, or of shape `()`, or numbers, by name.
        parameters: Parameters by name.

    Returns:
        Tensors by name, those of shape `()` for a larger parameter as numbers.
    """
    values = _with_numbers(tensors, parameters)
    return {
        name: shared_as(each.detach(), parameters[name]).to(parameters[name].device) if _is_tensor(each) else each
        for name, each in values.items()
    }


def in_main_memory(
    tensors: Mapping[str, Tensor | float], parameters: Mapping[str, Tensor]
) -> Mapping[str, Tensor | float]:
    """Leave tensors in the main memory, or bring them there, for a device that fetches them piece by piece.

    Args:
        tensors: Tensors of the parameters' shapes, or of shape `()`, or numbers, by name.
        parameters: Parameters by name, all on one device.

    Returns:
        What the penalty's functions take. `tensors` that are on the parameters' device already stay there.
    """
    values = _with_numbers(tensors, parameters)
    device = next((each.device for each in parameters.values()), torch.device("cpu"))
    if all(each.device == device for each in values.values() if _is_tensor(each)):
        return on_device(values, parameters)
    return Offloaded(values, device, block_elements(device))


def snapshot_in_main_memory(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy parameters as they stand now to the CPU, one after the other.

    Args:
        parameters: Tensors by name.

    Returns:
        Detached copies of the same dtype.
    """
    return {name: each.detach().to("cpu", copy=True) for name, each in parameters.items()}


def let_go(*mappings: Mapping[str, Tensor | float]) -> None:
    """End what is under way for tensors in the main memory.

    Args:
        mappings: What the functions above gave.
    """
    for each in mappings:
        if isinstance(each, Offloaded):
            each.close()


def _with_numbers(
    tensors: Mapping[str, Tensor | float], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor | float]:
    # One value for a whole tensor is read once, and not from a device at every step.
    return {
        name: float(tensors[name]) if each.dim() > 0 and _is_scalar(tensors[name]) else tensors[name]
        for name, each in parameters.items()
    }


def _is_scalar(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_tensor(value: Tensor | float) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)
