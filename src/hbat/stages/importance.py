"""What a stage leaves to its objective's importance: its displacement, and its path integral or Fisher information."""

import itertools
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hbat.engines.sharded import shared_as
from hbat.ewc.fisher import Example, diagonal_fisher
from hbat.ewc.importance import displacement, tensor_means
from hbat.ewc.parameters import trainable_parameters
from hbat.objectives.objective import Objective
from hbat.state.consolidation import DISPLACEMENT, IMPORTANCE, Consolidation, Record
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
    path: Mapping[str, Tensor],
    examples: list[Example],
    *,
    stage: Stage,
    seed: int,
) -> Record | None:
    """Measure what a stage leaves to its objective's importance, once its trainer is gone.

    Args:
        consolidation: What importance is for; None without it.
        model: The model at the stage's end.
        start: Its trainable weights at the stage's start.
        path: Its path integral, for `source: path`.
        examples: Sequences for the Fisher.
        stage: The stage.
        seed: Seed of the run.

    Returns:
        Tensors by kind and parameter name; None where nothing would use them.
    """
    if not is_used(consolidation):
        return None
    config, parameters = consolidation.config, trainable_parameters(model)
    # To the CPU one by one, so that an accelerator never holds a float32 copy of the whole model.
    record: dict[str, Mapping[str, Tensor]] = {
        DISPLACEMENT: displacement(parameters, start, config.granularity, device="cpu")
    }
    if config.source == "path":
        # Tensors that the stage held frozen have none.
        whole = {
            name: path[name] if name in path else shared_as(torch.zeros(parameter.shape), parameter).cpu()
            for name, parameter in parameters.items()
        }
        means = tensor_means(whole).float() if config.granularity == "tensor" else None
        record[IMPORTANCE] = whole if means is None else dict(zip(whole, means.unbind(), strict=True))
    if config.source == "fisher":
        record[IMPORTANCE] = diagonal_fisher(
            model,
            examples,
            estimator=config.estimator,
            granularity=config.granularity,
            batch_size=config.fisher_batch_size,
            generator=torch.Generator().manual_seed(seed + stage.index),
        )
    return record


def is_used(consolidation: Consolidation | None) -> TypeGuard[Consolidation]:
    """Whether importance holds any stage back."""
    return consolidation is not None and (consolidation.config.strength > 0 or consolidation.config.freeze > 0)
