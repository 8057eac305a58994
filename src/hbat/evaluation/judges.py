"""Pairwise comparison of completions by a judge: who wins how often, in both orders where the order can matter."""

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hbat.config.evaluation import JudgeConfig
from hbat.evaluation.completions import read_rows
from hbat.evaluation.endpoint import Endpoint
from hbat.evaluation.metrics import interval
from hbat.ppo.rewards.model import RewardModel, load_reward_model, load_reward_tokenizer
from hbat.ppo.rollouts.prompts import as_completions

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
#: Questions without a single answer, after which the judge counts as down.
_MOST_FAILURES = 4
_VERDICT = re.compile(r"preferred\W*(A|B|tie)\b", re.IGNORECASE)


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
        failed: Number of answers that could not be read, or that never came.
        tokens: Tokens of questions and answers, as the endpoint counts them.
    """

    points: list[float | None]
    agreement: float | None = None
    first: float | None = None
    failed: int = 0
    tokens: int = 0

    def scores(self, pairs: Sequence[Pair], seed: int) -> dict[str, float]:
        """Win rate (ties count half) with the ends of its interval, shares of wins, ties and losses, and the rest."""
        read = [(point, pair.number) for point, pair in zip(self.points, pairs, strict=True) if point is not None]
        found: dict[str, float] = {"failed": self.failed, "pairs": len(pairs)}
        if read:
            points = [point for point, _ in read]
            low, high = interval(points, [number for _, number in read], seed)
            found |= {"win_rate": sum(points) / len(points), "win_rate_low": low, "win_rate_high": high}
            found |= {
                name: points.count(point) / len(points) for name, point in (("win", 1.0), ("tie", 0.5), ("loss", 0.0))
            }
        extra = {"agreement": self.agreement, "first": self.first, "tokens": self.tokens or None}
        return found | {name: value for name, value in extra.items() if value is not None}


def make_judge(config: JudgeConfig) -> "Judge":
    """Make the judge that is configured; ValueError, ImportError or OSError if it cannot be."""
    if config.reward_model is not None:
        model = load_reward_model(config.reward_model)
        tokenizer = load_reward_tokenizer(model, config.reward_model)
        return RewardJudge(RewardModel(model, tokenizer, name=config.reward_model, max_batch_size=8))
    return EndpointJudge(config)


class RewardJudge:
    """Prefers the completion with the higher reward. Its verdict does not depend on an order."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model

    def judge(self, pairs: Sequence[Pair], file: Path) -> Verdicts:
        """Judge pairs; the scores are quick to compute, and are not kept."""
        rows = [{"prompt": pair.prompt} for pair in pairs]
        prompts = [pair.prompt for pair in pairs]
        own, other = (
            self._model(prompts, as_completions(texts, rows))
            for texts in ([pair.own for pair in pairs], [pair.other for pair in pairs])
        )
        return Verdicts([
            (float(left > right) + float(left >= right)) / 2
            for left, right in zip(own.tolist(), other.tolist(), strict=True)
        ])


class EndpointJudge:
    """Asks a model behind an OpenAI-compatible endpoint, about each pair in both orders.

    A completion wins if both answers prefer it; if they differ, it is a tie. Answers are kept in a file by the content
    of their question, so that none is asked for twice, also after the process was killed.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._template = _template(config.template)
        self._endpoint = Endpoint(config)
        self._parallel = config.parallel

    def judge(self, pairs: Sequence[Pair], file: Path) -> Verdicts:
        """Judge pairs, with the answers of earlier calls in `file`."""
        known = {row["key"]: row for row in read_rows(file)}
        questions = [self._questions(pair) for pair in pairs]
        missing = {key: text for both in questions for key, text in both if key not in known}
        self._ask(missing, known, file)
        answers = [tuple(known.get(key, {}) for key, _ in both) for both in questions]
        return _counted(
            [(first.get("verdict"), second.get("verdict")) for first, second in answers],
            sum(row.get("tokens", 0) for both in answers for row in both),
        )

    def _questions(self, pair: Pair) -> list[tuple[str, str]]:
        prompt = (
            pair.prompt
            if isinstance(pair.prompt, str)
            else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in pair.prompt)
        )
        texts = [self._fill(prompt, *order) for order in ((pair.own, pair.other), (pair.other, pair.own))]
        return [(self._endpoint.key_of(text), text) for text in texts]

    def _fill(self, prompt: str, first: str, second: str) -> str:
        # In one pass: a text may hold the name of a field.
        values = dict(zip(_FIELDS, (prompt, first, second), strict=True))
        return re.sub("|".join(map(re.escape, _FIELDS)), lambda found: values[found[0]], self._template)

    def _ask(self, missing: Mapping[str, str], known: dict[str, Any], file: Path) -> None:
        lock, failures = threading.Lock(), 0

        def ask(question: tuple[str, str]) -> None:
            nonlocal failures
            key, text = question
            row = {"key": key, **self._endpoint.ask(text)}
            with lock:
                known[key] = row
                if "error" in row:
                    failures += 1
                    if failures == len(known) and failures >= _MOST_FAILURES:
                        raise ConnectionError(
                            f"`judge` answered none of the first {failures} questions ({row['error']}). Check that it "
                            "runs, and `judge.base_url`; what is written down so far is kept."
                        )
                    return
                row["verdict"] = read_verdict(row["answer"])
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())

        with file.open("a", encoding="utf-8") as lines, ThreadPoolExecutor(self._parallel) as pool:
            answers = pool.map(ask, missing.items())
            try:
                for _ in tqdm(answers, total=len(missing), desc="Asking the judge", disable=None, leave=False):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


Judge = RewardJudge | EndpointJudge


def read_verdict(answer: str) -> str | None:
    """Read `A`, `B` or `tie` from the last "Preferred: ..." of an answer; None if it has none."""
    found = _VERDICT.findall(answer)
    return None if not found else found[-1].lower() if len(found[-1]) > 1 else found[-1].upper()


def _counted(answers: Sequence[tuple[str | None, str | None]], tokens: int) -> Verdicts:
    # The own completion is A in the first question, and B in the second.
    both = [(first, second) for first, second in answers if first is not None and second is not None]
    points: list[float | None] = [
        None if None in pair else 1.0 if pair == ("A", "B") else 0.0 if pair == ("B", "A") else 0.5 for pair in answers
    ]
    preferences = [verdict for pair in answers for verdict in pair if verdict in {"A", "B"}]
    agreeing = sum(pair in {("A", "B"), ("B", "A"), ("tie", "tie")} for pair in both)
    return Verdicts(
        points,
        agreement=agreeing / len(both) if both else None,
        first=preferences.count("A") / len(preferences) if preferences else None,
        failed=sum(verdict is None for pair in answers for verdict in pair),
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
