"""Direct preference optimisation: the offline objective of human preference."""

from collections.abc import Iterator, Mapping
from typing import Any

from trl import DPOConfig, DPOTrainer

from hbat.data.formats import preference_faults
from hbat.ewc.fisher import IGNORED, Example
from hbat.objectives.objective import Objective


def chosen_sequences(row: Mapping[str, Any]) -> Iterator[Example]:
    """Take the chosen answer out of a row that TRL's DPOTrainer prepared.

    Args:
        row: A row with `prompt_ids` and `chosen_ids`.

    Yields:
        The prompt with its chosen answer, whose tokens are the targets.
    """
    prompt, chosen = list(row["prompt_ids"]), list(row["chosen_ids"])
    yield Example(prompt + chosen, [IGNORED] * len(prompt) + chosen)


def dpo(config: Any) -> Objective:
    """Describe preference training with TRL's DPOTrainer.

    Args:
        config: Fields of `trl.DPOConfig`, or a ready one.

    Returns:
        The objective `dpo`.
    """
    return Objective(
        name="dpo",
        trainer_class=DPOTrainer,
        config_class=DPOConfig,
        config=config,
        trains_zero=True,
        uses_reference=True,
        faults=preference_faults,
        examples=chosen_sequences,
    )
