"""Rows that the host leaves out of a stage while it prepares them, which it does without a word."""

import logging
from typing import Any

from transformers import Trainer

from hbat.loading import DatasetError
from hbat.rounds import Stage

logger = logging.getLogger(__name__)


def report_left_out(trainer: Trainer, stage: Stage, rows: int) -> None:
    """Say how many rows of a stage the host has left out: TRL does so where a prompt alone fills `max_length`.

    Args:
        trainer: The stage's trainer.
        stage: The stage.
        rows: Number of rows that it was given.

    Raises:
        DatasetError: If no row is left.
    """
    prepared: Any = trainer.train_dataset
    left = len(prepared) if hasattr(prepared, "__len__") else rows
    length = getattr(trainer.args, "max_length", None)
    why = f"`{stage.objective}.max_length` is {length}, which the prompt alone fills or nothing to learn is left below"
    if left == 0:
        raise DatasetError(
            f"{stage}: none of the {rows} rows of train_dataset[{stage.objective!r}] is left to train on: {why}. "
            "Raise it, or give shorter prompts."
        )
    if left < rows and not getattr(trainer.args, "packing", False):
        logger.warning(
            "%s: %d of %d rows of train_dataset[%r] are left out by the trainer: %s.",
            stage, rows - left, rows, stage.objective, why,
        )  # fmt: skip
