"""The precision of an adapter, which loading a checkpoint would change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer


@contextmanager
def kept_precision(model: nn.Module) -> Iterator[None]:
    """Leave parameters in the precision and the memory that they are in, whatever is loaded into them.

    PEFT casts an adapter that it loads to float32 (0.18 to 0.21), also one that TRL made bfloat16 on a quantised base:
    a stage that goes on from its checkpoint would compute otherwise than the one that wrote it.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    before = {name: each.data for name, each in model.named_parameters()}
    yield
    with torch.no_grad():
        for name, each in model.named_parameters():
            own = before.get(name)
            if own is not None and own.dtype != each.dtype and own.shape == each.shape:
                each.data = own.copy_(each)


def keep_precision(trainer: Trainer, model: nn.Module) -> None:
    """Let a trainer go on from a checkpoint in the precision in which it was written.

    Args:
        trainer: The trainer, before `train()`.
        model: The model that it loads into.
    """
    load: Callable[..., None] = trainer._load_from_checkpoint  # noqa: SLF001 - the host has no public hook there

    def loading(*args: Any, **kwargs: Any) -> None:
        with kept_precision(model):
            load(*args, **kwargs)

    trainer._load_from_checkpoint = loading  # type: ignore[method-assign] # noqa: SLF001
