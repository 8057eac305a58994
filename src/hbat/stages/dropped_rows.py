"""Rows that TRL drops without a word: those whose prompt alone fills `max_length`."""

import logging
from typing import Any, Literal

from transformers import Trainer

from hbat.data.load import DatasetError

logger = logging.getLogger(__name__)


def rows_left(trainer: Any, split: Literal["train", "eval"]) -> int | None:
    """Rows that a trainer has kept of a data set; None if it streams them, or packs them, unless none is left."""
    prepared, args = getattr(trainer, f"{split}_dataset"), trainer.args
    packs = getattr(args, "packing", False)
    if split == "eval" and getattr(args, "eval_packing", None) is not None:
        packs = args.eval_packing
    left = len(prepared) if hasattr(prepared, "__len__") else None
    return None if packs and left else left


def report_dropped_rows(
    trainer: Trainer, split: Literal["train", "eval"], rows: int, objective: str, where: str
) -> None:
    """Warn of those of an objective's `rows` that its trainer has dropped; `where` in the run goes into the message.

    Raises:
        DatasetError: If none is left.
    """
    args: Any = trainer.args
    left = rows_left(trainer, split)
    given, to = f"{split}_dataset[{objective!r}]", "train on" if split == "train" else "evaluate"
    why = f"`{objective}.max_length` is {getattr(args, 'max_length', None)}, which leaves no tokens to {to}"
    if left == 0:
        raise DatasetError(
            f"{where}: none of the {rows} rows of {given} is left to {to}: {why}. Raise `max_length`, or give shorter "
            "prompts."
        )
    if left is not None and left < rows:
        logger.warning("%s: the trainer drops %d of %d rows of %s: %s.", where, rows - left, rows, given, why)
