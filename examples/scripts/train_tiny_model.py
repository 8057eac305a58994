r"""Train a small English language model on the CPU, to try `hbat` without a download or a GPU.

A byte-pair tokenizer with a chat template and a Llama of about 3.7 million parameters, both trained on a plain text
file with one paragraph per line. `--chats` adds the rows of SFT files (`prompt` and `completion`, as messages) as
conversations, so that the model learns the template. From the repository root:

    python examples/scripts/train_tiny_model.py --text ../shared/data/text/train.txt.gz \
        --chats ../shared/data/sft/gsm8k_train.jsonl.gz ../shared/data/sft/flan_cot_train.jsonl.gz
    hbat train --config examples/configs/real_cpu.yaml

The same arguments give the same model on the same machine. Takes six minutes of CPU time.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 1024  # max position; training blocks are shorter


def main() -> None:
    """Train the tokenizer and the model, and save both."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    paragraphs = list(read_paragraphs(Path(options.text)))
    chats = [chat for file in options.chats for chat in read_chats(Path(file))]
    tokenizer = train_tokenizer(
        paragraphs + [message["content"] for chat in chats for message in chat], options.vocabulary
    )
    tokens = tokenize(tokenizer, paragraphs, chats, options.seed)
    model = build_model(len(tokenizer), options.hidden, options.layers)
    print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} tokens, a vocabulary of {len(tokenizer):,}",
        flush=True,
    )
    train(model, tokens, options)
    tokenizer.model_max_length = CONTEXT
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(f"Saved in {Path(options.output_dir).resolve()}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text file, one paragraph per line (.txt or .txt.gz)")
    parser.add_argument("--chats", nargs="*", default=[], help="SFT files whose conversations are added (.jsonl[.gz])")
    parser.add_argument("--output_dir", default="tiny-model", help="folder of the model (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="vocabulary size (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks per step (default: %(default)s)")
    parser.add_argument("--block", type=int, default=128, help="tokens per block (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser.parse_args()


def read_paragraphs(file: Path) -> Iterator[str]:
    """Read the non-empty lines of a plain or compressed text file."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield line.strip()


def read_chats(file: Path) -> Iterator[list[dict[str, str]]]:
    """Read the conversations of an SFT file."""
    for line in read_paragraphs(file):
        row = json.loads(line)
        yield row["prompt"] + row["completion"]


def train_tokenizer(texts: list[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        additional_special_tokens=SPECIAL_TOKENS[2:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenize(tokenizer: Any, paragraphs: list[str], chats: list[list[dict[str, str]]], seed: int) -> Tensor:
    """Concatenate the tokens of all texts in random order."""
    texts = [paragraph + tokenizer.eos_token for paragraph in paragraphs]
    texts += [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    random.Random(seed).shuffle(texts)  # noqa: S311 - not for secrets
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])


def build_model(vocabulary: int, hidden: int, layers: int) -> Any:
    """Build a Llama with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(model: Any, tokens: Tensor, options: argparse.Namespace) -> None:
    """Train on random blocks; print the mean loss every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    generator = torch.Generator().manual_seed(options.seed)
    model.train()
    total, started = 0.0, time.monotonic()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(tokens) - options.block, (options.batch_size,), generator=generator)
        batch = torch.stack([tokens[start : start + options.block] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {total / 50:.3f}  {time.monotonic() - started:4.0f} s", flush=True)
            total = 0.0


def learning_rate_factor(step: int, steps: int, warmup: int = 30) -> float:
    """Linear warmup, then cosine decay to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


if __name__ == "__main__":
    main()
