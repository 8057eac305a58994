"""Scores of a model on the demo's test prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hbat.cli.demo.task import LONGEST_LIST, Row, is_right, parse_answer, utility
from hbat.ppo.rollouts.prompts import completion_texts

TEMPERATURE = 0.75  # the paper's
LONGEST_ANSWER = LONGEST_LIST + 5  # opening, body, two fillers, closing, end of text


@dataclass(frozen=True)
class Scores:
    """Means over the test prompts."""

    accuracy: float  # share of answers with exactly the right body
    style: float  # share of answers with an opening, a closing and no filler
    joint: float  # share of answers with both
    utility: float  # the judge's utility


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 512,
    *,
    sample: bool = False,
) -> list[str]:
    """Answer each prompt greedily, or `sample` at the paper's temperature; the model's training mode is restored."""
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(start)
            # The class has no type for what its generation mixin adds.
            texts: torch.Tensor = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=sample,
                **({"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0} if sample else {}),
                max_new_tokens=LONGEST_ANSWER,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
        tokens = batch["input_ids"].tolist()
        answers += completion_texts(tokenizer, tokens, texts[:, len(tokens[0]) :].tolist())
    model.train(was_training)
    return answers


def score_answers(rows: Sequence[Row], answers: Sequence[str]) -> Scores:
    """Score one answer per row."""
    pairs = [(row["prompt"], answer) for row, answer in zip(rows, answers, strict=True)]
    right = [is_right(prompt, answer) for prompt, answer in pairs]
    liked = [parse_answer(answer).preferred_style for _, answer in pairs]
    return Scores(
        accuracy=fmean(right),
        style=fmean(liked),
        joint=fmean(map(all, zip(right, liked, strict=True))),
        utility=fmean(utility(prompt, answer) for prompt, answer in pairs),
    )


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, sample: bool = False
) -> Scores:
    """Score the answers of a model, greedy or sampled ones."""
    return score_answers(rows, generate_answers(model, tokenizer, [row["prompt"] for row in rows], sample=sample))
