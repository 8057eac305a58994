"""The demo's base model: a word-level tokenizer and a small transformer, both built in memory."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hbat.cli.demo.task import WORDS, Row, documents

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
LONGEST_TEXT = 32  # positions of the model; the longest document has 20 words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word, so the tokens of a prompt are a prefix of those of the whole text."""
    vocabulary = {word: index for index, word in enumerate((PAD, EOS, UNKNOWN, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=LONGEST_TEXT
    )


def build_model(seed: int, width: int = 64, layers: int = 2, heads: int = 4) -> GPT2LMHeadModel:
    """Build a GPT-2 with random weights in float32 and without dropout."""
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=LONGEST_TEXT,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def prepare_base(
    seed: int,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    model: GPT2LMHeadModel | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> GPT2LMHeadModel:
    """Pretrain a model on generated documents; `progress` receives the steps done and the loss after every step."""
    model = build_model(seed) if model is None else model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    pad = model.config.pad_token_id
    batches = _batches(documents(seed), batch_size)
    for step, (input_ids, labels) in enumerate(islice(batches, steps)):
        logits = model(input_ids=input_ids, attention_mask=input_ids != pad, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval()
    return model


def _batches(rows: Iterator[Row], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # Right-padded token ids and labels. Prompts are not learned: their letters are random.
    vocabulary = build_tokenizer().get_vocab()
    while True:
        pairs = [(row["prompt"].split(), row["completion"].split()) for row in islice(rows, batch_size)]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs) + 1
        input_ids = torch.full((batch_size, longest), vocabulary[PAD])
        labels = torch.full((batch_size, longest), -100)
        for index, (prompt, answer) in enumerate(pairs):
            ids = torch.tensor([vocabulary[word] for word in (*prompt, *answer, EOS)])
            input_ids[index, : len(ids)] = ids
            labels[index, len(prompt) : len(ids)] = ids[len(prompt) :]
        yield input_ids, labels
