"""Supervised fine-tuning: the objective of instruction following."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hbat.data.faults import RowCheck
from hbat.data.formats import sft_faults
from hbat.engines.engine import ALL_ENGINES
from hbat.ewc.fisher import IGNORED, Example
from hbat.objectives.objective import Objective


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Supervised fine-tuning with TRL's SFTTrainer."""

    name: str = "sft"
    trainer_class: type[Trainer] = SFTTrainer
    config_class: type[TrainingArguments] = SFTConfig
    engines: tuple[str, ...] = ALL_ENGINES

    def row_check(self) -> RowCheck:
        """The check of rows, of the text column that is configured."""
        return functools.partial(sft_faults, text_field=self.given("dataset_text_field", "text"))

    def fisher_sequences(self, row: Mapping[str, Any]) -> Iterator[Example]:
        """Take the sequences out of a row that TRL's SFTTrainer prepared, packed (`seq_lengths`) or not."""
        input_ids, labels = row["input_ids"], row.get("labels")
        if labels is None:  # trl < 1.6 hands the masks to its collator
            masks = ["assistant_masks"]
            if self.given("completion_only_loss", None) is not False:
                masks.append("completion_mask")
            columns = [row[mask] for mask in masks if row.get(mask)]
            labels = [
                token if all(column[at] for column in columns) else IGNORED for at, token in enumerate(input_ids)
            ]
        start = 0
        for length in row.get("seq_lengths") or [len(input_ids)]:
            yield Example(input_ids[start : start + length], labels[start : start + length])
            start += length
