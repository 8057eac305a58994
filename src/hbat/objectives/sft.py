"""Supervised fine-tuning: the objective of instruction following."""

import functools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from trl import SFTConfig, SFTTrainer

from hbat.data.formats import sft_faults
from hbat.ewc.fisher import IGNORED, Example
from hbat.objectives.objective import Objective


def tokenised_sequences(row: Mapping[str, Any], *, completion_only: bool = True) -> Iterator[Example]:
    """Take the sequences out of a row that TRL's SFTTrainer prepared.

    Args:
        row: A row with `input_ids` and `labels` (or the masks of older TRL), packed (`seq_lengths`) or not.
        completion_only: Whether the host trains on the completion alone; only read where it left masks.

    Yields:
        One example a sequence.
    """
    input_ids = row["input_ids"]
    labels = row.get("labels")
    if labels is None:  # trl < 1.6 hands the masks to its collator
        mask = [1] * len(input_ids)
        for key in (*(["completion_mask"] if completion_only else []), "assistant_masks"):
            mask = [kept and own for kept, own in zip(mask, row.get(key) or mask, strict=True)]
        labels = [token if kept else IGNORED for token, kept in zip(input_ids, mask, strict=True)]
    start = 0
    for length in row.get("seq_lengths") or [len(input_ids)]:
        yield Example(input_ids[start : start + length], labels[start : start + length])
        start += length


def sft(config: Any) -> Objective:
    """Describe supervised fine-tuning with TRL's SFTTrainer.

    Args:
        config: Fields of `trl.SFTConfig`, or a ready one.

    Returns:
        The objective `sft`.
    """
    given = config if isinstance(config, Mapping) else vars(config or SimpleNamespace())
    return Objective(
        name="sft",
        trainer_class=SFTTrainer,
        config_class=SFTConfig,
        config=config,
        trains_zero=True,
        faults=functools.partial(sft_faults, text_field=given.get("dataset_text_field", "text")),
        examples=functools.partial(
            tokenised_sequences, completion_only=given.get("completion_only_loss") is not False
        ),
    )
