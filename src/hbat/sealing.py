"""Seals the host's checkpoints as they are written."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.checkpoints import seal
from hbat.processes import is_main_process, wait_for_everyone


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
