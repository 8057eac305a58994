"""Going on from a checkpoint of the host inside a stage: what the host cannot read there is named."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hbat.manifest import RunStateError

#: Methods with which the host reads a checkpoint (transformers 4.57 to 5.23). An error from anywhere else, such as a
#: callback of the user, says nothing of the checkpoint.
_READING = {
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state", "load_from_json",
}  # fmt: skip


@contextmanager
def named_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint that the host cannot read.

    The host reads its files with `weights_only=True`, so one that holds more than tensors is refused, not run.

    Args:
        checkpoint: The checkpoint's folder; None where the stage starts anew.

    Yields:
        Nothing; train inside.

    Raises:
        RunStateError: If the host cannot go on from it.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or isinstance(error, MemoryError | torch.OutOfMemoryError) or not _in_reading(error):
            raise
        reason = (" ".join(str(error).split()) or "no reason given").partition(". ")[0]
        raise RunStateError(
            f"{checkpoint} cannot be gone on from ({type(error).__name__}: {reason}). Remove this folder: the stage "
            "then goes on from an older checkpoint or starts anew."
        ) from error


def _in_reading(error: Exception) -> bool:
    return any(frame.f_code.co_name in _READING for frame, _ in traceback.walk_tb(error.__traceback__))
