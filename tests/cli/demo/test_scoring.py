"""The demo's scores: perfect, blank and half-right answers, and generation in batches."""

import pytest
import torch

from hbat.cli.demo.base_model import build_model, build_tokenizer
from hbat.cli.demo.scoring import Scores, evaluate, generate_answers, score_answers
from hbat.cli.demo.task import Answer, right_body
from hbat.cli.demo.task import test_prompts as draw_test_prompts

ROWS = draw_test_prompts(0, 40)


def test_perfect_answers_score_one():
    answers = [Answer(right_body(row["prompt"]), opening=True, closing=True).text() for row in ROWS]
    scores = score_answers(ROWS, answers)
    assert (scores.accuracy, scores.style, scores.joint) == (1, 1, 1)


def test_blank_answers_score_nothing():
    assert score_answers(ROWS, [""] * len(ROWS)) == Scores(accuracy=0, style=0, joint=0, utility=0)


def test_style_without_a_body_is_preferred_but_not_joint():
    scores = score_answers(ROWS, ["sure thanks"] * len(ROWS))
    assert scores == Scores(accuracy=0, style=1, joint=0, utility=3)


def test_joint_counts_answers_that_are_both_right_and_polite():
    rows = [{"prompt": "copy a b c =>"}] * 4
    scores = score_answers(rows, ["sure a b c thanks", "a b c", "sure a b thanks", "a b um"])
    assert (scores.accuracy, scores.style, scores.joint) == (0.5, 0.5, 0.25)


def test_every_row_needs_an_answer():
    with pytest.raises(ValueError, match="shorter"):
        score_answers(ROWS, [""])


@pytest.fixture(scope="module")
def model():
    return build_model(0, width=16, layers=1, heads=2)


def test_answers_do_not_depend_on_the_batches(model):
    tokenizer = build_tokenizer()
    prompts = [row["prompt"] for row in ROWS]
    answers = generate_answers(model, tokenizer, prompts)
    assert len(answers) == len(prompts)
    assert generate_answers(model, tokenizer, prompts, batch_size=7) == answers
    assert [generate_answers(model, tokenizer, [prompt])[0] for prompt in prompts[:5]] == answers[:5]


def test_an_answer_ends_at_the_end_of_text():
    tokenizer = build_tokenizer()
    model = build_model(0, width=16, layers=1, heads=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
    assert generate_answers(model, tokenizer, ["copy a b c =>"]) == [""]


def test_evaluation_keeps_the_mode_of_the_model(model):
    for training in (True, False):
        model.train(training)
        scores = evaluate(model, build_tokenizer(), ROWS)
        assert model.training is training
        assert 0 <= scores.joint <= scores.accuracy <= 1
