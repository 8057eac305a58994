"""Checks the data sets of a run, by objective: as they are, then against model and tokenizer."""

import sys
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from hbat.config.fields import nearest
from hbat.config.hbat import HBATConfig
from hbat.data.check import check_dataset
from hbat.data.faults import RowCheck
from hbat.data.load import DatasetError
from hbat.data.template import row_fit
from hbat.objectives.objective import Objective

_TRAIN, _EVAL = "train_dataset", "eval_dataset"
_MEDIA = ("image", "images")  # the columns that make a data set one of vision for TRL


def checked_inputs(
    config: HBATConfig,
    objectives: Mapping[str, Objective],
    sections: Mapping[str, TrainingArguments],
    train_dataset: Mapping[str, Dataset],
    eval_dataset: Mapping[str, Dataset] | None,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Check the data sets of a run and every row of them.

    Returns:
        Training and evaluation data sets by objective, without the rows that were dropped.

    Raises:
        TypeError: If an argument is not a mapping.
        ValueError: If an objective has no training data, a key is not an objective, or a data set is faulty.
    """
    given = {_TRAIN: train_dataset, _EVAL: eval_dataset or {}}
    for argument, datasets in given.items():
        if not isinstance(datasets, Mapping):
            raise TypeError(
                f"`{argument}` is a {type(datasets).__name__}; give a mapping from objective to data set, with the "
                f"keys {list(objectives)}."
            )
        for name in datasets:
            if name not in objectives:
                raise ValueError(
                    f"`{argument}` has rows for {name!r}, which no stage trains.{nearest(str(name), objectives)}"
                )
    missing = [name for name in objectives if name not in train_dataset]
    if missing:
        raise ValueError(f"`train_dataset` has no rows for {missing}; its keys are {list(train_dataset)}.")
    train, evaluation = (
        {
            name: _check(argument, dataset, config, objectives[name], sections[name], objectives[name].faults)
            for name, dataset in datasets.items()
        }
        for argument, datasets in given.items()
    )
    return train, evaluation


def fitting_inputs(
    config: HBATConfig,
    objectives: Mapping[str, Objective],
    sections: Mapping[str, TrainingArguments],
    datasets: tuple[dict[str, Dataset], dict[str, Dataset]],
    model: Any,
    tokenizer: Any,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Check what `checked_inputs` returned against the model and its tokenizer or processor, and drop rows again."""
    vocabulary = int(getattr(model.get_input_embeddings(), "num_embeddings", 0) or sys.maxsize)
    is_processor = hasattr(tokenizer, "tokenizer")

    def fitted(argument: str, name: str, dataset: Dataset) -> Dataset:
        objective, section = objectives[name], sections[name]
        if objective.faults is not None and not is_processor:
            _refuse_media(dataset, f"{argument}[{name!r}]")
        own_template = is_processor or getattr(section, "chat_template_path", None) is not None
        fit = row_fit(objective.faults, None if own_template else tokenizer, vocabulary)
        check = fit if fit is not None and fit.concerns(dataset) else None
        return _check(argument, dataset, config, objective, section, check)

    train, evaluation = (
        {name: fitted(argument, name, dataset) for name, dataset in given.items()}
        for argument, given in zip((_TRAIN, _EVAL), datasets, strict=True)
    )
    return train, evaluation


def _check(
    argument: str,
    dataset: Dataset,
    config: HBATConfig,
    objective: Objective,
    section: TrainingArguments,
    faults: RowCheck | None,
) -> Dataset:
    training = argument == _TRAIN
    return check_dataset(
        dataset,
        name=f"{argument}[{objective.name!r}]",
        faults=faults,
        num_rounds=config.num_rounds if training else 1,
        rows_per_round=objective.rows_of_a_stage(section) if training else 1,
        on_bad_rows=config.on_bad_rows,
    )


def _refuse_media(dataset: Dataset, name: str) -> None:
    found = [column for column in _MEDIA if column in dataset.column_names]
    if found:
        raise DatasetError(
            f"{name} has the column `{found[0]}`, but the model has a tokenizer and no processor, so it reads only "
            "text. Remove the column, or pass the processor of a vision-language model as `processing_class`."
        )
