"""Judges: a real HTTP server that fails and prefers in known ways, and reward models."""

import re
import time
import traceback

import cases
import judge_server
import pytest
import scorers
import torch
from judge_server import KEY, judge

from hbat.config.evaluation import JudgeConfig
from hbat.evaluation import endpoint
from hbat.evaluation.endpoint import JudgeError
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
    config = JudgeConfig(model="judge", base_url=server.url, api_key_env="OPENAI_API_KEY", **options)
    return make_judge(config, batch_size=2).judge(pairs, folder / "judgments.jsonl")


def test_a_completion_wins_if_both_orders_prefer_it(tmp_path):
    with judge() as server:
        verdicts = asked(server, tmp_path)
    assert verdicts.points == [1.0, 0.0, 0.5]
    assert (verdicts.agreement, verdicts.first, verdicts.failed, verdicts.tokens) == (1.0, 0.5, 0, 60)
    scores = verdicts.scores(PAIRS, seed=0)
    assert (scores["win_rate"], scores["win"], scores["tie"], scores["loss"]) == (0.5, 1 / 3, 1 / 3, 1 / 3)
    assert scores["win_rate_low"] <= 0.5 <= scores["win_rate_high"]


def test_a_judge_that_prefers_what_it_reads_first_is_found_out(tmp_path, caplog):
    with judge(judge_server.biased) as server:
        verdicts = asked(server, tmp_path)
    assert (verdicts.points, verdicts.agreement, verdicts.first) == ([0.5, 0.5, 0.5], 0.0, 1.0)
    assert "decided every pair by its order" in caplog.text


@pytest.mark.parametrize("fault", [408, 409, 429, 500, 503, "slow", "cut", "nonsense", "schema"])
def test_a_request_is_repeated_until_there_is_an_answer(tmp_path, fault):
    with judge(faults=[fault, fault]) as server:
        verdicts = asked(server, tmp_path, timeout=0.5)
    assert verdicts.points == [1.0, 0.0, 0.5]
    assert len(server.asked) == 8


def test_an_answer_without_a_verdict_is_counted_and_told_of_and_not_asked_for_again(tmp_path, caplog):
    with judge(
        lambda question: "I cannot say." if "Say a lot" in question else judge_server.longest(question)
    ) as server:
        first, second = (asked(server, tmp_path) for _ in range(2))
    assert (first.points, first.failed, first.agreement) == ([None, 0.0, 0.5], 2, 1.0)
    assert second == first
    assert len(server.asked) == 6
    assert "no verdict in 2 of 6 answers; one of them: 'I cannot say.'" in caplog.text
    assert first.scores(PAIRS, 0)["win_rate"] == 0.25


def test_a_question_without_an_answer_is_counted_and_told_of_and_asked_again_later(tmp_path, caplog):
    with judge(faults=[500, 500]) as server:
        first = asked(server, tmp_path, parallel=1, max_retries=1)
        assert (first.points[0], first.failed) == (None, 1)
        assert "no answer to 1 of 6 questions" in caplog.text
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


def test_an_answer_is_written_down_before_the_next_question(tmp_path, monkeypatch):
    file, behind = tmp_path / "judgments.jsonl", []
    monkeypatch.setattr("os.fsync", lambda _: time.sleep(0.01))  # a slow disk

    def answer(question):
        behind.append(len(behind) - len(file.read_bytes().splitlines()))
        return judge_server.biased(question)

    with judge(answer) as server:
        asked(server, tmp_path, [Pair(number, "?", "a" * (number + 1), "") for number in range(20)], parallel=2)
    assert len(behind) == 40
    assert max(behind) < 2


def test_a_judge_that_is_down_ends_the_evaluation(tmp_path):
    with (
        judge(faults=[500] * 100) as server,
        pytest.raises(JudgeError, match=r"no answer to 6 questions .* .status 500"),
    ):
        asked(server, tmp_path, max_retries=1)
    with pytest.raises(JudgeError, match="APIConnectionError"):
        asked(server, tmp_path, max_retries=0)  # nothing listens any more


def test_a_judge_that_goes_down_in_the_middle_ends_the_evaluation_with_its_answers_kept(tmp_path):
    pairs = [Pair(number, "?", "a" * (number + 1), "") for number in range(10)]
    with judge(faults=[None] * 4 + [500] * 100) as server:
        with pytest.raises(JudgeError, match="no answer to 8 questions in a row"):
            asked(server, tmp_path, pairs, max_retries=0, parallel=1)
        server.faults.clear()
        asked(server, tmp_path, pairs)
    assert [server.asked.count(question) for question in server.asked[:4]] == [1, 1, 1, 1]
    assert len((tmp_path / "judgments.jsonl").read_text().splitlines()) == 20


def test_a_retry_waits_as_long_as_the_endpoint_asks(tmp_path):
    with judge(faults=["wait"]) as server:
        start = time.monotonic()
        asked(server, tmp_path, PAIRS[:1], parallel=1)
    assert 1.0 <= time.monotonic() - start < 10.0


def test_equal_texts_are_a_tie_and_equal_questions_are_asked_once(tmp_path):
    pairs = [Pair(0, "?", "same", "same"), Pair(1, "?", "longer", "long"), Pair(1, "?", "longer", "long")]
    with judge() as server:
        verdicts = asked(server, tmp_path, pairs)
    assert (verdicts.points, len(server.asked), verdicts.tokens) == ([0.5, 1.0, 1.0], 2, 20)
    assert (verdicts.agreement, verdicts.first) == (1.0, 0.5)


def test_options_are_sent_with_every_request(tmp_path):
    with judge() as server:
        asked(server, tmp_path, PAIRS[:1], options={"top_k": 1, "max_completion_tokens": 9})
    assert [(body["top_k"], body["max_completion_tokens"]) for body in server.bodies] == [(1, 9)] * 2
    assert not any("max_tokens" in body for body in server.bodies)


def test_several_questions_are_asked_at_a_time(tmp_path):
    pairs = [Pair(number, "?", "a" * (number + 1), "") for number in range(4)]
    with judge(faults=["slow"] * 8) as server:
        start = time.monotonic()
        asked(server, tmp_path, pairs, parallel=8)
    assert time.monotonic() - start < 4.0  # one after the other they take eight seconds


def test_another_endpoint_gets_no_key_unless_it_is_named(tmp_path):
    with judge() as server:
        config = JudgeConfig(model="judge", base_url=server.url)
        make_judge(config, batch_size=2).judge(PAIRS, tmp_path / "judgments.jsonl")
    assert server.keys == {"Bearer none"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key_env": "sk-0123"}, "`judge.api_key_env` is no name of an environment variable"),
        ({"base_url": "http://me:secret@localhost/v1"}, "`judge.base_url` has a user name or password"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_showing_it(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        JudgeConfig(model="judge", **options)
    assert not re.search("sk-0123|secret", str(raised.value))


def test_openai_needs_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ValueError, match="no OPENAI_API_KEY"):
        make_judge(JudgeConfig(model="judge"), batch_size=2)


def test_an_answer_with_half_a_character_is_kept(tmp_path):
    with judge(lambda question: "\ud83d Preferred: A") as server:
        first, second = (asked(server, tmp_path) for _ in range(2))
    assert first == second
    assert len(server.asked) == 6


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_ends_the_evaluation_without_showing_the_key(tmp_path, status):
    with judge(faults=[status] * 10) as server, pytest.raises(JudgeError, match=f"status {status}") as raised:
        asked(server, tmp_path)
    assert "OPENAI_API_KEY" in str(raised.value)
    assert KEY not in "".join(traceback.format_exception(raised.value))
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
        ("PREFERRED: A", "A"),
        ("Preferred: Answer B", "B"),
        ("Preferred: Summary A.", "A"),
        ("Answer B is preferred. A is too long.", None),
        ("I preferred a shorter text; so B it is", None),
        ("Preferred: Tie", "tie"),
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
    assert RewardJudge(reward).judge([], tmp_path / "unused").points == []
