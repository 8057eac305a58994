"""Pairwise comparison of completions by a judge: who wins how often, in both orders where the order can matter."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hbat.config.evaluation import JudgeConfig
from hbat.config.fields import shown
from hbat.evaluation.completions import read_rows
from hbat.evaluation.endpoint import Endpoint, JudgeError
from hbat.evaluation.metrics import estimate
from hbat.ppo.rewards.model import RewardModel, load_reward_model, load_reward_tokenizer
from hbat.ppo.rollouts.prompts import as_completions

logger = logging.getLogger(__name__)

#: In the form of the paper's Figure 4, in words of our own: the question, both texts, and one line to read.
TEMPLATES = {
    "summarization": """Below are a text and two summaries of it. Which one is the better summary? A good one gives \
the main points of the text, adds nothing that the text does not say, and is short and well written.

Text:
{prompt}

Summary A:
{first}

Summary B:
{second}

Compare the two in one sentence. Then end with one line, either "Preferred: A", "Preferred: B" or "Preferred: tie".""",
    "dialogue": """Below are a request to a chat assistant and two answers to it. Which one is the better answer? A \
good one does what was asked, is right, clear and as long as it needs to be, and does no harm.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Compare the two in one sentence. Then end with one line, either "Preferred: A", "Preferred: B" or "Preferred: tie".""",
}
_FIELDS = ("{prompt}", "{first}", "{second}")
#: Questions in a row without an answer, after which the judge counts as down.
_MOST_FAILURES = 8
_VERDICT = re.compile(r"(?i:preferred)\W*?:\W*(?i:(?:answer|summary|text)\s+)?(A|B|(?i:tie))\b")


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt."""

    number: int
    prompt: Any
    own: str
    other: str


@dataclass
class Verdicts:
    """What a judge said of pairs.

    Attributes:
        points: By pair 1 for a win, 0.5 for a tie, 0 for a loss; None where an answer could not be read.
        agreement: Share of the pairs with two answers whose two orders agree; None if the order cannot matter.
        first: Share of the preferences that went to the completion shown first, 0.5 without a bias; or None.
        answers: Number of questions.
        failed: Number of answers that could not be read, or that never came.
        tokens: Tokens of questions and answers, as the endpoint counts them.
    """

    points: list[float | None]
    agreement: float | None = None
    first: float | None = None
    answers: int = 0
    failed: int = 0
    tokens: int = 0

    def scores(self, pairs: Sequence[Pair], seed: int) -> dict[str, float]:
        """Win rate (ties count half) with the ends of its interval, shares of wins, ties and losses, and the rest."""
        read = [(point, pair.number) for point, pair in zip(self.points, pairs, strict=True) if point is not None]
        found: dict[str, float] = {"pairs": len(pairs)}
        if read:
            points = [point for point, _ in read]
            found |= estimate("win_rate", points, [number for _, number in read], seed)
            found |= {
                name: points.count(point) / len(points) for name, point in (("win", 1.0), ("tie", 0.5), ("loss", 0.0))
            }
        if self.answers:
            found |= {"answers": self.answers, "failed": self.failed, "tokens": self.tokens}
        extra = {"agreement": self.agreement, "first": self.first}
        return found | {name: value for name, value in extra.items() if value is not None}


def make_judge(config: JudgeConfig, batch_size: int) -> "Judge":
    """Make the judge that is configured; ValueError, ImportError or OSError if it cannot be."""
    if config.reward_model is not None:
        model = load_reward_model(config.reward_model)
        tokenizer = load_reward_tokenizer(model, config.reward_model)
        reward = RewardModel(model, tokenizer, name=config.reward_model, max_batch_size=batch_size)
        reward.to(PartialState().default_device)
        return RewardJudge(reward)
    return EndpointJudge(config)


class RewardJudge:
    """Prefers the completion with the higher reward. Its verdict does not depend on an order."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def check(self, prompts: Sequence[Any]) -> None:
        """Refuse prompts that it cannot read, before anything is completed (ValueError)."""
        if any(not isinstance(prompt, str) for prompt in prompts):
            self._model.require_template()

    def judge(self, pairs: Sequence[Pair], file: Path) -> Verdicts:
        """Judge pairs; the scores are quick to compute, and are not kept."""
        if not pairs:
            return Verdicts([])
        prompts = [pair.prompt for pair in pairs]
        rows = [{"prompt": prompt} for prompt in prompts]
        with torch.autocast(PartialState().default_device.type, enabled=False):  # a run's own precision is its own
            own, other = (
                self._model(prompts, as_completions(texts, rows)).tolist()
                for texts in ([pair.own for pair in pairs], [pair.other for pair in pairs])
            )
        return Verdicts([(1 + (left > right) - (left < right)) / 2 for left, right in zip(own, other, strict=True)])


class EndpointJudge:
    """Asks a model behind an OpenAI-compatible endpoint, about each pair in both orders.

    A completion wins if both answers prefer it; if they differ, it is a tie. Equal texts are a tie without a question.
    Answers are kept in a file by the content of their question, so that none is asked for twice, also after the
    process was killed.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._template = _template(config.template)
        self._endpoint = Endpoint(config)
        self._parallel = config.parallel

    def check(self, prompts: Sequence[Any]) -> None:
        """Nothing: any prompt can be shown."""

    def judge(self, pairs: Sequence[Pair], file: Path) -> Verdicts:
        """Judge pairs, with the answers of earlier calls in `file`.

        Raises:
            JudgeError: If it does not answer, or refuses to.
        """
        known = {row["key"]: row for row in read_rows(file, continued=True)}
        questions = [() if pair.own == pair.other else self._questions(pair) for pair in pairs]
        wanted = dict(question for both in questions for question in both)
        self._ask({key: text for key, text in wanted.items() if key not in known}, known, file)
        verdicts = {key: read_verdict(row["answer"]) for key, row in known.items()}
        tokens = sum(known[key]["tokens"] for key in wanted if key in known)
        if unanswered := len(wanted.keys() - known.keys()):
            logger.warning(
                "`judge` gave no answer to %d of %d questions. They count as failed, and are asked again.",
                unanswered, len(wanted),
            )  # fmt: skip
        if unread := [key for key in wanted if key in known and verdicts[key] is None]:
            logger.warning(
                "`judge` gave no verdict in %d of %d answers; one of them: %s",
                len(unread), len(wanted), shown(known[unread[0]]["answer"]),
            )  # fmt: skip
        found = _counted([[verdicts.get(key) for key, _ in both] for both in questions], tokens)
        if found.first in {0.0, 1.0} and found.agreement == 0:
            logger.warning("`judge` decided every pair by its order: its win rate says nothing.")
        return found

    def _questions(self, pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
        prompt = pair.prompt if isinstance(pair.prompt, str) else _conversation(pair.prompt)
        first, second = self._fill(prompt, pair.own, pair.other), self._fill(prompt, pair.other, pair.own)
        return (self._endpoint.key_of(first), first), (self._endpoint.key_of(second), second)

    def _fill(self, prompt: str, first: str, second: str) -> str:
        # In one pass: a text may hold the name of a field.
        values = dict(zip(_FIELDS, (prompt, first, second), strict=True))
        return re.sub("|".join(map(re.escape, _FIELDS)), lambda found: values[found[0]], self._template)

    def _ask(self, missing: Mapping[str, str], known: dict[str, Any], file: Path) -> None:
        stop, writing, failures = Event(), Lock(), 0

        def ask(question: tuple[str, str]) -> dict[str, Any]:
            row = {"key": question[0], "question": question[1], **self._endpoint.ask(question[1], stop)}
            if "error" not in row:
                with writing:  # before the next question: a killed process loses only those that are on their way
                    lines.write(json.dumps(row) + "\n")  # in ASCII: half of a surrogate pair stays what it is
                    lines.flush()
                    os.fsync(lines.fileno())
            return row

        with file.open("a", encoding="utf-8") as lines, ThreadPoolExecutor(self._parallel) as pool:
            jobs = [pool.submit(ask, question) for question in missing.items()]
            bar = tqdm(as_completed(jobs), total=len(jobs), desc="Asking the judge", disable=None, leave=False)
            try:
                for job in bar:
                    row = job.result()
                    failures = failures + 1 if "error" in row else 0
                    if failures == _MOST_FAILURES or (failures == len(missing) and not known):
                        raise JudgeError(
                            f"`judge` gave no answer to {failures} questions in a row ({row['error']}). Check that it "
                            "runs, and `judge.base_url`. Its answers so far are kept."
                        )
                    if not failures:
                        known[row["key"]] = row
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


Judge = RewardJudge | EndpointJudge


def read_verdict(answer: str) -> str | None:
    """Read `A`, `B` or `tie` from the last "Preferred: ..." of an answer; None if it has none."""
    found = _VERDICT.findall(answer)
    return (found[-1] if found[-1] in {"A", "B"} else "tie") if found else None


def _conversation(turns: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(f"{turn.get('role')}: {turn['content']}" for turn in turns if turn.get("content"))


def _counted(answers: Sequence[Sequence[str | None]], tokens: int) -> Verdicts:
    # The own completion is A in the first question and B in the second; equal texts have no question.
    decided: dict[Any, float] = {("A", "B"): 1.0, ("B", "A"): 0.0}
    points = [None if None in both else decided.get(tuple(both), 0.5) for both in answers]
    whole = [both for both in answers if both and None not in both]
    preferences = [verdict for both in answers for verdict in both if verdict in {"A", "B"}]
    agreeing = sum(sorted(filter(None, both)) == ["A", "B"] or list(both) == ["tie", "tie"] for both in whole)
    return Verdicts(
        points,
        agreement=agreeing / len(whole) if whole else None,
        first=preferences.count("A") / len(preferences) if preferences else None,
        answers=sum(map(len, answers)),
        failed=sum(verdict is None for both in answers for verdict in both),
        tokens=tokens,
    )


def _template(given: str) -> str:
    if given in TEMPLATES:
        return TEMPLATES[given]
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`judge.template` is {given!r}: neither {' nor '.join(TEMPLATES)}, and no file: {error}"
        ) from error
    if missing := [field for field in _FIELDS if field not in text]:
        raise ValueError(
            f"`judge.template` {given!r} has no {' and no '.join(missing)}. Put the texts where they belong."
        )
    return text
