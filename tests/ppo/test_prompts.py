"""Prompts to tokens, and the ones that are refused."""

import cases
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, GPT2Config, LlamaConfig

from hbat.ppo.rollouts.prompts import (
    TOKENS,
    check_lengths,
    completion_texts,
    context_length,
    padded,
    prompt_tokens,
    tokenize_prompts,
)


@pytest.fixture(scope="module")
def tokenizer():
    return cases.tiny_tokenizer()


def closing_tokenizer():
    """One that puts an end token behind every text, as T5's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = cases.tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def opening_tokenizer():
    """One that puts a token before every text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = cases.tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 4)]
    )
    return tokenizer


def user(text):
    return [{"role": "user", "content": text}]


# --- one prompt ------------------------------------------------------------------------------------------------------


def test_a_text_is_tokenised_as_it_is(tokenizer):
    assert tokenizer.decode(prompt_tokens("2 plus 3?", tokenizer, {})) == "2 plus 3?"


def test_a_text_gets_the_tokens_that_the_tokenizer_opens_texts_with():
    ids = prompt_tokens("ab", opening_tokenizer(), {})
    assert ids[0] == 4
    assert len(ids) == 3


def test_a_text_is_not_closed_before_its_completion_begins():
    tokenizer = closing_tokenizer()
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    assert prompt_tokens("ab", tokenizer, {}) == cases.tiny_tokenizer()("ab")["input_ids"]


def test_an_end_token_that_the_text_itself_has_stays(tokenizer):
    assert prompt_tokens("ab</s>", tokenizer, {})[-1] == tokenizer.eos_token_id


def test_a_conversation_is_rendered_up_to_the_assistants_turn(tokenizer):
    ids = prompt_tokens(user("hi"), tokenizer, {})
    assert tokenizer.decode(ids) == "<|user|>hi</s><|assistant|>"


def test_a_conversation_is_not_opened_twice():
    tokenizer = opening_tokenizer()
    assert 4 not in prompt_tokens(user("hi"), tokenizer, {})


def test_arguments_reach_the_chat_template():
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if loud %}!{% endif %}"
    assert tokenizer.decode(prompt_tokens(user("hi"), tokenizer, {"loud": True})) == "hi!"
    assert tokenizer.decode(prompt_tokens(user("hi"), tokenizer, {})) == "hi"


# --- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_keeps_the_space_between_it_and_its_prompt():
    spaced = cases.spaced_tokenizer()
    prompts, completions = spaced(["w1 w2", "</s>", ""])["input_ids"], spaced(["w3 w4</s>", "w5", "w6"])["input_ids"]
    assert spaced.decode(completions[0], skip_special_tokens=True) == "w3 w4"
    assert completion_texts(spaced, prompts, completions) == [" w3 w4", "w5", "w6"]


def test_a_completion_that_changes_the_end_of_its_prompt_is_decoded_alone(tokenizer):
    first, second = tokenizer("\u00e9")["input_ids"]
    assert completion_texts(tokenizer, [[first]], [[second, *tokenizer("x")["input_ids"]]]) == ["\ufffdx"]


# --- a data set ------------------------------------------------------------------------------------------------------


def test_rows_get_their_tokens_and_keep_their_columns(tokenizer):
    rows = Dataset.from_list([{"prompt": "ab", "answer": 1}, {"prompt": "c", "answer": 2}])
    found = tokenize_prompts(rows, tokenizer)
    assert found.column_names == ["prompt", "answer", TOKENS]
    assert [tokenizer.decode(each) for each in found[TOKENS]] == ["ab", "c"]


def test_a_rows_own_template_arguments_come_on_top_of_the_shared_ones():
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ mark }}"
    options = [{"mark": "?"}, None]
    rows = Dataset.from_list([{"prompt": user("ab"[row]), "chat_template_kwargs": options[row]} for row in range(2)])
    found = tokenize_prompts(rows, tokenizer, {"mark": "!"})
    assert [tokenizer.decode(each) for each in found[TOKENS]] == ["a?", "b!"]


def test_conversations_need_a_chat_template():
    tokenizer = cases.tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_prompts(Dataset.from_list([{"prompt": user("hi")}]), tokenizer)
    assert len(tokenize_prompts(Dataset.from_list([{"prompt": "hi"}]), tokenizer)) == 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def of_lengths(*lengths):
    return Dataset.from_list([{TOKENS: [5] * each} for each in lengths])


def check(prompts, *, completion_length=4, context=10):
    check_lengths(prompts, name="train_dataset", completion_length=completion_length, context=context)


def test_prompts_that_just_leave_room_are_taken():
    check(of_lengths(1, 6))
    check(of_lengths(1, 600), context=None)


def test_a_prompt_without_tokens_is_refused_with_its_row():
    with pytest.raises(ValueError, match=r"train_dataset, row 1: the prompt has no tokens \(2 such rows\)"):
        check(of_lengths(1, 0, 0), context=None)


def test_a_prompt_that_leaves_no_room_is_refused_with_its_row_and_how_many_there_are():
    with pytest.raises(ValueError, match=r"row 1: .* has 7 tokens.*room for 6 \(2 such rows, the longest has 9"):
        check(of_lengths(6, 7, 9))


def test_completions_that_fill_the_whole_context_are_refused():
    with pytest.raises(ValueError, match="`max_completion_length` is 10, but the model's context is only 10"):
        check(of_lengths(1), completion_length=10)


def test_rows_in_any_format_are_checked():
    with pytest.raises(ValueError, match="row 0: the prompt has no tokens"):
        check(of_lengths(0, 3).with_format("torch"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=33), 33),
        (AutoConfig.for_model("bloom"), None),
    ],
    ids=["llama", "gpt2", "bloom"],
)
def test_the_context_is_read_from_the_models_configuration(config, expected):
    assert context_length(config) == expected


# --- padding ---------------------------------------------------------------------------------------------------------


def test_sequences_are_put_flush_right():
    ids, mask = padded([[1, 2, 3], [], [4]], 9, "cpu", side="left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_token_that_is_the_padding_token_counts_where_it_is_part_of_the_prompt():
    ids, mask = padded([[9, 9], [9]], 9, "cpu", side="left")
    assert ids.tolist() == [[9, 9], [9, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]
