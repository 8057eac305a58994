"""Going on from a checkpoint of the host inside a stage: what the host cannot read there is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hbat.manifest import RunStateError


class _Begun(TrainerCallback):
    def __init__(self) -> None:
        self.begun = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = True


@contextmanager
def named_checkpoint(trainer: Trainer, checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint where training from it fails before its first step.

    The host reads its files with `weights_only=True`, so one that holds more than tensors is refused, not run.

    Args:
        trainer: The trainer that goes on.
        checkpoint: The checkpoint's folder; None where the stage starts anew.

    Yields:
        Nothing; train inside.

    Raises:
        RunStateError: If the host cannot go on from it.
    """
    if checkpoint is None:
        yield
        return
    progress = _Begun()
    trainer.add_callback(progress)
    try:
        yield
    except Exception as error:
        if progress.begun or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        reason = (" ".join(str(error).split()) or "no reason given").partition(". ")[0]
        raise RunStateError(
            f"{checkpoint} cannot be gone on from ({type(error).__name__}: {reason}). Remove this folder: the stage "
            "then goes on from an older checkpoint or starts anew."
        ) from error
    finally:
        trainer.remove_callback(progress)
