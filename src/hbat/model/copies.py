"""Frozen copies of a model, free of what trainers attached to it."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from hbat.engines.loaded_shards import copy_of_shards, is_loaded_in_shards

#: Instance attributes with which trainers and accelerate wrap a model's forward.
_WRAPPERS = ("forward", "_original_forward", "_is_accelerate_prepared")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, including those that modules keep as a number instead of a layer."""
    for module in model.modules():
        if _is_dropout_layer(module):
            setattr(module, "p", 0.0)  # noqa: B010 - not all layers are torch's own, so it has no type
        for key, value in list(module.__dict__.items()):
            if is_dropout(key, value):
                setattr(module, key, dict.fromkeys(value, 0.0) if isinstance(value, dict) else 0.0)


def is_dropout(key: str, value: object) -> bool:
    """Whether an attribute of a module is a dropout probability, or those of its adapters by their names."""
    values = value.values() if isinstance(value, dict) else [value]
    return key.endswith("dropout") and all(isinstance(probability, float) for probability in values)


def has_dropout(module: nn.Module) -> bool:
    """Whether a module itself drops out."""
    return _is_dropout_layer(module) or any(is_dropout(key, value) for key, value in module.__dict__.items())


def _is_dropout_layer(module: nn.Module) -> bool:
    return "Dropout" in type(module).__name__  # that of BOFT is none of torch's


def unpatched_copy(model: nn.Module) -> nn.Module:
    """Deep-copy a model, frozen and in evaluation mode, without what trainers patched onto it.

    After a plain `copy.deepcopy` of a model that a TRL trainer has touched, the copy's `forward` is bound to the
    original and computes with its weights.
    """
    kept = {
        module: {key: module.__dict__.pop(key) for key in _WRAPPERS if key in module.__dict__}
        for module in wrapped_models(model)
    }
    try:
        duplicate = copy.deepcopy(model)
    finally:
        for module, attributes in kept.items():
            module.__dict__.update(attributes)
    duplicate.requires_grad_(False)
    return duplicate.eval()


def wrapped_models(model: Any) -> Iterator[Any]:
    """The model, and the base model below its adapter."""
    yield model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        yield model.get_base_model()


def frozen_copy(model: Any) -> nn.Module:
    """Reference policy of a model without adapter: `unpatched_copy`, sharded if the model was loaded in shards."""
    return copy_of_shards(model) if is_loaded_in_shards(model) else unpatched_copy(model)
