"""The evidence's models: two sizes of a transformer, pretrained once for each seed, and their scores."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from task import WORDS, documents, score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, PreTrainedTokenizerFast

from hbat import HBATConfig, HBATTrainer
from hbat.cli.demo.scoring import LONGEST_ANSWER
from hbat.cli.demo.task import Row
from hbat.ppo.rollouts.prompts import completion_texts

TEMPERATURES = (0.0, 0.75, 1.0)  # 0 is greedy, 0.75 that of the paper
Scores = dict[str, dict[str, dict[str, float]]]  # by temperature, task and metric

SHARE_INSTRUCTIONS = 0.003  # of what a base model reads: it knows the tasks, and half understands instructions

#: Fields of every objective's section.
SECTION: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 10_000,
    "per_device_train_batch_size": 16,
    "save_strategy": "no",
    "use_cpu": True,
    "weight_decay": 0.0,
}


@dataclass(frozen=True)
class Base:
    """A base model and its pretraining."""

    width: int
    layers: int
    learning_rate: float = 4e-3
    documents: int = 32_768
    epochs: int = 4


BASES = {
    "small": Base(64, 3),
    "large": Base(128, 4, learning_rate=2e-3),
    "smoke": Base(32, 1, documents=512, epochs=1),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "<eos>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))  # noqa: S106 - no password; PPO tries rewards on any text
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", model_max_length=32)  # noqa: S106


def tokenized(rows: Sequence[Row], tokenizer: Any) -> Dataset:
    """Tokenize demonstrations for SFT all at once, which is faster than row by row in every stage."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["completion"] + tokenizer.eos_token for row in rows])["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))
    return Dataset.from_dict({
        "input_ids": [prompt + answer for prompt, answer in pairs],
        "labels": [[-100] * len(prompt) + answer for prompt, answer in pairs],
    })


def load_base(name: str, seed: int, folder: Path) -> GPT2LMHeadModel:
    """Load a seed's base model, and pretrain it first where the folder does not have it yet."""
    path = folder / f"base-{name}-{seed}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _pretrain(BASES[name], seed, work).save_pretrained(Path(work) / "model")
            (Path(work) / "model").rename(path)
    return GPT2LMHeadModel.from_pretrained(path)


def _pretrain(base: Base, seed: int, work: str) -> Any:
    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=base.width, n_layer=base.layers, n_head=4,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    section = SECTION | {
        "adam_beta2": 0.98, "learning_rate": base.learning_rate, "lr_scheduler_type": "cosine",
        "num_train_epochs": base.epochs, "per_device_train_batch_size": 64, "warmup_steps": 100,
    }  # fmt: skip
    run = HBATConfig(
        output_dir=f"{work}/run", objectives=["sft"], num_rounds=1, sft=section, ewc=None, disable_tqdm=True
    )
    rows = tokenized(documents(seed, base.documents, SHARE_INSTRUCTIONS), tokenizer)
    trainer = HBATTrainer(GPT2LMHeadModel(config), run, {"sft": rows}, processing_class=tokenizer)
    trainer.train()
    return trainer.model


class _RowTemperatures(LogitsProcessor):
    def __init__(self, temperatures: torch.Tensor) -> None:
        self._temperatures = temperatures

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / self._temperatures


def evaluate(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, temperatures: Sequence[float] = TEMPERATURES
) -> Scores:
    """Answer every prompt once at every temperature, all in one batch, and score the answers."""
    was_training = model.training
    model.eval()
    rows = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    heat = torch.tensor(temperatures).clamp(min=1e-4).repeat_interleave(len(prompts))[:, None]
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = model.generate(
            input_ids=rows["input_ids"].repeat(len(temperatures), 1),
            attention_mask=rows["attention_mask"].repeat(len(temperatures), 1),
            do_sample=True, top_k=0, logits_processor=[_RowTemperatures(heat)],
            max_new_tokens=LONGEST_ANSWER, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    model.train(was_training)
    tokens = rows["input_ids"].tolist() * len(temperatures)
    answers = completion_texts(tokenizer, tokens, texts[:, len(tokens[0]) :].tolist())
    return {
        f"T{temperature:g}": score(prompts, answers[index * len(prompts) : (index + 1) * len(prompts)])
        for index, temperature in enumerate(temperatures)
    }
