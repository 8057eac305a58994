"""Rivals without stages: both objectives in one loop of steps, from the base model, in plain PyTorch.

* `joint`: every step descends on the weighted sum of both losses.
* `alright`: every step descends on one of them, which is drawn (ALRIGHT, arXiv 2410.15483).
* `maxright`: every step descends on the one whose weighted loss is further from its optimum (MAXRIGHT, same source).

DPO's reference is the base model, as in that source. One AdamW and one cosine schedule serve both.
"""

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

BETA = 0.1
BATCH = 16
WARMUP = 5
#: What each loss reaches when it is trained alone, for `maxright`: mean of the last 16 steps of 256 at 1e-3 (SFT, a
#: `share` of 1) and of 128 at 6e-4 (DPO, 0) on the small base, three seeds.
OPTIMA = {"sft": 0.52, "dpo": 0.55}
_IGNORED = -100
Answer = tuple[list[int], list[int]]  # tokens and labels


def train_mixed(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Dataset],
    kind: str,
    share: float,
    rate: float,
    steps: int,
    seed: int,
) -> None:
    """Train the model in place.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        rows: Tokenized demonstrations (`sft`) and pairs (`dpo`).
        kind: `joint`, `alright` or `maxright`.
        share: Weight of SFT; DPO has the rest. With `alright` the probability of an SFT step.
        rate: Peak learning rate.
        steps: Optimizer steps.
        seed: Orders the rows and draws the objectives.
    """
    rng = random.Random(f"mixed {seed}")
    frozen = copy.deepcopy(model).eval()
    demonstrations = [(row["input_ids"], row["labels"]) for row in rows["sft"].to_list()]
    pairs = [tuple(_encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
             for row in rows["dpo"].to_list()]  # fmt: skip
    batches = {"sft": _batches(demonstrations, rng), "dpo": _batches(pairs, rng)}
    weights = {"sft": share, "dpo": 1 - share}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))

    def loss_of(name: str) -> torch.Tensor:
        batch = next(batches[name])
        return _sft(model, batch) if name == "sft" else _dpo(model, frozen, batch)

    model.train()
    for _ in range(steps):
        if kind == "alright":
            loss = loss_of("sft" if rng.random() < share else "dpo")
        else:
            losses = {name: loss_of(name) for name in weights}
            gaps = {name: weights[name] * (float(losses[name]) - OPTIMA[name]) for name in weights}
            joint = sum((weights[name] * losses[name] for name in weights), torch.tensor(0.0))
            loss = joint if kind == "joint" else losses[max(gaps, key=gaps.__getitem__)]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _cosine(step: int, steps: int) -> float:
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _batches(rows: Sequence[Any], rng: random.Random) -> Iterator[list[Any]]:
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def _encode(tokenizer: Any, prompt: str, answer: str) -> Answer:
    first, second = tokenizer([prompt, answer + tokenizer.eos_token])["input_ids"]
    return first + second, [_IGNORED] * len(first) + second


def _log_likelihoods(model: Any, answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood of every answer, and its number of tokens."""
    longest = max(len(ids) for ids, _ in answers)
    # Padding comes last: no token sees it, and no label counts it.
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in answers])
    labels = torch.tensor([labels + [_IGNORED] * (longest - len(labels)) for _, labels in answers])[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="none")
    return -losses.sum(1), (labels != _IGNORED).sum(1)


def _sft(model: Any, batch: Sequence[Answer]) -> torch.Tensor:
    found, tokens = _log_likelihoods(model, batch)
    return -found.sum() / tokens.sum()


def _dpo(model: Any, frozen: Any, batch: Sequence[tuple[Answer, Answer]]) -> torch.Tensor:
    both = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
    own, _ = _log_likelihoods(model, both)
    with torch.no_grad():
        reference, _ = _log_likelihoods(frozen, both)
    chosen, rejected = (own - reference).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()
