"""The tensors that consolidation is about: which, under which names, on which device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hbat.engines.sharded import give_back, whole_shape

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module"}


def canonical_name(name: str) -> str:
    """Parameter name without the components that torch.compile, DDP or another wrapper adds."""
    components = name.split(".")
    while components and components[0] == "module":  # DDP; deeper down `module` can be a layer's own name
        components = components[1:]
    return ".".join(component for component in components if component not in _WRAPPERS)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that training changes, each once.

    Tied tensors appear under their first name only; buffers, frozen parameters and frozen adapters (such as the
    reference adapter of DPO) are excluded. Not to be called between forward and backward pass: a sharded model is
    resharded first.

    Args:
        model: The model, wrapped (torch.compile, DDP) or not.

    Returns:
        Parameters by the name that the bare model gives them, in its order.
    """
    give_back(model)
    return {canonical_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def snapshot(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy parameters, to be the anchor of a penalty.

    Args:
        parameters: Tensors by name.

    Returns:
        Detached copies of the same dtype on the same device.
    """
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def require_counterparts(expected: Mapping[str, Tensor], given: Mapping[str, Tensor | float], what: str) -> None:
    """Check that every parameter has its counterpart (`what`, for messages), of its shape or of shape `()`.

    Raises:
        KeyError: If an entry is missing.
        ValueError: If an entry has another shape, as after resizing the embeddings.
    """
    missing = [name for name in expected if name not in given]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(expected)} parameters have no {what}, first {missing[0]!r}. "
            f"Take the {what} from the same model with the same adapters."
        )
    for name, parameter in expected.items():
        shape, expected_shape = whole_shape(given[name]), whole_shape(parameter)
        if shape not in {(), expected_shape}:
            raise ValueError(
                f"The {what} of {name!r} has the shape {shape}, the parameter {expected_shape}. "
                f"Take the {what} from the same model with the same adapters."
            )
