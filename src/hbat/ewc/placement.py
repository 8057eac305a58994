"""Where anchor and importance lie while a trainer trains. Owns no formula."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbat.ewc.blocks import block_elements
from hbat.ewc.offload import Offloaded
from hbat.ewc.shards import shared_as


def on_device(tensors: Mapping[str, Tensor | float], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Bring tensors to the device of their parameters, shared between processes as these are.

    Args:
        tensors: Tensors of the parameters' shapes, or of shape `()`, or numbers, by name.
        parameters: Parameters by name.

    Returns:
        Tensors by name; of shape `()` they become numbers, once and not at every step.
    """
    return {name: _beside(tensors[name], each) for name, each in parameters.items()}


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
    own = {name: tensors[name] for name in parameters}
    device = next((each.device for each in parameters.values()), torch.device("cpu"))
    small = [each for each in own.values() if isinstance(each, Tensor) and each.dim() > 0]
    if all(each.device == device for each in small):
        return on_device(own, parameters)
    return Offloaded(
        {name: float(each) if _is_scalar(each) else each for name, each in own.items()}, device, block_elements(device)
    )


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


def _beside(value: Tensor | float, parameter: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    return float(value) if _is_scalar(value) else shared_as(value.detach(), parameter).to(parameter.device)


def _is_scalar(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0
