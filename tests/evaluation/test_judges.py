"""Judges: a real HTTP server that fails and prefers in known ways, and reward models."""

import cases
import judge_server
import pytest
import scorers
import torch
from judge_server import KEY, judge

from hbat.config.evaluation import JudgeConfig
from hbat.evaluation import endpoint
from hbat.evaluation.judges import TEMPLATES, Pair, RewardJudge, make_judge, read_verdict
from hbat.ppo.rewards.model import RewardModel

PAIRS = [
    Pair(0, "Say a lot", "a long answer", "short"),
    Pair(1, "Say little", "no", "a longer one"),
    Pair(2, "?", "aa", "bb"),
]


@pytest.fixture(autouse=True)
def _quick_and_with_a_key(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def asked(server, folder, pairs=PAIRS, **options):
    config = JudgeConfig(model="judge", base_url=server.url, **options)
    return make_judge(config).judge(pairs, folder / "judgments.jsonl")


def test_a_completion_wins_if_both_orders_prefer_it(tmp_path):
    with judge() as server:
        verdicts = asked(server, tmp_path)
    assert verdicts.points == [1.0, 0.0, 0.5]
    assert (verdicts.agreement, verdicts.first, verdicts.failed, verdicts.tokens) == (1.0, 0.5, 0, 60)
    scores = verdicts.scores(PAIRS, seed=0)
    assert (scores["win_rate"], scores["win"], scores["tie"], scores["loss"]) == (0.5, 1 / 3, 1 / 3, 1 / 3)
    assert scores["win_rate_low"] <= 0.5 <= scores["win_rate_high"]


def test_a_judge_that_prefers_what_it_reads_first_is_found_out(tmp_path):
    with judge(judge_server.biased) as server:
        verdicts = asked(server, tmp_path)
    assert (verdicts.points, verdicts.agreement, verdicts.first) == ([0.5, 0.5, 0.5], 0.0, 1.0)


@pytest.mark.parametrize("fault", [408, 409, 429, 500, 503, "slow", "cut", "nonsense", "schema"])
def test_a_request_is_repeated_until_there_is_an_answer(tmp_path, fault):
    with judge(faults=[fault, fault]) as server:
        verdicts = asked(server, tmp_path, timeout=0.5)
    assert verdicts.points == [1.0, 0.0, 0.5]
    assert len(server.asked) == 8


def test_an_answer_without_a_verdict_is_counted_and_not_asked_for_again(tmp_path):
    with judge(
        lambda question: "I cannot say." if "Say a lot" in question else judge_server.longest(question)
    ) as server:
        first, second = (asked(server, tmp_path) for _ in range(2))
    assert (first.points, first.failed, first.agreement) == ([None, 0.0, 0.5], 2, 1.0)
    assert second == first
    assert len(server.asked) == 6
    assert first.scores(PAIRS, 0)["win_rate"] == 0.25


def test_a_question_without_an_answer_is_counted_and_asked_again_later(tmp_path):
    with judge(faults=[500, 500]) as server:
        first = asked(server, tmp_path, parallel=1, max_retries=1)
        assert (first.points[0], first.failed) == (None, 1)
        assert asked(server, tmp_path).points == [1.0, 0.0, 0.5]
    assert len(server.asked) == 8


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1])
def test_answers_that_were_written_down_before_a_kill_are_not_asked_for_again(tmp_path, cut):
    with judge() as server:
        whole = asked(server, tmp_path)
    file = tmp_path / "judgments.jsonl"
    lines = file.read_bytes()
    file.write_bytes(lines[: int(len(lines) * cut) if isinstance(cut, float) else cut])
    kept = file.read_bytes().count(b"\n")
    with judge() as server:
        assert asked(server, tmp_path) == whole
    assert len(server.asked) == 6 - kept
    assert sorted(file.read_bytes().splitlines()) == sorted(lines.splitlines())


def test_a_judge_that_is_down_ends_the_evaluation(tmp_path):
    with (
        judge(faults=[500] * 100) as server,
        pytest.raises(ConnectionError, match=r"none of the first 4 questions .status 500"),
    ):
        asked(server, tmp_path, max_retries=1)
    with pytest.raises(ConnectionError, match="APIConnectionError"):
        asked(server, tmp_path, max_retries=0)  # nothing listens any more


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_ends_the_evaluation_without_showing_the_key(tmp_path, status):
    with judge(faults=[status] * 10) as server, pytest.raises(ValueError, match=f"status {status}") as raised:
        asked(server, tmp_path)
    assert "OPENAI_API_KEY" in str(raised.value)
    assert KEY not in str(raised.value)
    assert server.keys == {f"Bearer {KEY}"}
    assert not any(KEY in file.read_text() for file in tmp_path.iterdir())


def test_the_answers_of_one_judge_are_not_those_of_another(tmp_path):
    with judge(judge_server.biased) as server:
        asked(server, tmp_path)
        assert asked(server, tmp_path, options={"seed": 1}).first == 1.0
        assert len(server.asked) == 12


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Preferred: A", "A"),
        ("... **Preferred**: B.", "B"),
        ('Preferred: "tie"', "tie"),
        ("preferred: a", "A"),
        ("Preferred: A\nNo. Preferred: B", "B"),
        ("Preferred: Answer", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_an_answer_counts(answer, verdict):
    assert read_verdict(answer) == verdict


def test_texts_that_hold_the_names_of_fields_stay_as_they_are(tmp_path):
    with judge(judge_server.biased) as server:
        asked(server, tmp_path, [Pair(0, "{second}", "{prompt}", "{first}")], parallel=1)
    assert server.asked[0] == TEMPLATES["dialogue"].replace("{second}", "*").replace("{first}", "{prompt}").replace(
        "{prompt}", "{second}", 1
    ).replace("*", "{first}")


def test_a_template_of_ones_own_needs_all_three_texts(tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt} {first} or {second}? Preferred: A, B or tie")
    with judge(judge_server.biased) as server:
        asked(server, tmp_path, PAIRS[:1], parallel=1, template=str(tmp_path / "mine.txt"))
        assert server.asked[0].startswith("Say a lot a long answer or short?")
        (tmp_path / "mine.txt").write_text("{prompt} {first}")
        with pytest.raises(ValueError, match=r"has no \{second\}"):
            asked(server, tmp_path, template=str(tmp_path / "mine.txt"))
        with pytest.raises(ValueError, match=r"neither summarization nor dialogue, and no file"):
            asked(server, tmp_path, template="dialog")


def test_a_conversation_is_shown_turn_by_turn(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    with judge(judge_server.biased) as server:
        asked(server, tmp_path, [Pair(0, turns, "a", "b")])
    assert "user: Hi\n\nassistant: Ho\n\nuser: ?" in server.asked[0]


def test_a_reward_model_prefers_the_higher_score(tmp_path):
    model, tokenizer = scorers.tiny_scorer(), cases.tiny_tokenizer()
    reward = RewardModel(model, tokenizer, name="reward", max_batch_size=2)
    verdicts = RewardJudge(reward).judge([*PAIRS, Pair(3, "?", "same", "same")], tmp_path / "unused")
    own = reward([pair.prompt for pair in PAIRS], [pair.own for pair in PAIRS])
    other = reward([pair.prompt for pair in PAIRS], [pair.other for pair in PAIRS])
    assert verdicts.points == [*torch.where(own > other, 1.0, 0.0).tolist(), 0.5]
    assert verdicts.agreement is None
