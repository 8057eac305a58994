"""The host's own checkpoints inside a stage: sealed by checksums, and from which one a stage goes on."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.processes import decided_by_main, is_main_process, wait_for_everyone
from hbat.state.files import checksum, digest, fault, write_json
from hbat.state.manifest import RunStateError

logger = logging.getLogger(__name__)


SEAL = "hbat_checksums.json"


# The host writes the optimizer before the state; `save_only_model` leaves nothing to go on from exactly.
_STATE = "trainer_state.json"


#: The optimizer in one process and under DDP, and under FSDP as a whole or in shards. DeepSpeed's is not among them:
#: under it a stage that was cut off begins anew.
_OPTIMIZER = {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"}


def seal(folder: Path) -> None:
    """Write down what a checkpoint holds, so that one that is cut off or damaged is noticed.

    Args:
        folder: The checkpoint, with the files of all processes.
    """
    (folder / SEAL).unlink(missing_ok=True)  # of a checkpoint that was written here before
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    measured = {each.relative_to(folder).as_posix(): checksum(each) for each in files}
    write_json(folder / SEAL, {"files": measured, "checksum": digest(measured)})


def last_checkpoint(folder: Path, max_steps: int, resumes_at: Callable[[int], bool] | None = None) -> str | None:
    """Find the checkpoint from which a stage that was cut off goes on.

    Args:
        folder: The stage's folder.
        max_steps: The stage's `max_steps`; 0 or less where epochs bound it.
        resumes_at: Whether the stage can go on from a checkpoint at a step; from any where left out.

    Returns:
        The newest such checkpoint that is what was written, or None to start the stage anew.
    """

    def choose() -> int:
        found = sorted(_steps(folder), reverse=True)
        # The host trains one step too many from a checkpoint that is at `max_steps` in the middle of an epoch (seen in
        # transformers 4.57-5.23), so a stage killed between its last step and its commit starts anew.
        if not found or 0 < max_steps <= found[0]:
            return -1
        good = (each for each in found if resumes_at is None or resumes_at(each))
        return next((each for each in good if _is_whole(folder / f"checkpoint-{each}")), -1)

    step = decided_by_main(choose)
    return None if step < 0 else str(folder / f"checkpoint-{step}")


def _steps(folder: Path) -> list[int]:
    numbers = [(each, each.name.removeprefix("checkpoint-")) for each in folder.glob("checkpoint-*")]
    return [
        int(number) for each, number in numbers if number.isdigit() and ((each / SEAL).exists() or _is_complete(each))
    ]


def _is_whole(checkpoint: Path) -> bool:
    recorded: dict[str, Any] = {}
    wrong: str | None
    try:
        values = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        recorded = dict(values["files"])
        if values["checksum"] != digest(recorded):
            wrong = f"{SEAL} is not what was written: its checksum differs"
        else:
            found = ((name, fault(checkpoint / name, each)) for name, each in recorded.items())
            wrong = next((f"{name} {what}" for name, what in found if what), None)
    except FileNotFoundError:
        wrong = f"{SEAL} is missing, so it was cut off while it was written"
    except (KeyError, OSError, TypeError, ValueError) as error:
        wrong = f"{SEAL} cannot be read ({error!r})"
    if wrong is not None:
        logger.warning(
            "%s is not gone on from: %s. The stage goes on from an older checkpoint or starts anew.", checkpoint, wrong
        )
        return False
    return _STATE in recorded and not _OPTIMIZER.isdisjoint(recorded)


def _is_complete(checkpoint: Path) -> bool:
    return (checkpoint / _STATE).exists() and any((checkpoint / name).exists() for name in _OPTIMIZER)


class SealCheckpoints(TrainerCallback):
    """Writes checksums into every checkpoint, on the main process.

    It stands after the user's callbacks, so that files which they add or change are as they left them.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint that the host has just written."""
        wait_for_everyone()  # every process has files of its own in it
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if is_main_process() and folder.is_dir():
            seal(folder)


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
