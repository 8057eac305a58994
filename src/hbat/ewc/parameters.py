"""Which tensors of a model consolidation is about, under names that survive wrapping. Owns no formula."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hbat.engines.sharded import give_back, whole_shape

_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module"}


def canonical_name(name: str) -> str:
    """Name of a parameter as the bare model gives it.

    Args:
        name: Name from `named_parameters()` of a model that torch.compile, DDP or FSDP may have wrapped.

    Returns:
        The name without the wrappers' components.
    """
    parts = name.split(".")
    while parts and parts[0] == "module":  # DDP; deeper down `module` can be a layer's own name
        parts = parts[1:]
    return ".".join(part for part in parts if part not in _WRAPPED)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that training changes, each once.

    Tied tensors appear under their first name only; buffers, frozen parameters and frozen adapters (such as the
    reference adapter of DPO) not at all. Not to be called between forward and backward pass: see `give_back`.

    Args:
        model: The model, wrapped or not.

    Returns:
        Parameters by canonical name, in the model's order.
    """
    give_back(model)
    return {canonical_name(name): each for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def snapshot(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy parameters as they stand now.

    Args:
        parameters: Tensors by name.

    Returns:
        Detached copies of the same dtype on the same device.
    """
    return {name: each.detach().clone() for name, each in parameters.items()}


def require_counterparts(expected: Mapping[str, Tensor], given: Mapping[str, Tensor | float], what: str) -> None:
    """Check that every parameter has its counterpart, of its shape or of shape `()`.

    Args:
        expected: Parameters by name.
        given: What should hold one entry for each of them.
        what: How to call `given` in the message, such as "anchor".

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
    for name, each in expected.items():
        shape, expected_shape = whole_shape(given[name]), whole_shape(each)
        if shape not in {(), expected_shape}:
            raise ValueError(
                f"The {what} of {name!r} has the shape {tuple(shape)}, the parameter {tuple(expected_shape)}. "
                f"Take the {what} from the same model with the same adapters."
            )
