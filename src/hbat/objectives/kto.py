"""Kahneman-Tversky optimisation: the offline objective of answers that were judged one by one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments
from trl import KTOConfig, KTOTrainer

from hbat.data.faults import RowCheck
from hbat.data.formats import kto_faults
from hbat.engines.engine import ALL_ENGINES
from hbat.ewc.fisher import Example
from hbat.objectives.objective import Objective, completion_example


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """KTO with TRL's KTOTrainer.

    Raises:
        ImportError: If the installed TRL has only the experimental KTOTrainer.
    """

    name: str = "kto"
    trainer_class: type[Trainer] = KTOTrainer
    config_class: type[TrainingArguments] = KTOConfig
    uses_reference: bool = True
    engines: tuple[str, ...] = ALL_ENGINES

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(base.__module__.startswith("trl.experimental") for base in KTOTrainer.__mro__):
            raise ImportError(
                "The objective 'kto' needs TRL 1.8 or newer: the KTOTrainer of older versions is experimental, and "
                "with an adapter its reference policy is the base model. Install `trl>=1.8`, or use `dpo` for pairs."
            )

    def row_check(self) -> RowCheck:
        """The check of judged answers."""
        return kto_faults

    def fisher_sequences(self, row: Mapping[str, Any]) -> Iterator[Example]:
        """The prompt with its answer, whose tokens are the targets; nothing for a bad answer."""
        if row["label"]:
            yield completion_example(row["prompt_ids"], row["completion_ids"])
