"""The trainer's own checkpoints inside a stage: sealed by checksums, and from which one a stage resumes."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hbat.engines.processes import decided_by_main, is_main_process, wait_for_everyone
from hbat.state.files import checksum, digest, fault, write_json
from hbat.state.manifest import RunStateError

logger = logging.getLogger(__name__)

SEAL = "hbat_checksums.json"
#: transformers writes the optimizer before the state; `save_only_model` leaves nothing to resume from exactly.
_STATE = "trainer_state.json"
#: The optimizer in one process and under DDP, and of a sharded model as a whole or in shards.
_OPTIMIZER = {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"}
#: Methods with which transformers 4.57-5.24 reads a checkpoint. An error from anywhere else, such as a callback of the
#: user, says nothing about the checkpoint.
_READING = {
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state", "load_from_json",
}  # fmt: skip


def seal(folder: Path) -> None:
    """Write the checksums of a checkpoint's files, so that one that is cut off or damaged is noticed."""
    (folder / SEAL).unlink(missing_ok=True)  # of a checkpoint that was written here before
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    measured = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    write_json(folder / SEAL, {"files": measured, "checksum": digest(measured)})


def last_checkpoint(folder: Path, max_steps: int, can_resume_at: Callable[[int], bool] | None = None) -> str | None:
    """Find the checkpoint from which a stage that was cut off resumes.

    Args:
        folder: The stage's folder.
        max_steps: The stage's `max_steps`; 0 or less where epochs bound it.
        can_resume_at: Whether the stage can resume at a step; by default at any.

    Returns:
        The newest such checkpoint that is intact, or None to start the stage again.
    """

    def choose() -> int:
        found = sorted(_steps(folder), reverse=True)
        # transformers 4.57-5.24 trains a step too many from a checkpoint at `max_steps` in the middle of an epoch, so
        # a stage killed between its last step and its commit starts again.
        if not found or 0 < max_steps <= found[0]:
            return -1
        resumable = (step for step in found if can_resume_at is None or can_resume_at(step))
        return next((step for step in resumable if _is_intact(folder / f"checkpoint-{step}")), -1)

    step = decided_by_main(choose)
    return None if step < 0 else str(folder / f"checkpoint-{step}")


def _steps(folder: Path) -> list[int]:
    numbers = [(path, path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    return [
        int(number) for path, number in numbers if number.isdigit() and ((path / SEAL).exists() or _is_complete(path))
    ]


def _is_intact(checkpoint: Path) -> bool:
    recorded: dict[str, Any] = {}
    wrong: str | None
    try:
        values = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        recorded = dict(values["files"])
        if values["checksum"] != digest(recorded):
            wrong = f"{SEAL} is not what was written: its checksum differs"
        else:
            faults = ((name, fault(checkpoint / name, measured)) for name, measured in recorded.items())
            wrong = next((f"{name} {what}" for name, what in faults if what), None)
    except FileNotFoundError:
        wrong = f"{SEAL} is missing, so it was cut off while it was written"
    except (KeyError, OSError, TypeError, ValueError) as error:
        wrong = f"{SEAL} cannot be read ({error!r})"
    if wrong is not None:
        logger.warning(
            "%s is skipped: %s. The stage resumes from an older checkpoint or starts again.", checkpoint, wrong
        )
        return False
    return _STATE in recorded and not _OPTIMIZER.isdisjoint(recorded)


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / _STATE).exists() and any((checkpoint / name).exists() for name in _OPTIMIZER)


class SealCheckpoints(TrainerCallback):
    """Writes checksums into every checkpoint, on rank 0.

    It comes after the user's callbacks, so that files which they add or change are as they left them.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        wait_for_everyone()  # every process has files of its own in it
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if is_main_process() and folder.is_dir():
            seal(folder)


@contextmanager
def named_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Name the checkpoint that transformers cannot read while a stage trains inside the block; None for no checkpoint.

    transformers reads its files with `weights_only=True`, so one that holds more than tensors is refused, not run.

    Raises:
        RunStateError: If it cannot be resumed from.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or isinstance(error, MemoryError | torch.OutOfMemoryError) or not _in_reading(error):
            raise
        reason = (" ".join(str(error).split()) or "no reason given").partition(". ")[0]
        raise RunStateError(
            f"{checkpoint} cannot be resumed from ({type(error).__name__}: {reason}). Remove this folder: the stage "
            "then resumes from an older checkpoint or starts again."
        ) from error


def _in_reading(error: Exception) -> bool:
    return any(frame.f_code.co_name in _READING for frame, _ in traceback.walk_tb(error.__traceback__))
