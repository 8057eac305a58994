"""Counts and comparisons of texts, and the means of their values with intervals."""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

#: Length of the phrases whose repetition counts.
_PHRASE = 4
_RESAMPLES = 1000


def distinct(texts: Sequence[str], length: int) -> float:
    r"""Share of phrases of `length` words that are different: $|\{p\}| / n$ over all texts together.

    distinct-n of Li et al. (arXiv:1510.03055), with words separated by white space. It falls with the number of texts,
    so only sets of one size compare. 0 if no text has a phrase.
    """
    phrases = [phrase for text in texts for phrase in _phrases(text, length)]
    return len(set(phrases)) / len(phrases) if phrases else 0.0


def repetition(text: str) -> float:
    r"""Share of a text's phrases of four words that stand in it before: $1 - |\{p\}| / n$; 0 if it is shorter."""
    phrases = _phrases(text, _PHRASE)
    return 1.0 - len(set(phrases)) / len(phrases) if phrases else 0.0


def _phrases(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text: F1 with Porter's stemmer, by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - an optional extra, which `Suite` asks for
    from rouge_score.tokenizers import DefaultTokenizer  # noqa: PLC0415 - an optional extra

    kinds = ["rouge1", "rouge2", "rougeL"]
    # Without a tokenizer it logs that it takes this one, by a package that gives the root logger a handler.
    scorer: Any = RougeScorer(kinds, tokenizer=DefaultTokenizer(use_stemmer=True))
    found = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: [scores[kind].fmeasure for scores in found] for kind in kinds}


def interval(
    values: Sequence[float], groups: Sequence[Any], seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    r"""95 % bootstrap interval of $\sum v / \sum w$, by percentiles of 1,000 draws.

    Args:
        values: The values v.
        groups: What each belongs to, such as its prompt: groups are drawn whole, as their values are not independent.
        seed: Seed of the draws.
        weights: w; by default 1 each, which makes it the mean.

    Returns:
        Lower and upper end.
    """
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(places, values), np.bincount(places, weights)
    generator, means = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        drawn = generator.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def estimate(
    name: str, values: Sequence[float], groups: Sequence[Any], seed: int, weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Scores of a mean, as `interval` takes it: itself by its name, and the ends as `<name>_low` and `<name>_high`."""
    low, high = interval(values, groups, seed, weights)
    mean = math.fsum(values) / (len(values) if weights is None else sum(weights))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def of_completions(
    rows: Sequence[Mapping[str, Any]], references: Sequence[str | None], seed: int
) -> dict[str, dict[str, float]]:
    """Measure completions of one temperature.

    Args:
        rows: Rows of a file of completions.
        references: The reference of each prompt, by its number; None where there is none.
        seed: Seed of the intervals.

    Returns:
        Scores by metric: `completions` (mean `tokens`, share that `ended`, mean `repetition`, `distinct_2`), and
        `rouge` of those whose references have letters from a to z or digits, with the ends of the interval of
        `rougeL`.
    """
    texts = [str(row["text"]) for row in rows]
    scores = {
        "completions": {
            "ended": fmean(bool(row["ended"]) for row in rows),
            "tokens": fmean(row["tokens"] for row in rows),
            "repetition": fmean(map(repetition, texts)),
            "distinct_2": distinct(texts, 2),
        }
    }
    # rouge-score knows the letters a to z and digits alone.
    judged = [row for row in rows if re.search("[a-z0-9]", str(references[row["prompt"]] or "").lower())]
    if judged:
        found = rouge([row["text"] for row in judged], [str(references[row["prompt"]]) for row in judged])
        groups = [row["prompt"] for row in judged]
        scores["rouge"] = {kind: fmean(values) for kind, values in found.items()}
        scores["rouge"] |= estimate("rougeL", found["rougeL"], groups, seed)
    return scores
