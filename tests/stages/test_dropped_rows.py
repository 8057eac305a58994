"""Rows that TRL drops from a stage are counted, and a stage without rows is an error that says why."""

import inspect
import logging

import cases
import pytest
import runs
import trl
from datasets import Dataset, concatenate_datasets

from hbat.data.load import DatasetError

drops_rows = pytest.mark.skipif(
    "label != -100" not in inspect.getsource(trl.SFTTrainer), reason="this TRL trains on rows with nothing to learn"
)
LONG = "a long question " * 20


def long_pairs(count):
    rows = [{"prompt": LONG, "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(count)]
    return Dataset.from_list(rows)


def long_answers(count):
    return Dataset.from_list([{"prompt": LONG, "completion": f" yes {n}"} for n in range(count)])


def train(folder, sft, dpo):
    lengths = {"sft": {"max_length": 64}, "dpo": {"max_length": 64}}
    return runs.train(cases.tiny_llama(), folder, num_rounds=1, data={"sft": sft, "dpo": dpo}, **lengths)


@drops_rows
def test_a_stage_of_which_no_row_is_left_is_named(tmp_path):
    expected = r"stage 1 \(.*dpo\): none of the 8 rows of train_dataset\['dpo'\] is left .*`dpo\.max_length` is 64"
    with pytest.raises(DatasetError, match=expected):
        train(tmp_path, cases.sft_rows(8), long_pairs(8))


@drops_rows
def test_rows_that_the_trainer_drops_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hbat.stages.runner"):
        train(
            tmp_path,
            concatenate_datasets([cases.sft_rows(6), long_answers(2)]),
            concatenate_datasets([cases.preference_rows(5), long_pairs(3)]),
        )
    said = [each.message for each in caplog.records if each.name == "hbat.stages.runner"]
    assert [message.partition(": `")[0] for message in said] == [
        "stage 0 (round 1 of 1, sft): the trainer drops 2 of 8 rows of train_dataset['sft']",
        "stage 1 (round 1 of 1, dpo): the trainer drops 3 of 8 rows of train_dataset['dpo']",
    ]


@pytest.mark.slow
def test_nothing_is_said_where_all_rows_are_trained_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hbat.stages.runner"):
        train(tmp_path, cases.sft_rows(8), cases.preference_rows(8))
    assert [each for each in caplog.records if each.name == "hbat.stages.runner"] == []
