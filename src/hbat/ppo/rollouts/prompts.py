"""Prompts: tokenized, checked against the model's context, padded."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOKENS = "hbat_prompt_ids"  # the column that tokenizing adds


def tokenize_prompts(dataset: Dataset, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> Dataset:
    """Add a column of token ids, by the chat template for messages; a row's `chat_template_kwargs` come on top."""
    if len(dataset) and not isinstance(dataset[0]["prompt"], str) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template. Set its `chat_template`, or use "
            "text prompts."
        )
    shared = dict(template_kwargs or {})

    def tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        return {TOKENS: prompt_tokens(row["prompt"], tokenizer, shared | (row.get("chat_template_kwargs") or {}))}

    return dataset.map(tokens, desc="Tokenizing prompts")


def prompt_tokens(prompt: Any, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Token ids of one prompt, a text or a list of messages."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        # Some tokenizers append EOS, which would end the prompt before its completion begins.
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]
        return ids
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **template_kwargs)
    of_conversation: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return of_conversation


def check_lengths(prompts: Dataset, *, name: str, completion_length: int, context: int | None) -> None:
    """Refuse prompts without tokens or without room for a completion (ValueError, which counts them)."""
    lengths = [len(tokens) for tokens in prompts.with_format(None)[TOKENS]]
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(
            f"{name}, row {empty[0]}: the prompt has no tokens ({len(empty)} such rows). Remove these rows."
        )
    if context is None:
        return
    room = context - completion_length
    if room < 1:
        raise ValueError(
            f"`max_completion_length` is {completion_length}, but the model's context is only {context} tokens. "
            "Lower it."
        )
    long = [row for row, length in enumerate(lengths) if length > room]
    if long:
        raise ValueError(
            f"{name}, row {long[0]}: the prompt has {lengths[long[0]]} tokens, but with `max_completion_length` "
            f"{completion_length} the model's context of {context} leaves room for {room} ({len(long)} such rows, the "
            f"longest has {max(lengths)}). Shorten or remove them, or lower `max_completion_length`."
        )


def context_length(config: Any) -> int | None:
    """The model's context length in tokens, or None if its configuration names no limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, key, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def padded(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device | str, *, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of sequences padded on a side, int64, shape `[rows, longest]`."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def completion_texts(
    tokenizer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[str]:
    """Decode completions as they follow their prompts, all as token ids.

    A SentencePiece-like tokenizer drops the space at the beginning of a text, which a completion alone is not.
    """
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    before, joined, alone = (
        tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (list(prompts), whole, list(completions))
    )
    return [
        text[len(start) :] if text.startswith(start) else own
        for start, text, own in zip(before, joined, alone, strict=True)
    ]


def as_completions(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Completions as reward functions get them: texts, or for conversational prompts a list with one message each."""
    if isinstance(rows[0]["prompt"], str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def reward_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns that reward functions get by name."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in {"prompt", TOKENS}}
