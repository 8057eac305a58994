"""Loading the host's checkpoint of a stage into an adapter: all its numbers, and nothing but its numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hbat.ewc.shards import is_sharded
from hbat.reference_adapter import ADAPTER

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
