"""Direct preference optimisation: the offline objective of human preference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

from hbat.data.faults import RowCheck
from hbat.data.formats import preference_faults
from hbat.engines.engine import ALL_ENGINES
from hbat.ewc.fisher import Example
from hbat.objectives.objective import Objective, completion_example


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Preference training with TRL's DPOTrainer."""

    name: str = "dpo"
    trainer_class: type[Trainer] = DPOTrainer
    config_class: type[TrainingArguments] = DPOConfig
    uses_reference: bool = True
    engines: tuple[str, ...] = ALL_ENGINES

    def row_check(self) -> RowCheck:
        """The check of preference pairs."""
        return preference_faults

    def fisher_sequences(self, row: Mapping[str, Any]) -> Iterator[Example]:
        """The prompt with its chosen answer, whose tokens are the targets."""
        yield completion_example(row["prompt_ids"], row["chosen_ids"])
