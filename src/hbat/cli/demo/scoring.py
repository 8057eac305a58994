"""Scores of a model on the demo's test prompts: is the body right, does the judge like the answer, are both true."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hbat.cli.demo.task import LONGEST_LIST, Row, is_right, parse_answer, utility

#: Opening, body, two fillers, closing, end of text.
LONGEST_ANSWER = LONGEST_LIST + 5


@dataclass(frozen=True)
class Scores:
    """Means over the test prompts.

    Attributes:
        accuracy: Share of answers with exactly the right body.
        style: Share of answers with an opening, a closing and no filler.
        joint: Share of answers with both.
        utility: The judge's utility.
    """

    accuracy: float
    style: float
    joint: float
    utility: float


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 512
) -> list[str]:
    """Let a model answer greedily. Leaves the model in the mode it was in.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: The instructions.
        batch_size: Prompts generated for at once.

    Returns:
        An answer for each prompt.
    """
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            texts: torch.Tensor = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=LONGEST_ANSWER,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
        answers += tokenizer.batch_decode(texts[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return answers


def score_answers(rows: Sequence[Row], answers: Sequence[str]) -> Scores:
    """Score answers.

    Args:
        rows: Rows with `prompt`.
        answers: An answer for each row.

    Returns:
        The means over the rows.
    """
    pairs = [(row["prompt"], answer) for row, answer in zip(rows, answers, strict=True)]
    right = [is_right(prompt, answer) for prompt, answer in pairs]
    liked = [parse_answer(answer).preferred_style for _, answer in pairs]
    return Scores(
        accuracy=fmean(right),
        style=fmean(liked),
        joint=fmean(both for both in map(all, zip(right, liked, strict=True))),
        utility=fmean(utility(prompt, answer) for prompt, answer in pairs),
    )


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Scores:
    """Let a model answer the test prompts and score it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Rows with `prompt`.

    Returns:
        The scores.
    """
    return score_answers(rows, generate_answers(model, tokenizer, [row["prompt"] for row in rows]))
