"""Scores of a model on the demo's test prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hbat.cli.demo.task import LONGEST_LIST, Row, is_right, parse_answer, utility
from hbat.ppo.rollouts.generation import CompletionSampler
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
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
    sampler = CompletionSampler(
        model, tokenizer, max_new_tokens=LONGEST_ANSWER, sampling=sampling, batch_size=batch_size
    )
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    found = sampler.sample(tokens, seed=0 if sample else None)
    return completion_texts(tokenizer, tokens, found.tokens)


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
