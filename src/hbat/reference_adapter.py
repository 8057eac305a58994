"""The reference policy of a model with an adapter: a frozen copy of the adapter beside it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbat.ewc.parameters import canonical_name
from hbat.ewc.shards import part_of

#: Name that the host gives to the adapter it copies for the reference policy.
REFERENCE_ADAPTER = "ref"
ADAPTER = "default"
_DEFAULT = re.compile(r"\.default(?=\.|$)")  # `...lora_A.default.weight`, and `...lora_embedding_A.default`


def reference_parameters(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Find the reference adapter's counterparts of the adapter's parameters.

    Args:
        model: A PeftModel with both adapters.
        names: Canonical names of parameters of the adapter that is trained.

    Returns:
        Detached parameters of the reference adapter, by the names given.
    """
    parameters = {canonical_name(name): each for name, each in model.named_parameters()}
    return {name: parameters[_reference_name(name)].detach() for name in names}


def reference_tensors(model: Any) -> dict[str, Tensor]:
    """List the reference adapter's parameters.

    Args:
        model: A PeftModel with both adapters.

    Returns:
        Detached parameters by the canonical names of those that are trained.
    """
    return reference_parameters(model, _own(model))


def _own(model: Any) -> dict[str, Tensor]:
    return {canonical_name(name): each for name, each in model.named_parameters() if _DEFAULT.search(name)}


@torch.no_grad()
def add_reference_adapter(model: Any) -> None:
    """Make the reference policy of a PeftModel what its adapter is now.

    Args:
        model: The model; an adapter of that name that is there already is overwritten.
    """
    with _kept_gradient_flags(model):
        if REFERENCE_ADAPTER not in model.peft_config:
            with torch.random.fork_rng():
                model.add_adapter(REFERENCE_ADAPTER, model.peft_config[ADAPTER])
            model.set_adapter(ADAPTER)
    match_reference_adapter(model)


@torch.no_grad()
def match_reference_adapter(model: Any) -> None:
    """Make the reference adapter compute what the adapter computes: the same numbers in the same precision.

    PEFT makes a new adapter in float32, while TRL casts the one that is trained to bfloat16 on a quantised base. And
    TRL copies only names with `.default.` inside, not those that end in it.

    Args:
        model: A PeftModel with both adapters.
    """
    parameters = {canonical_name(name): each for name, each in model.named_parameters()}
    for name, each in _own(model).items():  # not the trainable ones alone: some may be frozen for this stage
        copy = parameters[_reference_name(name)]
        if copy.dtype != each.dtype:
            copy.data = copy.data.to(each.dtype)
        if not torch.equal(part_of(copy), part_of(each)):
            copy.copy_(each)


@contextmanager
def using_reference_adapter(model: Any) -> Iterator[None]:
    """Let a PeftModel compute with its reference adapter.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    with _kept_gradient_flags(model):
        model.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(ADAPTER)


@contextmanager
def _kept_gradient_flags(model: Any) -> Iterator[None]:
    # PEFT sets `requires_grad` on the whole adapter that becomes active, also where it was frozen, and leaves it set.
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    try:
        yield
    finally:
        for name, each in model.named_parameters():
            each.requires_grad_(flags.get(name, False))


def _reference_name(name: str) -> str:
    return _DEFAULT.sub(f".{REFERENCE_ADAPTER}", name)
