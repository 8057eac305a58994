"""TODO: say what this file owns."""

import math
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments


def estimated_steps(
    args: TrainingArguments, rows: int, num_rounds: int, epoch_steps: Callable[[Any, int], int] | None = None
) -> int:
    """Estimate the optimizer steps of a stage before its data is tokenised.

    Args:
        args: The objective's configuration.
        rows: Rows of its whole data set.
        num_rounds: Number of parts.
        epoch_steps: The objective's own steps of one epoch, of the configuration and the rows of a part.

    Returns:
        Optimizer steps; packing and filters can make them fewer.
    """
    if args.max_steps > 0:
        return args.max_steps
    if epoch_steps is not None:
        return math.ceil(epoch_steps(args, math.ceil(rows / num_rounds)) * args.num_train_epochs)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return math.ceil(math.ceil(rows / num_rounds / batch) * args.num_train_epochs)
