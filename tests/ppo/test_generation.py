"""Sampling completions: where they end, what padding must not change, and what is left behind."""

import cases
import pytest
import torch
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

from hbat.ppo.rollouts.generation import CompletionSampler

LENGTH = 12
PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96], [100, 101]]
#: No end token at all; the completions of the tiny model would never end.
ENDLESS = {"eos_token_id": []}
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}


@pytest.fixture
def tokenizer():
    return cases.tiny_tokenizer()


@pytest.fixture
def policy():
    return cases.tiny_llama()


def sampler(policy, tokenizer, *, max_new_tokens=LENGTH, batch_size=None, **options):
    return CompletionSampler(
        policy, tokenizer, max_new_tokens=max_new_tokens, sampling=SAMPLING | options, batch_size=batch_size
    )


def greedy_by_hand(policy, prompt, length=LENGTH):
    """The likeliest tokens one by one, each from a whole forward pass over one sequence."""
    ids = list(prompt)
    policy.eval()
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def cut(tokens, ends):
    """Up to and with the first end token."""
    at = next((index for index, each in enumerate(tokens) if each in ends), None)
    return (tokens, False) if at is None else (tokens[: at + 1], True)


def early_ends(policy):
    """A token that some of the greedy completions hold before their last place, and all completions."""
    completions = [greedy_by_hand(policy, each) for each in PROMPTS]
    counts = {each: sum(each in row[1:-1] for row in completions) for row in completions for each in row}
    end = next(each for each, count in counts.items() if 0 < count < len(PROMPTS))
    return end, completions


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama, cases.bf16_llama])
def test_prompts_of_all_lengths_at_once_are_completed_as_each_alone(build, tokenizer):
    policy = build()
    found = sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None)
    alone = [sampler(policy, tokenizer, **ENDLESS).sample([each], seed=None).tokens[0] for each in PROMPTS]
    assert found.tokens == alone
    assert found.ended == [False] * len(PROMPTS)
    assert len(set(map(tuple, alone))) == len(PROMPTS)


def test_greedy_completions_are_the_likeliest_tokens_one_by_one(policy, tokenizer):
    found = sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None)
    assert found.tokens == [greedy_by_hand(policy, each) for each in PROMPTS]


def test_completions_are_the_same_with_activation_checkpointing_in_training_mode(policy, tokenizer):
    expected = sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None)
    policy.train()
    policy.gradient_checkpointing_enable()
    assert sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_in_batches_greedy_completions_are_the_same(policy, tokenizer, batch_size):
    end, _ = early_ends(policy)
    whole = sampler(policy, tokenizer, eos_token_id=end).sample(PROMPTS, seed=None)
    assert sampler(policy, tokenizer, eos_token_id=end, batch_size=batch_size).sample(PROMPTS, seed=None) == whole


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_completion_has_its_end_token_and_nothing_after_it(policy, tokenizer):
    end, completions = early_ends(policy)
    found = sampler(policy, tokenizer, eos_token_id=end).sample(PROMPTS, seed=None)
    expected = [cut(each, [end]) for each in completions]
    assert list(zip(found.tokens, found.ended, strict=True)) == expected
    assert {True, False} == set(found.ended)


def test_an_end_token_may_be_the_padding_token(policy, tokenizer):
    end, completions = early_ends(policy)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    assert tokenizer.pad_token_id == end
    prompts = [[end, *each] for each in PROMPTS]  # in prompts it is a token as any other
    expected = [cut(greedy_by_hand(policy, each), [end]) for each in prompts]
    found = sampler(policy, tokenizer, eos_token_id=end).sample(prompts, seed=None)
    assert list(zip(found.tokens, found.ended, strict=True)) == expected
    found = sampler(policy, tokenizer, eos_token_id=end).sample(PROMPTS, seed=None)
    assert found.tokens == [cut(each, [end])[0] for each in completions]


def test_a_padding_token_that_the_policy_samples_is_no_end(policy, tokenizer):
    end, completions = early_ends(policy)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    found = sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None)
    assert found.tokens == completions
    assert found.ended == [False] * len(PROMPTS)


def test_any_of_several_end_tokens_ends_a_completion(policy, tokenizer):
    end, completions = early_ends(policy)
    other = next(row[3] for row in completions if end not in row)
    found = sampler(policy, tokenizer, eos_token_id=[end, other]).sample(PROMPTS, seed=None)
    expected = [cut(each, [end, other]) for each in completions]
    assert list(zip(found.tokens, found.ended, strict=True)) == expected


def test_a_completion_can_be_its_end_token_alone(policy, tokenizer):
    first = greedy_by_hand(policy, PROMPTS[0])[0]
    found = sampler(policy, tokenizer, eos_token_id=first).sample(PROMPTS[:1], seed=None)
    assert (found.tokens, found.ended) == ([[first]], [True])


def test_an_end_token_at_the_last_place_counts(policy, tokenizer):
    completion = greedy_by_hand(policy, PROMPTS[0])
    at = next(index for index in range(1, LENGTH) if completion[index] not in completion[:index])
    found = sampler(policy, tokenizer, eos_token_id=completion[at], max_new_tokens=at + 1).sample(
        PROMPTS[:1], seed=None
    )
    assert (found.tokens, found.ended) == ([completion[: at + 1]], [True])


def test_end_tokens_are_those_of_model_and_tokenizer_where_none_are_given(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 9]
    assert sampler(policy, tokenizer).end_tokens == [1, 7, 9]
    policy.generation_config.eos_token_id = 1
    assert sampler(policy, tokenizer).end_tokens == [1]
    policy.generation_config.eos_token_id = None
    assert sampler(policy, tokenizer).end_tokens == [1]
    assert sampler(policy, tokenizer, eos_token_id=5).end_tokens == [5]


@pytest.mark.parametrize("end_tokens", [[], None])
def test_a_completion_ends_with_a_stop_string(tokenizer, end_tokens):
    policy = cases.tiny_llama(vocabulary=99)  # the tokenizer's bytes up to `~`
    prompts = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96], [11, 12]]
    completions = [greedy_by_hand(policy, each) for each in prompts]
    pair = next(row[at : at + 2] for row in completions for at in range(2, LENGTH - 2) if min(row[at : at + 2]) > 4)
    options = {"stop_strings": [tokenizer.decode(pair), "never"]}
    if end_tokens is not None:
        options["eos_token_id"] = end_tokens
    found = sampler(policy, tokenizer, **options).sample(prompts, seed=None)
    expected = []
    for whole in completions:
        ends = [at + 2 for at in range(LENGTH - 1) if whole[at : at + 2] == pair]
        if end_tokens is None and 1 in whole:
            ends.append(whole.index(1) + 1)
        expected.append((whole[: min(ends, default=LENGTH)], bool(ends)))
    assert list(zip(found.tokens, found.ended, strict=True)) == expected
    assert {ended for _, ended in expected} == {True, False}


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_completions_whatever_was_drawn_before(policy, tokenizer):
    first = sampler(policy, tokenizer).sample(PROMPTS, seed=3)
    torch.rand(5)
    assert sampler(policy, tokenizer).sample(PROMPTS, seed=3) == first
    assert sampler(policy, tokenizer).sample(PROMPTS, seed=4) != first


def test_batches_do_not_repeat_each_others_random_numbers(policy, tokenizer):
    found = sampler(policy, tokenizer, batch_size=1, **ENDLESS).sample([PROMPTS[0]] * 2, seed=3)
    assert found.tokens[0] != found.tokens[1]


@pytest.mark.parametrize("seed", [None, 3])
def test_the_global_random_state_stays_as_it_was(policy, tokenizer, seed):
    before = torch.get_rng_state()
    sampler(policy, tokenizer).sample(PROMPTS, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def first_tokens(policy, tokenizer, n=4000, **options):
    """Shares of the first tokens of many completions of one prompt."""
    found = sampler(policy, tokenizer, max_new_tokens=1, **ENDLESS, **options).sample([[3, 4]] * n, seed=0)
    return torch.bincount(torch.tensor(found.tokens).flatten(), minlength=16).double() / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_sampled_from_the_distribution_whose_log_probabilities_are_taken(tokenizer, temperature):
    policy = cases.tiny_llama(vocabulary=16)
    with torch.no_grad():
        expected = (policy(input_ids=torch.tensor([[3, 4]])).logits[0, -1].double() / temperature).softmax(-1)
    found = first_tokens(policy, tokenizer, temperature=temperature)
    assert (found - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations


CHATTY = {
    "temperature": 0.1, "top_p": 0.2, "top_k": 1, "min_p": 0.9, "repetition_penalty": 5.0, "typical_p": 0.1,
    "no_repeat_ngram_size": 1, "suppress_tokens": [5, 6, 7, 8, 9, 10], "max_length": 3, "num_return_sequences": 2,
}  # fmt: skip


@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama])
@pytest.mark.parametrize("seed", [None, 3])
def test_options_that_the_model_was_shipped_with_do_not_apply(build, tokenizer, seed):
    """Many chat models ship with a temperature or a repetition penalty, of which log-probabilities know nothing."""
    policy = build()
    expected = sampler(policy, tokenizer).sample(PROMPTS, seed=seed)
    causal = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    causal.generation_config = GenerationConfig(eos_token_id=1, do_sample=True, **CHATTY)
    assert sampler(policy, tokenizer).sample(PROMPTS, seed=seed) == expected


def test_options_that_are_asked_for_do_apply(policy, tokenizer):
    whole = sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=3).tokens
    likeliest = sampler(policy, tokenizer, top_k=1, **ENDLESS).sample(PROMPTS, seed=3).tokens
    assert likeliest == sampler(policy, tokenizer, **ENDLESS).sample(PROMPTS, seed=None).tokens != whole
    without = sampler(policy, tokenizer, suppress_tokens=[whole[0][0]], **ENDLESS).sample(PROMPTS, seed=3).tokens
    assert all(whole[0][0] not in each for each in without)
    longer = sampler(policy, tokenizer, eos_token_id=whole[0][0], min_new_tokens=4).sample(PROMPTS, seed=3).tokens
    assert min(map(len, longer)) >= 4


# --- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [cases.tiny_llama, cases.lora_llama])
def test_the_policy_is_left_in_its_mode_and_with_its_own_options(build, tokenizer, training):
    policy = build(dropout=0.5).train(training)
    options, same = policy.generation_config, policy.generation_config.to_dict()
    expected = sampler(policy, tokenizer).sample(PROMPTS, seed=None)
    assert sampler(policy, tokenizer).sample(PROMPTS, seed=None) == expected  # without dropout
    assert {each.training for each in policy.modules()} == {training}
    assert policy.generation_config is options
    assert options.to_dict() == same
    assert all(each.grad is None for each in policy.parameters())


def test_the_policy_is_left_as_it_was_after_an_error(policy, tokenizer):
    policy.train()
    options, before = policy.generation_config, torch.get_rng_state()
    handle = policy.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler(policy, tokenizer).sample(PROMPTS, seed=3)
    handle.remove()
    assert policy.training
    assert policy.generation_config is options
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mixture_of_experts_samples_although_its_router_reports(tokenizer):
    """Its loss cannot be computed of one token: SFT asks for it in the model's own configuration."""
    config = MixtralConfig(
        vocab_size=cases.VOCABULARY_SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    policy = MixtralForCausalLM(config)
    assert len(sampler(policy, tokenizer).sample(PROMPTS, seed=0).tokens) == len(PROMPTS)
    assert policy.config.output_router_logits is True
