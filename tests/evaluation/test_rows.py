"""Held-out rows in the layouts that users have: prompts with references, pairs, texts."""

import gzip
import json

import pytest

from hbat.data.load import DatasetError
from hbat.evaluation.rows import Asked, asked, load_asked, load_pairs, load_texts

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", "Hello"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS[:1], "Hello"),
        ({"messages": TURNS}, TURNS[:1], "Hello"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [TURNS[1] | {"content": "No"}]}, TURNS[:1], "Hello"),
        ({"chosen": "Hi: yes", "rejected": "Hi: no"}, "Hi: ", "yes"),
        ({"prompt": "Hi"}, "Hi", None),
        ({"prompt": "Hi", "reference": "Hello"}, "Hi", "Hello"),
        ({"prompt": "Hi", "completion": "No", "label": False}, "Hi", None),
        ({"prompt": "Hi", "completion": "Yes", "label": True}, "Hi", "Yes"),
        ({"prompt": "Hi", "answer": "12"}, TURNS[:1], "12"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, TURNS[:1], "Hello"),
    ],
)
def test_a_row_in_any_layout_gives_its_prompt_and_reference(tmp_path, row, prompt, reference):
    (found,) = load_asked(written(tmp_path, row), None)
    if isinstance(prompt, list) and isinstance(found.prompt, str):  # Alpaca's rows become texts or messages
        prompt = prompt[0]["content"]
    assert (found.prompt, found.reference) == (prompt, reference)


def test_results_of_tools_are_no_part_of_a_reference(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}], "content": ""}
    turns = [TURNS[0], call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4"}]
    assert asked({"messages": turns}).reference == "It is 4"


def test_bad_rows_are_dropped_if_that_is_asked_for(tmp_path):
    rows = written(
        tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "e"}
    )
    with pytest.raises(DatasetError, match=r"`pairs`, row 1.*on_bad_rows: drop"):
        load_pairs(rows, None)
    assert [pair["prompt"] for pair in load_pairs(rows, None, "drop")] == ["a"]
    assert [pair["prompt"] for pair in load_pairs(rows, 1)] == ["a"]  # what is not taken is not looked at
    assert [ask.prompt for ask in load_asked(rows, None)] == ["a", "d"]  # two equal answers are a good prompt


def test_a_pair_keeps_what_its_template_takes(tmp_path):
    other = [TURNS[0], {"role": "assistant", "content": "No"}]
    row = {"chosen": TURNS, "rejected": other, "chat_template_kwargs": {"thinking": False}}
    (pair,) = load_pairs(written(tmp_path, row), None)
    assert (pair["prompt"], pair["chat_template_kwargs"]) == (TURNS[:1], {"thinking": False})


def test_tools_go_to_the_chat_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    (found,) = load_asked(
        written(tmp_path, {"prompt": TURNS[:1], "completion": TURNS[1:], "tools": json.dumps(tools)}), None
    )
    assert found.options == {"tools": tools}


def test_a_limit_takes_the_first_rows(tmp_path):
    rows = written(tmp_path, *({"prompt": f"{number}?"} for number in range(5)))
    assert load_asked(rows, 2) == [Asked("0?", {}), Asked("1?", {})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "only a text"}], "`prompts`, row 0, field `prompt`: it has no prompt"),
        ([{"prompt": "Hi"}, {"prompt": ""}], "`prompts`.*row 1"),
        ([{"number": 1}], "`prompts`.*prompt"),
    ],
)
def test_rows_that_ask_nothing_are_refused_by_their_number(tmp_path, rows, message):
    with pytest.raises(DatasetError, match=message):
        load_asked(written(tmp_path, *rows), None)


def test_a_missing_file_is_named(tmp_path):
    for load in (load_asked, load_pairs, load_texts):
        with pytest.raises(DatasetError, match=r"absent\.jsonl"):
            load(str(tmp_path / "absent.jsonl"), None)
    with pytest.raises(DatasetError, match=r"absent\.txt"):
        load_texts(str(tmp_path / "absent.txt"), None)


def test_pairs_get_the_prompt_that_both_sides_share(tmp_path):
    other = [TURNS[0], {"role": "assistant", "content": "No"}]
    (pair,) = load_pairs(written(tmp_path, {"chosen": TURNS, "rejected": other}), None)
    assert pair["prompt"] == TURNS[:1]
    assert (pair["chosen"], pair["rejected"]) == (TURNS[1:], other[1:])


def test_texts_are_the_lines_of_a_file_or_the_column_of_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("three\n")
    assert load_texts(tmp_path / "a.txt", None) == ["one", "two"]
    assert load_texts(str(tmp_path / "b.txt.gz"), None) == ["three"]
    assert load_texts(written(tmp_path, {"text": "four"}, {"text": " "}, {"text": "five"}), 1) == ["four"]
    with pytest.raises(DatasetError, match=r"has the columns \['prompt'\]; it needs `text`"):
        load_texts(written(tmp_path, {"prompt": "x"}), None)
    assert load_texts(written(tmp_path, {"text": "six"}, {"text": None}), None) == ["six"]
    (tmp_path / "d.txt.gz").write_bytes((tmp_path / "b.txt.gz").read_bytes()[:-6])
    with pytest.raises(DatasetError, match=r"d\.txt\.gz"):
        load_texts(tmp_path / "d.txt.gz", None)
    (tmp_path / "c.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="no texts"):
        load_texts(tmp_path / "c.txt", None)
