"""Tiny reward models, and a tokenizer that shares nothing with that of `cases.py`."""

import torch
from cases import VOCABULARY_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

FOREIGN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['role'] + ' ' + message['content'] }}{% endfor %}"
    "{{ eos_token }}"
)
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<end>", "pad_token": "<blank>"}
_WORDS = [*_SPECIAL.values(), "user", "assistant", "plus", "it", "is", "or", "so", "?"]


def foreign_tokenizer():
    """One token per word; begins every text with a token of its own."""
    words = [*_WORDS, *(str(number) for number in range(10))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, _SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)
    tokenizer.chat_template = FOREIGN_TEMPLATE
    return tokenizer


def tiny_scorer(seed=0, *, vocabulary=VOCABULARY_SIZE, labels=1, dtype=torch.float32, dropout=0.0):
    """A Llama with one output and scores of visible size."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=None,
        attention_dropout=dropout,
        initializer_range=0.1,
        num_labels=labels,
    )
    return _seeded(LlamaForSequenceClassification, config, seed).to(dtype)


def tiny_encoder(seed=0, *, vocabulary=VOCABULARY_SIZE):
    """A BERT with one output, which it reads off the first token."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        num_labels=1,
    )
    return _seeded(BertForSequenceClassification, config, seed)


def _seeded(model_class, config, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
