"""The demo's language checks itself, and its two objectives conflict."""

import itertools
from statistics import fmean

import pytest

from hbat.cli.demo.task import (
    CLOSING,
    COLLOQUIAL,
    FILLERS,
    OPENING,
    TASKS,
    WORDS,
    Answer,
    documents,
    instruction_rows,
    is_right,
    parse_answer,
    preference_rows,
    right_body,
    utility,
)
from hbat.cli.demo.task import test_prompts as draw_test_prompts


@pytest.mark.parametrize(
    ("task", "body"),
    [("copy", "d a p c"), ("reverse", "c p a d"), ("sort", "a c d p"), ("next", "e b a d"), ("swap", "c a p d")],
)
def test_each_task_has_the_right_body_it_should_have(task, body):
    assert " ".join(right_body(f"{task} d a p c =>")) == body


def test_every_task_is_checked_above():
    assert set(TASKS) == {"copy", "reverse", "sort", "next", "swap"}


@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("fillers", [(), ("um",), ("er", "uh")])
def test_parsing_undoes_writing(opening, closing, fillers):
    answer = Answer(("a", "b", "a"), opening, closing, fillers)
    assert parse_answer(answer.text()) == answer


def test_a_style_word_within_the_body_makes_it_wrong():
    prompt = "copy a b c =>"
    assert is_right(prompt, "a b c")
    assert is_right(prompt, " sure a b c um thanks")
    assert not is_right(prompt, "a um b c")
    assert not is_right(prompt, "a b thanks c")
    assert not is_right(prompt, "sure sure a b c")


@pytest.mark.parametrize("answer", ["", "sure", "thanks", "um", "sure thanks", "sure um thanks"])
def test_an_answer_without_a_body_is_parsed_and_wrong(answer):
    assert parse_answer(answer).body == ()
    assert not is_right("copy a b c =>", answer)


def test_the_judge_likes_politeness_and_brevity_better_than_a_right_body():
    prompt = "copy a b c d e =>"
    right, politely, hesitating = "a b c d e", "sure a b c d e thanks", "a b c d e um uh"
    assert utility(prompt, politely) > utility(prompt, right) > utility(prompt, hesitating)
    assert utility(prompt, right) > utility(prompt, "a b c d d")
    assert utility(prompt, "a b c") > utility(prompt, right)


def test_every_demonstration_is_right():
    assert all(is_right(row["prompt"], row["completion"]) for row in instruction_rows(0, 500))


def test_demonstrations_seldom_have_the_preferred_style():
    answers = [parse_answer(row["completion"]) for row in instruction_rows(0, 500)]
    assert fmean(answer.preferred_style for answer in answers) < 0.15


def test_the_preference_pairs_conflict_with_the_demonstrations():
    rows = preference_rows(0, 2000)
    right = [(is_right(row["prompt"], row["chosen"]), is_right(row["prompt"], row["rejected"])) for row in rows]
    decided = [chosen for chosen, rejected in right if chosen != rejected]
    assert 0.4 < fmean(not chosen for chosen, _ in right) < 0.6
    assert 0.4 < fmean(decided) < 0.6

    lengths = [(len(parse_answer(row["chosen"]).body), len(right_body(row["prompt"]))) for row in rows]
    assert fmean(length < full for length, full in lengths) > 0.2


def test_the_preference_pairs_teach_the_style():
    rows = preference_rows(0, 2000)
    chosen = fmean(parse_answer(row["chosen"]).preferred_style for row in rows)
    rejected = fmean(parse_answer(row["rejected"]).preferred_style for row in rows)
    assert chosen > 3 * rejected


def test_labels_follow_the_utility_with_noise():
    better = [
        utility(row["prompt"], row["chosen"]) > utility(row["prompt"], row["rejected"])
        for row in preference_rows(0, 2000)
    ]
    assert 0.7 < fmean(better) < 0.95


def test_the_answers_of_a_pair_differ():
    assert all(row["chosen"] != row["rejected"] for row in preference_rows(0, 500))


@pytest.mark.parametrize("generate", [instruction_rows, preference_rows, draw_test_prompts])
def test_rows_depend_on_the_seed_alone(generate):
    assert generate(3, 20) == generate(3, 20)
    assert generate(3, 20) != generate(4, 20)
    assert generate(3, 20)[:5] == generate(3, 5)


def test_documents_depend_on_the_seed_alone():
    first, again, other = (list(itertools.islice(documents(seed), 20)) for seed in (1, 1, 2))
    assert first == again != other


def test_documents_seldom_name_a_task_as_instructions_do():
    named = [row["prompt"].split()[0] for row in itertools.islice(documents(0), 4000)]
    assert 0 < fmean(name in TASKS for name in named) < 0.01
    assert set(named) - set(TASKS) == set(COLLOQUIAL.values())


def test_rows_have_the_columns_that_trainers_expect():
    assert set(instruction_rows(0, 1)[0]) == {"prompt", "completion"}
    assert set(preference_rows(0, 1)[0]) == {"prompt", "chosen", "rejected"}
    assert set(draw_test_prompts(0, 1)[0]) == {"prompt"}


def test_all_text_is_made_of_words_of_the_language():
    rows = [*instruction_rows(0, 200), *preference_rows(0, 200), *draw_test_prompts(0, 200)]
    rows += itertools.islice(documents(0), 200)
    assert {word for row in rows for text in row.values() for word in text.split()} <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
    assert {OPENING, CLOSING, *FILLERS} < set(WORDS)
