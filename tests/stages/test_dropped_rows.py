"""Rows that TRL drops from a stage are counted, and a stage without rows is an error that says why."""

import logging

import cases
import pytest
import runs
import trl
from datasets import Dataset, concatenate_datasets
from runs import drops_rows

from hbat.data.load import DatasetError

SAYS = "hbat.stages.dropped_rows"
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
def test_a_stage_of_which_no_row_is_left_is_named_before_the_first_step(tmp_path):
    expected = r"stage 1 \(.*dpo\): none of the 8 rows of train_dataset\['dpo'\] is left .*`dpo\.max_length` is 64"
    with pytest.raises(DatasetError, match=expected):
        train(tmp_path, cases.sft_rows(8), long_pairs(8))
    assert not list(tmp_path.iterdir())


@drops_rows
def test_rows_that_the_trainer_drops_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger=SAYS):
        train(
            tmp_path,
            concatenate_datasets([cases.sft_rows(6), long_answers(2)]),
            concatenate_datasets([cases.preference_rows(5), long_pairs(3)]),
        )
    said = [each.message for each in caplog.records if each.name == SAYS]
    assert [message.partition(": `")[0] for message in said] == [
        "stage 0 (round 1 of 1, sft): the trainer drops 2 of 8 rows of train_dataset['sft']",
        "stage 1 (round 1 of 1, dpo): the trainer drops 3 of 8 rows of train_dataset['dpo']",
    ]


@drops_rows
def test_evaluation_rows_that_the_trainer_drops_are_counted_once(tmp_path, caplog):
    rows = {"sft": concatenate_datasets([cases.sft_rows(2), long_answers(1)])}
    run = runs.build_run(cases.tiny_llama(), tmp_path, evaluation=rows, sft={"max_length": 64})
    with caplog.at_level(logging.WARNING, logger=SAYS):
        first, second = run.evaluate(), run.evaluate()
    (said,) = [record.message for record in caplog.records if record.name == SAYS]
    assert said.startswith("evaluation: the trainer drops 1 of 3 rows of eval_dataset['sft']: `sft.max_length` is 64")
    assert first["sft"]["loss"] == second["sft"]["loss"]


@drops_rows
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_an_evaluation_without_rows_ends_the_run_before_its_first_stage(name, tmp_path):
    rows = {"sft": long_answers(3), "dpo": long_pairs(3)}[name]
    with pytest.raises(DatasetError, match=rf"none of the 3 rows of eval_dataset\['{name}'\] is left to evaluate"):
        runs.build_run(cases.tiny_llama(), tmp_path, evaluation={name: rows}, **{name: {"max_length": 64}})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_is_said_where_all_rows_are_trained_on(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger=SAYS):
        train(tmp_path, cases.sft_rows(8), cases.preference_rows(8))
    assert [each for each in caplog.records if each.name == SAYS] == []


# --- how long rows are -------------------------------------------------------------------------------------------

SHORT = [{"prompt": f"{number}?", "completion": " yes"} for number in range(18)]
ROWS = Dataset.from_list([*SHORT, {"prompt": "a?", "completion": " yes" * 20}, {"prompt": LONG, "completion": " no"}])


def built(folder, **sft):
    return runs.build_run(cases.tiny_llama(), folder, data=runs.rows() | {"sft": ROWS}, sft=sft, num_rounds=1)


@drops_rows
def test_rows_are_counted_as_the_trainer_makes_them(tmp_path):
    train = built(tmp_path, max_length=64).row_lengths()[0]
    assert (train.name, train.limit, train.cut, train.dropped) == ("sft train", 64, 2, 1)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_lengths_are_those_of_the_trainers_own_rows_uncut(objective, tmp_path):
    """One token per byte: as many as TRL makes, with the end token that it adds."""
    found = {length.name: length for length in built(tmp_path, max_length=None).row_lengths()}[f"{objective} train"]
    rows = {"sft": ROWS, "dpo": runs.rows()["dpo"]}[objective]
    trainer_class, config = (trl.SFTTrainer, trl.SFTConfig) if objective == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    args = config(output_dir=str(tmp_path), **cases.CHEAP_ARGS, max_length=None)
    made = trainer_class(
        cases.lora_llama(), args=args, train_dataset=rows, processing_class=cases.tiny_tokenizer()
    ).train_dataset
    if objective == "sft":
        counts = [len(ids) for ids in made["input_ids"]]
    else:
        sides = [[len(ids) for ids in made[name]] for name in made.column_names if name.endswith("_ids")]
        counts = [prompt + max(answers) for prompt, *answers in zip(*sides, strict=True)]
    counts.sort()
    assert (found.median, found.longest) == (counts[(len(counts) - 1) // 2], counts[-1])
