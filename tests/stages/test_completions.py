"""Prompts that are completed after every stage."""

import json
import types

import cases
import pytest
import runs
from datasets import Dataset
from kills import CutOffError, Kill

from hbat.evaluation.rows import asked
from hbat.reports.files import COMPLETIONS_FILE
from hbat.reports.record import read_completions
from hbat.stages.completions import chosen_prompts

ASKED = ["2 plus 2?", [{"role": "user", "content": "3 plus 3?"}]]
EVALUATION = {"sft": cases.sft_rows(4, seed=5), "dpo": cases.preference_rows(4, seed=5)}


def test_every_prompt_is_completed_at_the_start_and_after_every_stage_and_training_stays_the_same(tmp_path):
    with_texts = runs.train(cases.tiny_llama(), tmp_path / "with", sample_prompts=ASKED, num_rounds=1)
    without = runs.train(cases.tiny_llama(), tmp_path / "without", num_rounds=1)
    assert runs.same(cases.weights(with_texts.model), cases.weights(without.model))
    rows = read_completions(tmp_path / "with")
    assert [(row["stage"], row["prompt"]) for row in rows] == [
        (stage, prompt) for stage in (-1, 0, 1) for prompt in ASKED
    ]
    assert [row["objective"] for row in rows[::2]] == [None, "sft", "dpo"]
    assert len({row["completion"] for row in rows[::2]}) == 3  # as every stage changed the model
    assert all(0 < row["tokens"] <= 128 for row in rows)
    assert with_texts.matrix.has(1)


def test_a_run_that_is_resumed_ends_with_the_texts_of_one_that_was_not_cut_off(tmp_path):
    options = {"sample_prompts": 1, "evaluation": EVALUATION, "num_rounds": 1}
    runs.train(cases.tiny_llama(), tmp_path / "whole", **options)
    with pytest.raises(CutOffError):
        runs.train(cases.tiny_llama(), tmp_path / "cut", callbacks=[Kill(1, "begin")], **options)
    assert {row["stage"] for row in read_completions(tmp_path / "cut")} == {-1, 0}
    runs.train(cases.tiny_llama(), tmp_path / "cut", resume=True, **options)
    assert read_completions(tmp_path / "cut") == read_completions(tmp_path / "whole")


def test_a_run_that_starts_over_forgets_the_texts_before(tmp_path):
    runs.train(cases.tiny_llama(), tmp_path, sample_prompts=["old"], num_rounds=1)
    run = runs.build_run(cases.tiny_llama(), tmp_path, sample_prompts=["new"], overwrite_output_dir=True, num_rounds=1)
    run.train()
    assert [(row["stage"], row["prompt"]) for row in read_completions(tmp_path)] == [
        (stage, "new") for stage in (-1, 0, 1)
    ]


# --- which prompts ---------------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = [
    ({"prompt": "Hi", "completion": "Hello"}, "Hi"),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS[:1]),
    ({"messages": TURNS}, TURNS[:1]),
    ({"chosen": TURNS, "rejected": TURNS}, TURNS[:1]),
    ({"chosen": "Hi: yes", "rejected": "Hi: no"}, "Hi: "),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi"),
    ({"text": "Hi"}, None),
    ({"input_ids": [1, 2]}, None),
]


@pytest.mark.parametrize(("row", "prompt"), ROWS)
def test_the_prompt_of_a_row_is_what_comes_before_its_answer(row, prompt):
    assert asked(row).prompt == prompt


def tracks(*sets):
    return [types.SimpleNamespace(eval_dataset=None if rows is None else Dataset.from_list(rows)) for rows in sets]


def test_a_number_takes_the_first_rows_of_every_evaluation_set_each_prompt_once():
    questions = [{"prompt": text} for text in ("a", "b", "c")]
    found = chosen_prompts(2, tracks(questions, None, [{"prompt": "b"}, {"prompt": "d"}], [{"text": "none"}]))
    assert [each.prompt for each in found] == ["a", "b", "d"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a"}, {"prompt": "b"}],
        [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": "y"}],
    ],
)
def test_a_file_of_any_layout_gives_its_prompts(rows, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = chosen_prompts(str(file), [])
    asked = [each.prompt for each in found]
    assert [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in asked] == ["a", "b"]


def test_tools_and_options_of_a_row_go_to_the_chat_template():
    row = {"prompt": "a", "tools": '[{"name": "look"}]', "chat_template_kwargs": {"enable_thinking": False}}
    (asked,) = chosen_prompts(1, tracks([row]))
    assert asked.options == {"enable_thinking": False, "tools": [{"name": "look"}]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "must be a number of rows, a list of prompts or a file"),
        (True, "must be a number of rows"),
        (-1, "sample_prompts"),
        (1.5, "must be a number of rows"),
        ({}, "must be a number of rows"),
        (2, "there are no prompts"),  # and no evaluation rows
        ([""], "there are no prompts"),
        (["x" * 200], "200 tokens and 1 for the completion do not fit the model's context of 128"),
        ([[{"content": "no role"}]], "prompt 0"),
        ("absent.jsonl", "absent.jsonl"),
    ],
)
def test_prompts_that_cannot_be_completed_are_refused_at_construction(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        runs.build_run(cases.tiny_llama(), tmp_path / "run", sample_prompts=given)
    assert not (tmp_path / "run" / COMPLETIONS_FILE).exists()
