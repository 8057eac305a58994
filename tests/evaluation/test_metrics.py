"""Counts in texts, by hand; ROUGE as rouge-score has it; intervals against a slow version."""

import logging
import math
import random

import pytest

from hbat.evaluation.metrics import distinct, interval, of_completions, repetition, rouge

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")


def test_distinct_phrases_are_counted_over_all_texts_together():
    assert distinct(["a b a", "a b c"], 2) == 3 / 4  # a b, b a, a b, b c
    assert distinct(["a b a", "a b c"], 1) == 3 / 6
    assert distinct(["a"], 2) == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c d a b c d", 1 / 5), ("a a a a a a", 2 / 3), ("a b c", 0.0), ("", 0.0), ("a b c d e", 0.0)],
)
def test_repetition_is_the_share_of_phrases_of_four_words_that_stood_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_rouge_is_that_of_rouge_score_and_of_a_count_by_hand():
    texts, references = ["the cat sat", "no match here", "running dogs"], ["the cat lay down", "x y", "dog runs"]
    handlers = list(logging.root.handlers)
    found = rouge(texts, references)
    assert logging.root.handlers == handlers
    by_hand = {"rouge1": 2 * 2 / 7, "rouge2": 2 * 1 / 5, "rougeL": 2 * 2 / 7}
    assert {kind: values[0] for kind, values in found.items()} == pytest.approx(by_hand)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind, values in found.items():
        own = [scorer.score(reference, text)[kind].fmeasure for text, reference in zip(texts, references, strict=True)]
        assert values == own
    assert found["rouge1"][2] == 1.0  # the stemmer's


def test_an_interval_draws_whole_groups():
    rng = random.Random(0)
    values = [rng.random() for _ in range(40)]
    low, high = interval(values, range(40))
    deviation = math.sqrt(sum((value - sum(values) / 40) ** 2 for value in values) / 40)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / math.sqrt(40), rel=0.15)
    three = [value for value in values for _ in range(3)]
    groups = [group for group in range(40) for _ in range(3)]
    assert interval(three, groups) == pytest.approx((low, high))  # copies bring no knowledge
    wide = interval(three, range(120))
    assert wide[1] - wide[0] < 0.7 * (high - low)


def test_an_interval_of_a_ratio_weighs_its_parts():
    assert interval([2.0, 30.0], [0, 1], weights=[2, 10]) == pytest.approx((1.0, 3.0))
    assert interval([5.0], [0]) == (5.0, 5.0)


def test_completions_without_a_reference_get_no_rouge():
    rows = [
        {"prompt": 0, "text": "a b", "tokens": 2, "ended": True},
        {"prompt": 1, "text": "c", "tokens": 4, "ended": False},
    ]
    scores = of_completions(rows, ["a b", None], seed=0)
    assert scores["completions"] == {"ended": 0.5, "tokens": 3.0, "repetition": 0.0, "distinct_2": 1.0}
    assert scores["rouge"]["rougeL"] == scores["rouge"]["rougeL_low"] == 1.0
    assert "rouge" not in of_completions(rows, [None, ""], seed=0)


def test_rouge_leaves_out_references_without_a_letter_that_it_knows():
    rows = [
        {"prompt": n, "text": text, "tokens": 1, "ended": True} for n, text in enumerate(["a", "\u043c\u0438\u0440"])
    ]
    assert of_completions(rows, ["a", "\u043c\u0438\u0440"], seed=0)["rouge"]["rouge1"] == 1.0
    assert "rouge" not in of_completions(rows[1:], [None, "\u043c\u0438\u0440"], seed=0)


def test_the_interval_of_rouge_draws_prompts_with_all_their_samples():
    rows = [{"prompt": n % 8, "text": "a" if n % 8 < 4 else "b", "tokens": 1, "ended": True} for n in range(80)]
    scores = of_completions(rows, ["a"] * 8, seed=0)["rouge"]
    assert scores["rougeL_high"] - scores["rougeL_low"] > 0.5  # of 80 independent ones 0.22
