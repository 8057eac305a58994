"""Tiny models, a tokenizer and rows, made in memory from seeds. Nothing is downloaded."""

import functools
import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

SPECIAL_TOKENS = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Renamed in transformers 5.23, where the old name warns.
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)

#: Arguments of any TrainingArguments subclass that make a run cheap, silent and without files.
CHEAP_ARGS = {
    "bf16": False,
    "disable_tqdm": True,
    _CHECKPOINTING: False,
    "learning_rate": 0.1,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "optim": "sgd",
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 0,
    "use_cpu": True,
}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def tiny_tokenizer():
    """One token per byte, a pad and an end token, and a chat template whose prompts are prefixes of the whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def spaced_tokenizer():
    """As SentencePiece's: one token per word with the space before it, which is dropped at the beginning of a text."""
    words = [*SPECIAL_TOKENS, *(f"\u2581w{number}" for number in range(256))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        additional_special_tokens=SPECIAL_TOKENS[2:],
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


#: As Gemma's and Mistral's: no system turn, and user and assistant take turns.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)


def strict_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    return tokenizer


VOCABULARY_SIZE = len(SPECIAL_TOKENS) + 256


# --- models ----------------------------------------------------------------------------------------------------------


def tiny_llama(seed=0, *, tied=False, dtype=torch.float32, dropout=0.0, hidden=32, vocabulary=VOCABULARY_SIZE):
    """A Llama with two layers and random weights; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # so that a tiny model has gradients that are felt
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def lora_llama(seed=0, *, nonzero_b=True, dropout=0.0, rank=4, **kwargs):
    """The same with a LoRA adapter; `nonzero_b` sets B to random numbers, so that gradients flow to A."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        adapter = LoraConfig(
            r=rank, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(tiny_llama(seed, **kwargs), adapter)
        if nonzero_b:
            with torch.no_grad():
                for name, each in model.named_parameters():
                    if "lora_B" in name:
                        each.normal_(std=0.1)
    return model


def random_adapter(config, seed=0):
    """The same with an adapter of any kind, moved by random numbers."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = get_peft_model(tiny_llama(seed), config)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def embedding_lora(seed=0):
    """The same with LoRA on its embeddings: names as `lora_embedding_A.default`, which TRL does not copy."""
    from peft import LoraConfig

    return random_adapter(LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"), seed)


def frozen_llama(seed=0, **kwargs):
    """The same with its embeddings and first layer frozen."""
    model = tiny_llama(seed, **kwargs)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def bf16_llama(seed=0, **kwargs):
    return tiny_llama(seed, dtype=torch.bfloat16, **kwargs)


#: Every way to train a model, by name; each takes a seed.
MODEL_CASES = {
    "full": tiny_llama,
    "tied": functools.partial(tiny_llama, tied=True),
    "frozen": frozen_llama,
    "lora": lora_llama,
}


def twin(model, build, seed=0):
    """A second model with the same weights. Never `copy.deepcopy` a model that a trainer has touched."""
    other = build(seed)
    other.load_state_dict(model.state_dict())
    return other


def trainable(model):
    """Trainable parameters by name, as the model gives them."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def weights(model):
    """Copies of the trainable weights by name."""
    return {name: each.detach().clone() for name, each in trainable(model).items()}


def largest_difference(first, second):
    """Largest absolute difference between two mappings of tensors with the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name].detach().double() - second[name].detach().double()).abs().max()) for name in first)


def random_like(tensors, seed, *, std=None):
    """Uniform random numbers in [0, 1), or normal ones, in the shapes of `tensors`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(each.shape, generator=generator)
        if std is None
        else torch.randn(each.shape, generator=generator) * std
        for name, each in tensors.items()
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def _sums(n, seed):
    chance = random.Random(seed)
    return [(chance.randint(0, 9), chance.randint(0, 9)) for _ in range(n)]


def _turn(role, content):
    return [{"role": role, "content": content}]


def sft_rows(n, seed=0, *, conversational=False):
    """Rows of `prompt` and `completion`, as text or as conversations."""
    rows = [{"prompt": f"{a} plus {b}?", "completion": f" {a + b}"} for a, b in _sums(n, seed)]
    if conversational:
        rows = [
            {
                "prompt": _turn("user", each["prompt"]),
                "completion": _turn("assistant", each["completion"].strip()),
            }
            for each in rows
        ]
    return Dataset.from_list(rows)


def preference_rows(n, seed=0, *, conversational=False):
    """Rows of `prompt`, `chosen` and `rejected`, as text or as conversations; the two answers always differ."""
    rows = [
        {"prompt": f"{a} plus {b}?", "chosen": f" it is {a + b}", "rejected": f" {a + b + 1}"}
        for a, b in _sums(n, seed)
    ]
    if conversational:
        rows = [
            {
                "prompt": _turn("user", each["prompt"]),
                "chosen": _turn("assistant", each["chosen"].strip()),
                "rejected": _turn("assistant", each["rejected"].strip()),
            }
            for each in rows
        ]
    return Dataset.from_list(rows)
