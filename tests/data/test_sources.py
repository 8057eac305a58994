"""Data as users name it: files, names and mappings, mixtures of them, and rows that are held out."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Json
from run_files import write_rows

from hbat.data.check import check_dataset
from hbat.data.formats import preference_faults, prompt_faults, sft_faults
from hbat.data.load import DatasetError
from hbat.data.sources import load_rows, load_splits

NAME = "`datasets.sft`"


def load(source, check=sft_faults):
    return load_rows(source, name=NAME, check=check)[0]


def texts(rows):
    return rows.dataset["text"][:]


@pytest.fixture
def files(tmp_path):
    """Two files of texts, a0 to a7 and b0 to b3."""
    return [
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{index}"} for index in range(count)])
        for name, count in (("a", 8), ("b", 4))
    ]


def test_a_list_is_one_after_the_other(files):
    assert texts(load(files)) == [f"a{index}" for index in range(8)] + [f"b{index}" for index in range(4)]


def test_a_mixture_takes_files_mappings_and_data_sets(files):
    rows = load([files[0], {"path": files[1], "rows": 1}, Dataset.from_list([{"text": "c"}])])
    assert texts(rows)[7:] == ["a7", "b0", "c"]


def test_weights_are_shares_of_the_largest_mixture_that_repeats_no_row(files):
    rows = load([{"path": files[0], "weight": 3}, {"path": files[1], "weight": 1}])
    assert texts(rows) == [f"a{index}" for index in range(8)] + ["b0", "b1", "b2"]  # 8 / (3/4) = 10.67 rows in all
    rows = load([{"path": files[0], "weight": 0.1}, {"path": files[1], "weight": 0.9}])
    assert texts(rows) == ["a0", "b0", "b1", "b2", "b3"]


def test_shuffled_rows_are_others_than_the_first_and_repeat_with_their_seed(files):
    first, again, other = (
        texts(load({"path": files[0], "rows": 4, "shuffle": True, "seed": seed})) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 4
    assert first != ["a0", "a1", "a2", "a3"]


def test_options_of_a_mixture_count_for_all_of_its_parts(tmp_path):
    names = [write_rows(tmp_path / f"{name}.jsonl", [{"q": name, "a": "Yes."}] * 2) for name in "ab"]
    rows = load({"mixture": names, "columns": {"question": "q", "answer": "a"}, "rows": 1})
    assert [row["prompt"][0]["content"] for row in rows.dataset] == ["a", "b"]


def test_a_mixture_of_instructions_and_conversations_becomes_conversations():
    alpaca = Dataset.from_list([{"instruction": "Hi", "output": "Hello."}])
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    calls = [*turns, {"from": "human", "value": "1+2?"}, {"from": "function_call", "value": '{"name": "add"}'}]
    sharegpt = Dataset.from_list([{"conversations": [*calls, turns[1]]}])
    rows = load([alpaca, sharegpt])
    assert [[turn["role"] for turn in row["messages"]] for row in rows.dataset] == [
        ["user", "assistant"],
        ["user", "assistant", "user", "assistant", "assistant"],
    ]


def test_a_mixture_of_pairs_with_and_without_prompts_becomes_whole_conversations():
    ranked = Dataset.from_list([{"question": "Hi", "response_j": "Hello.", "response_k": "What?"}])
    sides = {
        side: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "Hello."), ("rejected", "What?"))
    }
    rows = load([ranked, Dataset.from_list([sides])], preference_faults)
    assert rows.dataset.to_list() == [sides, sides]
    bad = load(
        [Dataset.from_list([{"question": "Hi", "response_j": "", "response_k": "B"}]), Dataset.from_list([sides])],
        preference_faults,
    )
    with pytest.raises(DatasetError, match="row 0 of part 0, field `response_j`: the text is empty"):
        check_dataset(bad.dataset, name=NAME, faults=preference_faults, origin=bad.origin)


def test_a_faulty_row_is_named_with_its_file_and_its_number_there(tmp_path, files):
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "c"}, {"text": ""}])
    rows = load([files[0], bad])
    with pytest.raises(DatasetError, match=r"row 1 of bad\.jsonl, field `text`: the text is empty"):
        check_dataset(rows.dataset, name=NAME, faults=sft_faults, origin=rows.origin)


def test_rows_keep_their_numbers_through_shuffling_and_splitting(tmp_path):
    given = [{"question": f"Question {index}", "answer": "" if index == 17 else "Yes."} for index in range(40)]
    source = {"path": write_rows(tmp_path / "rows.jsonl", given), "shuffle": True, "eval_split": 0.3}
    for rows in load_rows(source, name=NAME, check=sft_faults):
        for index, row in enumerate(rows.dataset):
            assert row["prompt"][0]["content"] == f"Question {rows.origin.number[index]}"


#: Rows of which each question occurs four times, and what tells the question.
ASKED = {
    "prompts": (prompt_faults, lambda index: {"prompt": f"Q{index % 25}", "n": index}, lambda row: row["prompt"]),
    "messages": (
        sft_faults,
        lambda index: {
            "messages": [{"role": "user", "content": f"Q{index % 25}"}, {"role": "assistant", "content": f"A{index}"}]
        },
        lambda row: row["messages"][0]["content"],
    ),
    "longer conversations": (
        sft_faults,
        lambda index: {
            "conversations": [
                {"from": "human", "value": f"Q{index % 25}"}, {"from": "gpt", "value": f"A{index}"},
                {"from": "human", "value": f"More {index}"}, {"from": "gpt", "value": "No."},
            ]
        },
        lambda row: row["messages"][0]["content"],
    ),
    "alpaca": (
        sft_faults, lambda index: {"instruction": f"Q{index % 25}", "output": f"A{index}"},
        lambda row: row["prompt"][0]["content"],
    ),
    "pairs": (
        preference_faults, lambda index: {"prompt": f"Q{index % 25}", "chosen": f"A{index}", "rejected": "B"},
        lambda row: row["prompt"],
    ),
    "pairs without prompts": (
        preference_faults, lambda index: {"chosen": f"Q{index % 25:02}?A{index}", "rejected": f"Q{index % 25:02}?B"},
        lambda row: row["chosen"][:3],
    ),
    "transcripts": (
        preference_faults,
        lambda index: {
            side: f"\n\nHuman: Q{index % 25}\n\nAssistant: x{index}\n\nHuman: y\n\nAssistant: {side}"
            for side in ("chosen", "rejected")
        },
        lambda row: row["chosen"].split("\n\n")[1],
    ),
    "whole pairs": (
        preference_faults,
        lambda index: {
            side: [{"role": "user", "content": f"Q{index % 25}"}, {"role": "assistant", "content": f"{side} {index}"}]
            for side in ("chosen", "rejected")
        },
        lambda row: row["chosen"][0]["content"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_no_prompt_is_both_trained_and_evaluated_on(name):
    check, make, asked = ASKED[name]
    source = {"path": Dataset.from_list([make(index) for index in range(100)]), "eval_split": 0.2}
    train, held_out = load_splits(source, None, names=(NAME, "`eval_datasets.sft`"), check=check)
    assert len(train.dataset) + len(held_out.dataset) == 100
    assert len(held_out.dataset) == 20
    assert not {asked(row) for row in train.dataset} & {asked(row) for row in held_out.dataset}


def refusals(files):
    """Sources, and what the message says."""
    mixed = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    numbers = Dataset.from_list([{"text": 3}])
    return {
        "weight of nothing": ([{"path": files[0], "weight": 0}], "a.jsonl: `weight` is 0; it must be"),
        "weight of one": ([{"path": files[0], "weight": 1}, files[1]], "for all parts or none, but b.jsonl has none"),
        "weight without end": ([{"path": files[0], "weight": float("inf")}], "`weight` is inf; it must be a finite"),
        "a word for a seed": ({"path": files[1], "shuffle": True, "seed": "x"}, "`seed` is 'x'; it must be a whole"),
        "a negative seed": ({"path": files[1], "eval_split": 0.5, "seed": -1}, "`seed` is -1; it must be a whole"),
        "files twice": ({"path": [files[1]], "data_files": files[1]}, "`data_files` does not apply to the file"),
        "columns that differ": ([files[0], mixed], "a.jsonl has the columns text, part 1 has completion, prompt."),
        "types that differ": ([files[0], numbers], "the columns of a.jsonl, part 1 do not agree"),
        "no rows": ({"path": files[1], "rows": 0}, "`rows` is 0; it must be a whole number of at least 1"),
        "unknown key": ({"path": files[1], "laoyut": "x"}, "key `laoyut`; valid are .* Did you mean `layout`?"),
        "fraction": ({"path": files[1], "fraction": 0.1}, "has `fraction`; here it is called `weight`"),
        "streaming": ({"path": files[1], "streaming": True}, "a streamed data set has no length"),
        "a list of rows": ([{"text": "a"}], "unknown key `text`. Create a data set of rows with"),
        "nothing": (None, "is None; it must be a `datasets.Dataset`"),
        "a number": (7, "is a int; it must be a `datasets.Dataset`"),
        "no name": ("", "has no `path`; expected a name on the Hugging Face Hub"),
        "no parts": ([], r"is \[\]; a mixture is a list"),
        "splits": (DatasetDict(train=mixed), r"is a dictionary of splits \(train\)"),
        "unknown layout": ({"path": files[0], "layout": "alpacca"}, "must be one of trl, .* Did you mean `alpaca`?"),
        "layout without its columns": (
            {"path": files[0], "layout": "alpaca"},
            "`layout: alpaca` does not fit the columns `text`. .* needs `instruction`, `output`. Rename or map",
        ),
        "unknown role": ({"path": files[0], "roles": {"human": "usr"}}, "`roles.human` is 'usr'; .* mean `user`?"),
        "no such column": ({"path": files[0], "columns": {"prompt": "txt"}}, "names `txt`, but .* mean `text`?"),
        "share above one": ({"path": files[0], "eval_split": 2}, "must be a share between 0 and 1"),
        "a transform": (
            [Dataset.from_list([{"x": 1}]).with_transform(lambda batch: {"text": ["a"] * len(batch["x"])}), files[0]],
            "part 0 has a transform, which a mixture would lose",
        ),
        "a key of the whole in a part": ([{"path": files[0], "eval_split": 0.1}], "`eval_split`, which is for a"),
        "all held out": ({"path": files[1], "rows": 1, "eval_split": 0.5}, "leaves no rows to train on"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals(["", ""]))
def test_a_source_that_cannot_be_used_is_refused(name, files):
    source, message = refusals(files)[name]
    with pytest.raises(DatasetError, match=message):
        load_splits(source, None, names=(NAME, "`eval_datasets.sft`"), check=sft_faults)


def test_the_log_says_which_layout_was_found_and_what_is_not_used(caplog):
    with caplog.at_level("INFO", logger="hbat"):
        load(Dataset.from_list([{"instruction": "Hi", "response": "Hello.", "category": "talk", "tools": None}]))
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hbat")]
    assert line == (
        "`datasets.sft`: layout `question-answer` (`instruction`, `response`), converted to `prompt`, `completion`; "
        "not used: `category`."
    )


def test_the_log_says_which_columns_of_a_layout_stand_unused_beside_a_format_of_trl(caplog):
    with caplog.at_level("INFO", logger="hbat"):
        load(Dataset.from_list([{"prompt": "Hi", "completion": " Hello.", "system": "Be brief.", "id": 3}]))
        load(Dataset.from_list([{"prompt": "Hi", "completion": " Hello.", "id": 3}]))
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("hbat")]
    assert line == "`datasets.sft`: one of TRL's formats, trained on as it is; not used: `system`."


def test_a_mapping_may_have_several_files_as_its_path(files):
    assert len(load({"path": files, "split": "train[:50%]"}).dataset) == 6


@pytest.mark.parametrize("content", [["some text"], [{"kind": "other"}, 3]])
def test_a_message_that_is_none_is_a_fault_of_its_row(content):
    lines = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Hi."}]}]
    rows = load(Dataset.from_list(lines, features=Features({"messages": Json()})))
    with pytest.raises(DatasetError, match=r"row 0, field `messages\[0\]"):
        check_dataset(rows.dataset, name=NAME, faults=sft_faults, origin=rows.origin)


def test_a_path_is_a_file(files):
    assert len(load(Path(files[0])).dataset) == 8


def test_more_rows_than_there_are_are_all(files):
    assert len(load({"path": files[1], "rows": 9}).dataset) == 4


def test_unreadable_rows_are_dropped_like_others():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    rows = load(Dataset.from_list([{"conversations": turns}, {"conversations": [turns[0], None]}]))
    left, origin = check_dataset(rows.dataset, name=NAME, faults=sft_faults, origin=rows.origin, on_bad_rows="drop")
    assert (len(left), list(origin.number)) == (1, [0])


def test_rows_to_evaluate_on_are_given_once(files):
    with pytest.raises(DatasetError, match=r"`datasets\.sft` has `eval_split`, and there is `eval_datasets\.sft` too"):
        load_splits(
            {"path": files[0], "eval_split": 0.5}, files[1], names=(NAME, "`eval_datasets.sft`"), check=sft_faults
        )


def test_the_names_of_files_are_known_without_their_folders(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x", "completion": "y"}\n')
    source = [str(tmp_path / "a.jsonl"), {"path": [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]}]
    rows, _ = load_rows(source, name="rows", check=sft_faults)
    assert rows.origin.sources == ["a.jsonl", "b.jsonl, a.jsonl"]
    in_memory, _ = load_rows(rows.dataset, name="rows", check=sft_faults)
    assert in_memory.origin.sources == []
