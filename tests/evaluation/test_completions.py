"""Completions: those of transformers, in one file, the same whether it was cut off or not."""

import json

import cases
import pytest
import torch

from hbat.config.evaluation import EvalConfig
from hbat.evaluation import completions
from hbat.evaluation.completions import prompt_ids, read_rows
from hbat.evaluation.rows import Asked

ASKED = [Asked(text, {}) for text in ("2 plus 2", "the answer to 3 plus 3 is", "4", "7 plus 1 is", "5 plus")]


def complete(folder, model=None, *, asked=ASKED, **options):
    config = EvalConfig(prompts="unused", max_new_tokens=6, batch_size=2, **options)
    model, tokenizer = model or cases.tiny_llama(), cases.tiny_tokenizer()
    ids = prompt_ids(asked, model, tokenizer, name="`prompts`", new_tokens=6)
    return completions.complete(folder / "completions.jsonl", config, asked, ids, model, tokenizer)


def test_greedy_completions_are_those_of_generate_for_every_prompt_alone(tmp_path):
    model, tokenizer = cases.tiny_llama().eval(), cases.tiny_tokenizer()
    rows = complete(tmp_path, model)
    assert [row["prompt"] for row in rows] == list(range(5))
    for row, ask in zip(rows, ASKED, strict=True):
        ids = torch.tensor([tokenizer(ask.prompt)["input_ids"]])
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0]
        new = whole[ids.shape[1] :].tolist()
        assert row["tokens"] == len(new)
        assert row["text"].strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert row["ended"] == (new[-1] == tokenizer.eos_token_id)


def test_every_temperature_above_zero_has_its_samples(tmp_path):
    rows = complete(tmp_path, temperatures=[0.0, 1.0, 2.0], samples=3)
    assert [(row["temperature"], row["sample"], row["prompt"]) for row in rows] == [
        (temperature, sample, prompt)
        for temperature in (0.0, 1.0, 2.0)
        for sample in range(3 if temperature else 1)
        for prompt in range(5)
    ]
    assert len({tuple(row["text"] for row in rows[start : start + 5]) for start in range(0, 35, 5)}) == 7
    assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, read_rows(tmp_path / "completions.jsonl")))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.77, 0.99])
def test_a_file_that_was_cut_off_continues_to_the_same_rows(tmp_path, share):
    options = {"temperatures": [0.0, 1.0], "samples": 2}
    whole = complete(tmp_path, **options)
    file = tmp_path / "completions.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    torch.manual_seed(99)  # the state of the process has no part in it
    assert complete(tmp_path, **options) == whole
    assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_file_of_another_model_is_read_without_its_cut_off_line_and_left_as_it_is(tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"a": 1}\n{"b": ')
    assert read_rows(file) == [{"a": 1}]
    assert file.read_text() == '{"a": 1}\n{"b": '
    file.write_text('{"a": 1}\n[]\nx\n')
    with pytest.raises(ValueError, match=r"other\.jsonl, line 3"):
        read_rows(file)


def test_a_seed_gives_other_samples_and_a_whole_number_the_same_as_its_float(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    first, same, other = (
        complete(folder, temperatures=[temperature], seed=seed)
        for folder, temperature, seed in zip(folders, (1, 1.0, 1.0), (1, 1, 2), strict=True)
    )
    assert first == same != other


def test_more_temperatures_leave_the_completions_that_are_there(tmp_path):
    first = complete(tmp_path, temperatures=[1.0])
    model = cases.tiny_llama(7)  # another one, to see which are made anew
    both = complete(tmp_path, model, temperatures=[1.0, 0.0])
    assert both[:5] == first
    assert both[5:] != complete(tmp_path / "..", temperatures=[0.0])


def test_prompts_that_leave_no_room_are_refused_before_any_is_completed(tmp_path):
    long = Asked("2 " * 200, {})
    with pytest.raises(ValueError, match=r"`prompts`, prompt 1: \d+ tokens and 6 for the completion .* \(1 such"):
        complete(tmp_path, asked=[ASKED[0], long])
    assert not (tmp_path / "completions.jsonl").exists()


def test_a_conversation_without_a_chat_template_is_refused_by_its_number():
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    asked = [ASKED[0], Asked([{"role": "user", "content": "Hi"}], {})]
    with pytest.raises(ValueError, match=r"`prompts`, prompt 1: .*template"):
        prompt_ids(asked, cases.tiny_llama(), tokenizer, name="`prompts`", new_tokens=6)
