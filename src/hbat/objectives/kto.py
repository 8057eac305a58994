"""Kahneman-Tversky optimisation: the offline objective of answers that were judged one by one."""

from collections.abc import Iterator, Mapping
from typing import Any

from trl import KTOConfig, KTOTrainer

from hbat.data.formats import kto_faults
from hbat.ewc.fisher import IGNORED, Example
from hbat.objectives.objective import Objective


def desirable_sequences(row: Mapping[str, Any]) -> Iterator[Example]:
    """Take the answer out of a row that TRL's KTOTrainer prepared, if it is a good one.

    Args:
        row: A row with `prompt_ids`, `completion_ids` and `label`.

    Yields:
        The prompt with its answer, whose tokens are the targets; nothing for a bad answer.
    """
    if row["label"]:
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        yield Example(prompt + completion, [IGNORED] * len(prompt) + completion)


def kto(config: Any) -> Objective:
    """Describe KTO with TRL's KTOTrainer.

    Args:
        config: Fields of `trl.KTOConfig`, or a ready one.

    Returns:
        The objective `kto`.

    Raises:
        ImportError: If this TRL has only the experimental KTOTrainer.
    """
    if any(each.__module__.startswith("trl.experimental") for each in KTOTrainer.__mro__):
        raise ImportError(
            "The objective 'kto' needs TRL 1.8 or newer: the KTOTrainer of older versions is experimental, and with "
            "an adapter its reference policy is the base model. Install `trl>=1.8`, or take `dpo` for pairs."
        )
    return Objective(
        name="kto",
        trainer_class=KTOTrainer,
        config_class=KTOConfig,
        config=config,
        trains_zero=True,
        uses_reference=True,
        faults=kto_faults,
        examples=desirable_sequences,
    )
