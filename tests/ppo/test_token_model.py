"""Hidden states and head apart give what the model itself gives, whatever the model."""

import functools

import cases
import oracle
import pytest
import torch
import transformers
from torch import nn

from hbat.ppo.networks import token_model as log_probs_file
from hbat.ppo.networks.token_model import TokenModel

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}

FAMILIES = {
    "llama": ("Llama", SIZES),
    "llama-tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2 | ENDS),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 16}),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.25}),
    "granite": ("Granite", SIZES | {"logits_scaling": 4.0}),
    "bloom": ("Bloom", BLOOM | ENDS),
    "gpt-neox": ("GPTNeoX", {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8}),
}


def family(name, seed=0):
    prefix, options = FAMILIES[name]
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{prefix}Config")(**options)).eval()


class BiasedLlama(transformers.LlamaForCausalLM):
    """A model that does something to its logits that no configuration tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-2.0, 2.0, output.logits.shape[-1])
        return output


def biased(seed=0):
    torch.manual_seed(seed)
    return BiasedLlama(transformers.LlamaConfig(**SIZES)).eval()


def adapted(targets, seed=0, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(family("llama"), config)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_(std=0.2)
    return model.eval()


MODELS = {name: functools.partial(family, name) for name in FAMILIES} | {
    "lora": functools.partial(adapted, ["q_proj", "v_proj"]),
    "lora-head": functools.partial(adapted, ["q_proj", "lm_head"]),
    "lora-saved-head": functools.partial(adapted, ["q_proj"], modules_to_save=["lm_head"]),
    "biased": biased,
}
every_model = pytest.mark.parametrize("name", MODELS)

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25], [26]]


def batch(prompts=PROMPTS, completions=COMPLETIONS):
    """Prompts padded on the left, completions on the right, and the length of the completions."""
    before, after = max(map(len, prompts)), max(map(len, completions))
    ids, mask = torch.zeros(2, len(prompts), before + after, dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = slice(before - len(prompt), before + len(completion))
        ids[row, place], mask[row, place] = torch.tensor([*prompt, *completion]), 1
    return ids, mask, after


def alone(model, prompt, completion):
    """Logits before each token of a completion, of one sequence without padding."""
    return model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]


def verified(model):
    tokens = TokenModel(model)
    tokens.verify()
    return tokens


# --- values ----------------------------------------------------------------------------------------------------------


@every_model
def test_statistics_of_padded_rows_are_those_of_each_sequence_alone(name):
    model, temperature = MODELS[name](), 0.7
    with torch.no_grad():
        log_probs, entropies, _ = verified(model).statistics(*batch(), temperature=temperature)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            logits = alone(model, prompt, completion).tolist()
            expected = [oracle.log_prob(*each, temperature) for each in zip(logits, completion, strict=True)]
            assert log_probs[row, : len(completion)].tolist() == pytest.approx(expected, abs=2e-5)
            expected = [oracle.entropy(each, temperature) for each in logits]
            assert entropies[row, : len(completion)].tolist() == pytest.approx(expected, abs=2e-5)


@every_model
def test_statistics_without_padding_are_log_softmax_of_the_models_logits(name):
    model = MODELS[name]()
    ids = torch.randint(2, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, _, hidden = verified(model).statistics(ids, torch.ones_like(ids), 4, temperature=1.0)
        output = model(input_ids=ids, output_hidden_states=True)
    expected = output.logits[:, -5:-1].log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, output.hidden_states[-1][:, -5:-1], rtol=1e-5, atol=1e-5)


@every_model
def test_gradients_are_those_through_the_models_own_logits(name):
    model = MODELS[name]()
    parameters = {key: each for key, each in model.named_parameters() if each.requires_grad}
    log_probs, entropies, hidden = verified(model).statistics(*batch(), temperature=0.8)
    inside = batch()[1][:, -4:].bool()
    first = (log_probs + entropies)[inside].sum()
    found = torch.autograd.grad(first, parameters.values(), allow_unused=True)
    second = 0.0
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        shares = (alone(model, prompt, completion) / 0.8).log_softmax(-1)
        second = second + shares[range(len(completion)), completion].sum() - (shares.exp() * shares).sum()
    expected = torch.autograd.grad(second, parameters.values(), allow_unused=True)
    assert float(first.detach()) == pytest.approx(float(second.detach()), rel=1e-4)
    for key, each, other in zip(parameters, found, expected, strict=True):
        assert (each is None) == (other is None), key
        if each is not None:
            torch.testing.assert_close(each, other, rtol=1e-3, atol=1e-4, msg=key)
    assert hidden.requires_grad


@every_model
def test_in_parts_the_statistics_are_the_same(name, monkeypatch):
    model = MODELS[name]()
    tokens = verified(model)
    with torch.no_grad():
        whole = tokens.statistics(*batch(), temperature=1.0)
        defaults = {**log_probs_file.token_statistics.__kwdefaults__, "max_logits": 3 * 61}
        monkeypatch.setattr(log_probs_file.token_statistics, "__kwdefaults__", defaults)
        parts = tokens.statistics(*batch(), temperature=1.0)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_before_each_completion_token():
    model = family("llama")
    ids, mask, length = batch()
    with torch.no_grad():
        found = TokenModel(model).hidden_states(ids, mask, length)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            whole = model.model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            expected = whole[len(prompt) - 1 : -1]
            torch.testing.assert_close(found[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)


def test_another_trunk_reads_the_same_tokens():
    tokens, other = TokenModel(family("llama")), family("llama", seed=1)
    found = tokens.hidden_states(*batch(), trunk=other.model)
    expected = TokenModel(other).hidden_states(*batch())
    assert torch.equal(found, expected)
    assert not torch.allclose(found, tokens.hidden_states(*batch()))


@every_model
def test_on_padding_all_is_zero(name):
    ids, mask, length = batch()
    log_probs, entropies, _ = verified(MODELS[name]()).statistics(ids, mask, length, temperature=1.0)
    inside = mask[:, -length:].bool()
    for each in (log_probs, entropies):
        assert torch.equal(each != 0, inside)


def test_the_head_is_called_on_no_padding():
    model, rows = family("llama"), []
    tokens = verified(model)
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    tokens.statistics(*batch(), temperature=1.0)
    assert sum(rows) == sum(map(len, COMPLETIONS))


def test_entropies_can_be_left_out():
    log_probs, entropies, _ = TokenModel(family("llama")).statistics(*batch(), temperature=1.0, with_entropy=False)
    assert entropies.abs().max() == 0
    assert torch.equal(log_probs, TokenModel(family("llama")).statistics(*batch(), temperature=1.0)[0])


# --- when hidden states and head are called apart --------------------------------------------------------------------


def calls(model):
    """Counts the calls of the model as a whole."""
    found = []
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    causal.register_forward_hook(lambda *args: found.append(1))
    return found


@every_model
def test_only_models_that_do_more_to_their_logits_are_called_as_a_whole(name):
    model = MODELS[name]()
    tokens = verified(model)
    whole = calls(model)
    tokens.statistics(*batch(), temperature=1.0)
    assert bool(whole) == (name == "biased")


def test_before_it_is_verified_a_model_that_does_more_to_its_logits_is_taken_at_its_word():
    """What `verify` is for: without it the numbers of this model are wrong."""
    model = biased()
    right = verified(model).statistics(*batch(), temperature=1.0)[0]
    assert not torch.allclose(TokenModel(model).statistics(*batch(), temperature=1.0)[0], right, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_verifying_leaves_the_model_as_it_was(training):
    model = cases.tiny_llama(dropout=0.5).train(training)
    before, state = cases.weights(model), torch.get_rng_state()
    tokens = verified(model)
    assert {each.training for each in model.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), state)
    assert cases.largest_difference(cases.weights(model), before) == 0
    assert all(each.grad is None for each in model.parameters())
    whole = calls(model)
    tokens.statistics(*batch(), temperature=1.0)
    assert not whole  # dropout has not made the two look different


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_look_like_a_difference(dtype):
    model = family("gemma2").to(dtype)
    tokens, whole = verified(model), calls(model)
    log_probs, entropies, _ = tokens.statistics(*batch(), temperature=1.0)
    assert not whole
    assert log_probs.dtype == entropies.dtype == torch.float32


def test_the_adapter_that_is_active_counts():
    model = adapted(["q_proj", "lm_head"])
    tokens = verified(model)
    with torch.no_grad():
        with_adapter = tokens.statistics(*batch(), temperature=1.0)[0]
        with model.disable_adapter():
            without = tokens.statistics(*batch(), temperature=1.0)[0]
    plain = verified(family("llama"))
    with torch.no_grad():
        expected = plain.statistics(*batch(), temperature=1.0)[0]
    torch.testing.assert_close(without, expected)
    assert not torch.allclose(with_adapter, without, atol=1e-2)


def test_weights_stay_the_models_own():
    model = family("llama")
    tokens = TokenModel(model)
    with torch.no_grad():
        before = tokens.statistics(*batch(), temperature=1.0)[0]
        model.lm_head.weight.mul_(2.0)
        after = tokens.statistics(*batch(), temperature=1.0)[0]
    assert not torch.allclose(before, after)
    assert tokens.width == 32
    assert tokens.vocabulary == 61


# --- models that are no policy ---------------------------------------------------------------------------------------


def classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES))


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [classifier, encoder_decoder, lambda: nn.Linear(2, 2)])
def test_a_model_without_a_head_over_tokens_is_refused_by_name(build):
    model = build()
    with pytest.raises(ValueError, match=f"is a {type(model).__name__}; PPO needs a causal language model"):
        TokenModel(model)
