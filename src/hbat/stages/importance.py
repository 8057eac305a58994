"""The importance that a stage yields: from its displacement, from the Fisher of its data, or from a control."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbat.ewc.fisher import Example, diagonal_fisher
from hbat.ewc.importance import displacement
from hbat.ewc.parameters import trainable_parameters
from hbat.objectives.objective import Objective
from hbat.state.consolidation import Consolidation
from hbat.state.plan import Stage


def fisher_examples(consolidation: Consolidation | None, objective: Objective, rows: Any) -> list[Example]:
    """Sequences of a stage's tokenised rows, evenly spread, for `source: fisher`; none for other sources."""
    if consolidation is None or consolidation.config.source != "fisher":
        return []
    limit = consolidation.config.fisher_samples
    count = min(len(rows), limit)
    spread = (rows[index * len(rows) // count] for index in range(count))
    sequences = itertools.chain.from_iterable(map(objective.fisher_sequences, spread))  # a packed row holds several
    return list(itertools.islice(sequences, limit))


def measure(
    consolidation: Consolidation | None,
    model: Any,
    start: Mapping[str, Tensor],
    examples: list[Example],
    *,
    stage: Stage,
    seed: int,
) -> Mapping[str, Tensor] | None:
    """Measure the raw importance of a stage, once its trainer is gone.

    Args:
        consolidation: What importance is for; None without it.
        model: The model at the stage's end.
        start: Its trainable weights at the stage's start.
        examples: Sequences for the Fisher.
        stage: The stage.
        seed: Seed of the run.

    Returns:
        Raw importance by parameter name; None where nothing would use it.
    """
    if consolidation is None or (consolidation.config.f_max == 0 and consolidation.config.freeze == 0):
        return None
    config, parameters = consolidation.config, trainable_parameters(model)
    if config.source == "displacement":
        # To the CPU one by one, so that an accelerator never holds a float32 copy of the whole model.
        return displacement(parameters, start, config.granularity, device="cpu")
    if config.source == "fisher":
        return diagonal_fisher(
            model,
            examples,
            estimator=config.estimator,
            granularity=config.granularity,
            batch_size=config.fisher_batch_size,
            generator=torch.Generator().manual_seed(seed + stage.index),
        )
    return consolidation.control(parameters, stage)
