"""The data sets that a run is given, checked by objective."""

import sys
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from hbat.config.fields import nearest
from hbat.config.hbat import HBATConfig, OnBadRows
from hbat.data.check import check_dataset
from hbat.data.load import DatasetError
from hbat.data.template import row_fit
from hbat.objectives.objective import Objective

_MEDIA = ("image", "images")  # the columns by which TRL takes a data set for one of vision


def checked_datasets(
    given: Mapping[str, Dataset],
    argument: str,
    objectives: Mapping[str, Objective],
    *,
    num_rounds: int = 1,
    rows_a_round: Mapping[str, int] | None = None,
    on_bad_rows: OnBadRows,
) -> dict[str, Dataset]:
    """Check the data sets of an argument, every row of them.

    Args:
        given: Data sets by objective.
        argument: Name of the argument, for messages.
        objectives: The run's objectives by name.
        num_rounds: Into how many parts each is cut.
        rows_a_round: Rows that each part needs, by objective; one where left out.
        on_bad_rows: What to do with rows that cannot be trained on.

    Returns:
        The data sets, without the rows that were dropped.

    Raises:
        TypeError: If it is no mapping.
        ValueError: If a key is no objective or a data set is faulty.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`{argument}` is a {type(given).__name__}; give a mapping from objective to data set, with the keys "
            f"{list(objectives)}."
        )
    for name in given:
        if name not in objectives:
            raise ValueError(
                f"`{argument}` has rows for {name!r}, which no stage trains.{nearest(str(name), objectives)}"
            )
    return {
        name: check_dataset(
            dataset,
            name=f"{argument}[{name!r}]",
            faults=objectives[name].faults,
            num_rounds=num_rounds,
            rows_a_round=(rows_a_round or {}).get(name, 1),
            on_bad_rows=on_bad_rows,
        )
        for name, dataset in given.items()
    }


def checked_inputs(
    config: HBATConfig,
    objectives: Mapping[str, Objective],
    sections: Mapping[str, TrainingArguments],
    train_dataset: Mapping[str, Dataset],
    eval_dataset: Mapping[str, Dataset] | None,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Check all data sets of a run.

    Args:
        config: The run's configuration.
        objectives: The run's objectives by name.
        sections: Configuration of each.
        train_dataset: Training rows by objective.
        eval_dataset: Evaluation rows by objective; an objective may be left out.

    Returns:
        Training and evaluation rows by objective, without those that were dropped.

    Raises:
        TypeError: If an argument is no mapping.
        ValueError: If an objective has no rows to train on, a key is no objective or a data set is faulty.
    """
    train = checked_datasets(
        train_dataset,
        "train_dataset",
        objectives,
        num_rounds=config.num_rounds,
        rows_a_round={name: each.rows_of_a_stage(sections[name]) for name, each in objectives.items()},
        on_bad_rows=config.on_bad_rows,
    )
    missing = [name for name in objectives if name not in train]
    if missing:
        raise ValueError(f"`train_dataset` has no rows for {missing}; its keys are {list(train_dataset)}.")
    return train, checked_datasets(eval_dataset or {}, "eval_dataset", objectives, on_bad_rows=config.on_bad_rows)


def fitting_inputs(
    config: HBATConfig,
    objectives: Mapping[str, Objective],
    sections: Mapping[str, TrainingArguments],
    datasets: tuple[dict[str, Dataset], dict[str, Dataset]],
    model: Any,
    tokenizer: Any,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Check data sets that are good in themselves against model and tokenizer.

    Args:
        config: The run's configuration.
        objectives: The run's objectives by name.
        sections: Configuration of each.
        datasets: Training and evaluation rows by objective.
        model: The model.
        tokenizer: The tokenizer, or a processor, which prepares messages in its own way.

    Returns:
        Training and evaluation rows by objective, without those that were dropped.

    Raises:
        DatasetError: If columns or rows do not fit.
    """
    vocabulary = int(getattr(model.get_input_embeddings(), "num_embeddings", 0) or sys.maxsize)
    is_processor = hasattr(tokenizer, "tokenizer")
    checked = []
    for argument, given in zip(("train_dataset", "eval_dataset"), datasets, strict=True):
        kept = {}
        for name, dataset in given.items():
            check = objectives[name].faults
            if check is not None and not is_processor:
                _refuse_media(dataset, f"{argument}[{name!r}]")
            own_template = is_processor or getattr(sections[name], "chat_template_path", None) is not None
            fit = row_fit(check, None if own_template else tokenizer, vocabulary)
            of_training = argument == "train_dataset"
            kept[name] = check_dataset(
                dataset,
                name=f"{argument}[{name!r}]",
                faults=fit if fit is not None and fit.concerns(dataset) else None,
                num_rounds=config.num_rounds if of_training else 1,
                rows_a_round=objectives[name].rows_of_a_stage(sections[name]) if of_training else 1,
                on_bad_rows=config.on_bad_rows,
            )
        checked.append(kept)
    return checked[0], checked[1]


def _refuse_media(dataset: Dataset, name: str) -> None:
    found = [each for each in _MEDIA if each in dataset.column_names]
    if found:
        raise DatasetError(
            f"{name} has the column `{found[0]}`, but the model has a tokenizer and no processor, so it reads text "
            "alone. Remove the column, or pass the processor of a vision-language model as `processing_class`."
        )
