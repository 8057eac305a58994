"""Tries every objective's trainer before the first stage."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from datasets import Dataset
from transformers import TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.objectives.objective import Objective
from hbat.stages.builder import TrainerBuilder
from hbat.stages.learning_rate import extend_schedule


def rehearse(
    objectives: Mapping[str, Objective],
    config: HBATConfig,
    sections: Mapping[str, TrainingArguments],
    train_dataset: Mapping[str, Dataset],
    eval_dataset: Mapping[str, Dataset],
    builder: TrainerBuilder,
) -> None:
    """Build each objective's trainer once, most on a few rows, so that the host refuses now and not after hours.

    Args:
        objectives: The objectives by name.
        config: The run's configuration.
        sections: Configuration of each objective.
        train_dataset: Training rows by objective.
        eval_dataset: Evaluation rows by objective; an objective may be left out.
        builder: Builder of trainers on the run's model. The stage's start must have been taken.

    Raises:
        ValueError: If a trainer cannot be built; the message names its objective.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, objective in objectives.items():
            rows = {"train_dataset": train_dataset[name]}
            if name in eval_dataset:  # the host asks for it where a section sets `eval_strategy`
                rows["eval_dataset"] = eval_dataset[name]
            if not objective.rehearses_all_rows:
                counts = {"train_dataset": objective.rows_of_a_stage(sections[name]), "eval_dataset": 1}
                rows = {key: first_rows(each, counts[key]) for key, each in rows.items()}
            with _named(name), builder.building(objective, folder, **rows) as trainer:
                kind = config.lr_schedule_of(name)
                extend_schedule(trainer, kind, round_index=0, num_rounds=config.num_rounds, steps_before=0)
                trainer.create_optimizer_and_scheduler(num_training_steps=1)


@contextmanager
def _named(objective: str) -> Iterator[None]:
    # The host raises anything from anywhere, and seldom says which section or data set it means.
    try:
        yield
    except (ImportError, NotImplementedError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError | TypeError) and objective in text:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{objective!r} cannot be trained with its section and its rows: {kind}{text}") from error


def first_rows(dataset: Dataset, count: int) -> Dataset:
    """Take as many rows as a trainer needs to be built.

    Args:
        dataset: At least one row.
        count: Number of rows.

    Returns:
        The first rows, again and again where there are too few.
    """
    return dataset.select([index % len(dataset) for index in range(count)])
