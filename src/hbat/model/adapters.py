"""The reference policy of a model with an adapter: a frozen copy of the adapter beside it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import is_sharded, part_of
from hbat.ewc.parameters import canonical_name

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


def refuse_adapters(model: Any, *, takes_reference: bool) -> None:
    """Refuse adapters that are not a single PEFT one of the host's name, and those that cannot be copied.

    Args:
        model: The model.
        takes_reference: Whether a copy of the adapter is the reference policy.

    Raises:
        ValueError: If it has others.
    """
    if not (adapters := getattr(model, "peft_config", {})):
        return
    from peft import PeftModel  # noqa: PLC0415 - an optional extra, without which there is no adapter

    if not isinstance(getattr(model, "_orig_mod", model), PeftModel):
        raise REFUSALS["adapter inside"].error(model=type(model).__name__)
    if set(adapters) - {REFERENCE_ADAPTER} != {ADAPTER}:
        raise REFUSALS["several adapters"].error(adapters=list(adapters))
    if takes_reference and getattr(adapters[ADAPTER], "is_prompt_learning", False):
        raise REFUSALS["virtual tokens"].error(adapter=type(adapters[ADAPTER]).__name__)


_CONFIG = "adapter_config.json"


def load_adapter_as_it_was(trainer: Trainer) -> None:
    """Let a trainer go on from a checkpoint with the adapter that wrote it.

    transformers 4.57 loads the reference adapter, which lies in a folder of its own, and leaves the one that is
    trained as it is: at the stage's start. And see `kept_form`.

    Args:
        trainer: The trainer, before `train()`; one whose model is no PeftModel is left alone.
    """
    model: Any = trainer.model
    if not hasattr(model, "peft_config"):
        return
    load: Callable[..., None] = trainer._load_from_checkpoint  # noqa: SLF001 - the host has no public hook there

    def loading(checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with kept_form(model):
            load(checkpoint, *args, **kwargs)
            # Of a sharded one the host's files of FSDP hold the adapter that is trained.
            if not is_sharded(model) and len(model.peft_config) > 1 and (Path(checkpoint) / _CONFIG).is_file():
                model.load_adapter(checkpoint, ADAPTER, is_trainable=True)
                model.set_adapter(ADAPTER)

    trainer._load_from_checkpoint = loading  # type: ignore[assignment, method-assign] # noqa: SLF001 - as above


@contextmanager
def kept_form(model: nn.Module) -> Iterator[None]:
    """Leave parameters in their precision and memory, trained or frozen as they are, whatever is loaded into them.

    PEFT (0.18 to 0.21) casts an adapter that it loads to float32, also one that TRL made bfloat16 on a quantised base:
    the stage would compute otherwise than the one that wrote the checkpoint. And it sets `requires_grad` on the whole
    adapter, also where a part is frozen: the optimizer's state would no longer fit.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    before = {name: (each.data, each.requires_grad) for name, each in model.named_parameters()}
    yield
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name not in before:
                continue
            own, trained = before[name]
            if own.dtype != each.dtype and own.shape == each.shape:
                each.data = own.copy_(each)
            each.requires_grad_(trained)
