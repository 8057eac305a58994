import functools
import logging

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hbat.data.check import check_dataset, search
from hbat.data.faults import Fault
from hbat.data.formats import preference_faults, sft_faults
from hbat.data.load import DatasetError

NAME = "train_dataset['dpo']"


def pairs(count=5):
    return [{"prompt": f"Question {n}", "chosen": f"Good {n}", "rejected": f"Bad {n}"} for n in range(count)]


def check(dataset, faults=preference_faults, **options):
    return check_dataset(dataset, name=NAME, faults=faults, **options)[0]


def refusal(dataset, faults=preference_faults, **options):
    with pytest.raises(DatasetError) as caught:
        check(dataset, faults, **options)
    assert str(caught.value).startswith(NAME)
    return str(caught.value)


def test_a_good_data_set_comes_back_as_it_is():
    dataset = Dataset.from_list(pairs())
    assert check(dataset, num_rounds=5) is dataset


def test_an_empty_turn_is_named_with_its_row_and_field():
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]} for _ in range(3)
    ]
    rows[2]["messages"][1]["content"] = " "
    assert refusal(Dataset.from_list(rows), sft_faults) == (
        f"{NAME}, row 2, field `messages[1].content`: the content is empty. Faulty rows: 1 of 3 (empty turn: 1). "
        "Fix the data, or set `on_bad_rows: drop` to train without these rows."
    )


def test_all_faulty_rows_are_counted_by_kind():
    rows = pairs(2500)
    rows[7]["chosen"] = rows[1003]["chosen"] = ""
    rows[2400]["rejected"] = rows[2400]["chosen"]
    message = refusal(Dataset.from_list(rows))
    assert f"{NAME}, row 7, field `chosen`: the text is empty." in message
    assert "Faulty rows: 3 of 2500 (empty text: 2, identical pair: 1)." in message


def test_faulty_rows_are_dropped_and_counted(caplog):
    rows = pairs()
    rows[1]["chosen"] = ""
    with caplog.at_level(logging.WARNING, logger="hbat"):
        kept = check(Dataset.from_list(rows), on_bad_rows="drop", num_rounds=4)
    assert kept["prompt"][:] == ["Question 0", "Question 2", "Question 3", "Question 4"]
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith(f"{NAME}: dropped 1 of 5 rows (empty text: 1). First: row 1, field `chosen`")


def test_a_second_check_names_rows_by_their_numbers_before_the_first():
    rows = pairs()
    rows[1]["chosen"] = ""
    left, origin = check_dataset(Dataset.from_list(rows), name=NAME, faults=preference_faults, on_bad_rows="drop")

    def second(row):
        if row["prompt"] != "Question 0":
            yield Fault("short", "prompt", "it is short")

    assert list(origin.number) == [0, 2, 3, 4]
    assert "row 2, field `prompt`" in refusal(left, second, origin=origin)
    _, origin = check_dataset(left, name=NAME, faults=second, on_bad_rows="drop", origin=origin)
    assert list(origin.number) == [0]


def test_too_few_rows_left_after_dropping_are_refused():
    rows = pairs()
    rows[1]["chosen"] = ""
    assert "Without them 4 rows remain, but 5 are needed" in refusal(
        Dataset.from_list(rows), on_bad_rows="drop", num_rounds=5
    )


@pytest.mark.parametrize(
    ("dataset", "advice"),
    [
        (None, "is None; it must be a `datasets.Dataset`"),
        (DatasetDict({"train": Dataset.from_list(pairs())}), "Did you mean `dataset['train']`?"),
        (DatasetDict({"valid": Dataset.from_list(pairs())}), "Did you mean `dataset['valid']`?"),
        (IterableDataset.from_generator(pairs), "Load it without `streaming=True`"),
        (pairs(), "Dataset.from_list(rows)"),
        ("a/name", "is a str"),
        (Dataset.from_list([]), "has no rows"),
        (Dataset.from_dict({"chosen": []}), "has no rows"),
    ],
)
def test_what_is_no_data_set_is_refused_with_advice(dataset, advice):
    assert advice in refusal(dataset, None)


def test_fewer_rows_than_rounds_are_refused():
    message = refusal(Dataset.from_list(pairs(11)), num_rounds=3, rows_per_round=4)
    assert "too few rows: 11 for 3 rounds; every round needs at least 4 rows (set by the batch sizes" in message
    message = refusal(Dataset.from_list(pairs(3)), num_rounds=4)
    assert "too few rows: 3 for 4 rounds; every round needs at least 1 row." in message


def test_no_row_is_looked_at_without_a_check():
    dataset = Dataset.from_list([{"anything": 1}])
    assert check(dataset, None) is dataset


def test_a_missing_column_names_those_there_are_and_the_nearest():
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejectd": "Go away"}]
    message = refusal(Dataset.from_list(rows), on_bad_rows="drop")
    assert "has no column `rejected`. Its columns: `prompt`, `chosen`, `rejectd`." in message
    assert "`rejectd`: Did you mean `rejected`?" in message
    assert "DPO expects `prompt`, `chosen`, `rejected`; or" in message


def test_a_data_set_of_nothing_but_images_lacks_its_columns():
    message = refusal(Dataset.from_list([{"image": "a.png"}]), sft_faults)
    assert "has no column `text`. Its columns: `image`." in message


def test_tokenized_preference_data_is_refused():
    assert "DPO does not accept tokenized data (`input_ids`)" in refusal(Dataset.from_list([{"input_ids": [1, 2]}]))


def test_a_pair_that_reverses_an_earlier_one_names_it():
    rows = pairs()
    rows.append({"prompt": "Question 3", "chosen": "Bad 3", "rejected": "Good 3"})
    message = refusal(Dataset.from_list(rows))
    assert f"{NAME}, row 5, field `chosen`: row 3 is the same pair with chosen and rejected swapped." in message
    assert check(Dataset.from_list(rows), on_bad_rows="drop")["prompt"][:] == [f"Question {n}" for n in range(5)]


def test_the_first_faulty_row_is_named_also_if_it_is_a_reversed_pair():
    rows = [
        *pairs(),
        {"prompt": "Question 3", "chosen": "Bad 3", "rejected": "Good 3"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    assert f"{NAME}, row 5, field `chosen`: row 3 is the same pair" in refusal(Dataset.from_list(rows))


def test_a_repeated_pair_is_no_reversal():
    assert len(check(Dataset.from_list(pairs() + pairs()))) == 10


def test_a_faulty_row_contradicts_no_other_row():
    found = search(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2), preference_faults)
    assert found.counts == "identical pair: 2"


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow", "python", None])
def test_rows_come_back_plain_whatever_the_format_of_the_data_set(form):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]
    assert check(Dataset.from_list(rows).with_format(form), sft_faults).to_list() == rows
    assert check(Dataset.from_list(rows).with_format(form), sft_faults)[0] == rows[0]


def test_a_transform_of_the_user_is_part_of_the_data():
    dataset = Dataset.from_list(pairs()).with_transform(lambda batch: {**batch, "chosen": [""] * len(batch["chosen"])})
    assert "empty text: 5" in refusal(dataset)


def test_a_check_of_the_users_own_is_used():
    def own(row):
        if row["score"] < 0:
            yield Fault("bad score", "score", "it is negative")

    message = refusal(Dataset.from_list([{"score": 1}, {"score": -1}]), own)
    assert "row 1, field `score`: it is negative." in message


def test_a_text_column_of_another_name_is_accepted():
    dataset = Dataset.from_list([{"story": "Once."}])
    assert check(dataset, functools.partial(sft_faults, text_field="story")) is dataset


def test_column_types_that_differ_by_row_are_faults_of_rows(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": true, "rejected": "c"}'
    )
    dataset = Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
    assert "row 1, field `chosen`: True is neither a string nor a list of messages." in refusal(dataset)


def test_a_text_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    try:
        dataset = Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
    except ValueError:
        return  # datasets 4.7 refuses such a file by itself
    assert "a text is not UTF-8 ('utf-8' codec can't decode byte 0xe9" in refusal(dataset, sft_faults)
