"""Sequences out of rows that TRL's own SFTTrainer prepared."""

import cases
import pytest
import runs
import trl
from datasets import Dataset

from hbat.data.check import check_dataset
from hbat.data.load import DatasetError
from hbat.objectives.sft import SFT


def prepared(rows, folder, **options):
    args = trl.SFTConfig(output_dir=str(folder), report_to="none", **runs.section(**options))
    trainer = trl.SFTTrainer(
        cases.tiny_llama(), args=args, train_dataset=rows, processing_class=cases.tiny_tokenizer()
    )
    return trainer.train_dataset


def targets(example):
    return [label for label in example.labels if label != -100]


def text(ids):
    return cases.tiny_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
def test_only_the_completion_is_a_target(conversational, tmp_path):
    rows = cases.sft_rows(3, conversational=conversational)
    plain = cases.sft_rows(3)
    for row, original in zip(prepared(rows, tmp_path), plain, strict=True):
        (example,) = SFT().fisher_sequences(row)
        assert text(targets(example)).strip() == original["completion"].strip()
        assert original["prompt"] in text(example.input_ids)
        assert targets(example)[-1] == cases.tiny_tokenizer().eos_token_id


def test_every_token_is_a_target_where_trl_trains_on_all(tmp_path):
    (row,) = prepared(cases.sft_rows(1), tmp_path, completion_only_loss=False)
    (example,) = SFT(config={"completion_only_loss": False}).fisher_sequences(row)
    assert list(example.labels) == list(example.input_ids)


def test_a_packed_row_holds_all_its_sequences_apart(tmp_path):
    rows = cases.sft_rows(5)
    packed = prepared(rows, tmp_path, packing=True, max_length=64)
    assert len(packed) < len(rows)
    found = [each for row in packed for each in SFT().fisher_sequences(row)]
    assert sorted(text(each.input_ids) for each in found) == sorted(row["prompt"] + row["completion"] for row in rows)
    assert sorted(text(targets(each)) for each in found) == sorted(row["completion"] for row in rows)


def test_masks_of_an_older_trl_say_the_same_as_labels():
    (example,) = SFT().fisher_sequences({
        "input_ids": [5, 6, 7, 8],
        "completion_mask": [0, 1, 1, 1],
        "assistant_masks": [1, 1, 0, 1],
    })
    assert example.labels == [-100, 6, -100, 8]
    (whole,) = SFT().fisher_sequences({"input_ids": [5, 6]})
    assert whole.labels == [5, 6]


# --- what is checked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True], ids=["mapping", "ready"])
def test_the_column_of_text_that_is_configured_is_the_one_checked(ready, tmp_path):
    options = {"dataset_text_field": "content"}
    config = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", **runs.section(**options)) if ready else options
    faults = SFT(config=config).row_check()
    good = Dataset.from_list([{"content": "Some text."}])
    assert check_dataset(good, name="data", faults=faults)[0] is good
    with pytest.raises(DatasetError, match=r"has no column `content`.*SFT expects `content`; `messages`"):
        check_dataset(Dataset.from_list([{"text": "Some text."}]), name="data", faults=faults)


@pytest.mark.parametrize("config", [None, {}])
def test_the_column_of_text_is_text_unless_configured(config):
    check = SFT(config=config).row_check()
    assert not list(check({"text": "Some text."}))
    (fault,) = check({"story": "Some text."})
    assert fault.field == "text"
    assert "SFT expects `text`; `messages`" in fault.problem
