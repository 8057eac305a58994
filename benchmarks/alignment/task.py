"""The language of the evidence: that of the demo, with eight tasks, and with its conflict as parameters.

Demonstrations are always right, in a style that the judge likes to some degree. The judge of the preference pairs
rewards style and brevity and hardly cares whether an answer is right, so the pairs teach style and erode the tasks.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from hbat.cli.demo.task import (
    ANSWER_MARK,
    CLOSING,
    COLLOQUIAL,
    COMPARED,
    FILLERS,
    LETTERS,
    LONGEST_LIST,
    OPENING,
    READ,
    SHARE_MISSED,
    SHARE_STOPPED,
    SHORTEST_LIST,
    Answer,
    Row,
    Style,
    Words,
    parse_answer,
)
from hbat.cli.demo.task import TASKS as DEMO_TASKS

#: From the letters of an instruction to the right body of its answer. Over time they arrive in this order.
TASKS: dict[str, Callable[[Words], Words]] = {
    **DEMO_TASKS,
    "unique": lambda letters: list(dict.fromkeys(letters)),
    "ends": lambda letters: [letters[0], letters[-1]],
    "rotate": lambda letters: [*letters[1:], letters[0]],
}
ALIASES = {**COLLOQUIAL, "unique": "distinct", "ends": "borders", "rotate": "onwards"}
WORDS = (*TASKS, *ALIASES.values(), ANSWER_MARK, OPENING, CLOSING, *FILLERS, *LETTERS)
_FEW_LETTERS = 8  # of `unique`, so that letters repeat


@dataclass(frozen=True)
class Conflict:
    """How far the two objectives pull apart.

    Attributes:
        politeness: Probability of an opening and of a closing in a demonstration; fillers have the rest.
        brevity: What a word of the body costs in the judge's utility.
    """

    politeness: float = 0.5
    brevity: float = 0.5


def right_body(prompt: str) -> Words:
    """Solve an instruction."""
    task, *letters, _ = prompt.split()
    return TASKS[task](letters)


def utility(prompt: str, answer: str, conflict: Conflict) -> float:
    """Return the judge's utility without noise; differences of it are log-odds of being chosen."""
    parsed = parse_answer(answer)
    style = 1.5 * parsed.opening + 1.5 * parsed.closing - 1.0 * len(parsed.fillers)
    return style - conflict.brevity * len(parsed.body) + 0.5 * ([*parsed.body] == right_body(prompt))


def demonstrations(seed: int, n: int, conflict: Conflict, tasks: Sequence[str] = tuple(TASKS)) -> list[Row]:
    """Generate right answers (`prompt`, `completion`)."""
    rng = random.Random(f"demonstrations {seed} {tasks}")
    style = Style(conflict.politeness, 1 - conflict.politeness, conflict.politeness)
    prompts = (_prompt(rng, rng.choice(tasks)) for _ in range(n))
    return [{"prompt": prompt, "completion": " " + _answer(rng, prompt, style, 1.0)} for prompt in prompts]


def pairs(seed: int, n: int, conflict: Conflict, tasks: Sequence[str] = tuple(TASKS)) -> list[Row]:
    """Generate pairs (`prompt`, `chosen`, `rejected`), labelled by Bradley-Terry draws on the judge's utility."""
    rng = random.Random(f"pairs {seed} {tasks}")
    rows = []
    for _ in range(n):
        prompt = _prompt(rng, rng.choice(tasks))
        first = second = _answer(rng, prompt, COMPARED, 0.5)
        while second == first:
            second = _answer(rng, prompt, COMPARED, 0.5)
        gain = utility(prompt, second, conflict) - utility(prompt, first, conflict)
        if rng.random() < 1 / (1 + math.exp(-gain)):
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": " " + first, "rejected": " " + second})
    return rows


def documents(seed: int, n: int, share_instructions: float) -> list[Row]:
    """Generate what a base model reads: answers, some wrong, to tasks that mostly go by other names."""
    rng = random.Random(f"documents {seed}")
    rows = []
    for _ in range(n):
        prompt = _prompt(rng, rng.choice(tuple(TASKS)))
        completion = " " + _answer(rng, prompt, READ, 0.9)
        task, rest = prompt.split(maxsplit=1)
        name = task if rng.random() < share_instructions else ALIASES[task]
        rows.append({"prompt": f"{name} {rest}", "completion": completion})
    return rows


def test_prompts(seed: int, n: int) -> list[str]:
    """Generate instructions, the same number of every task."""
    rng = random.Random(f"test {seed}")
    return [_prompt(rng, task) for _, task in zip(range(n), cycle(TASKS), strict=False)]


def score(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Score one answer per prompt, by task: shares of right bodies, of the preferred style, and of both."""
    found: dict[str, list[tuple[bool, bool]]] = {task: [] for task in TASKS}
    for prompt, text in zip(prompts, answers, strict=True):
        parsed = parse_answer(text)
        found[prompt.split()[0]].append(([*parsed.body] == right_body(prompt), parsed.preferred_style))
    return {
        task: {
            "accuracy": sum(right for right, _ in marks) / len(marks),
            "style": sum(liked for _, liked in marks) / len(marks),
            "both": sum(right and liked for right, liked in marks) / len(marks),
        }
        for task, marks in found.items()
    }


def _prompt(rng: random.Random, task: str) -> str:
    pool = rng.sample(LETTERS, _FEW_LETTERS) if task == "unique" else LETTERS
    return " ".join([task, *rng.choices(pool, k=rng.randint(SHORTEST_LIST, LONGEST_LIST)), ANSWER_MARK])


def _wrong_body(rng: random.Random, prompt: str) -> Words:
    right = right_body(prompt)
    while True:
        kind, body = rng.random(), list(right)
        if kind < SHARE_STOPPED:
            body = body[: rng.randint(1, max(1, len(body) - 1))]
        elif kind < SHARE_STOPPED + SHARE_MISSED:
            body[rng.randrange(len(body))] = rng.choice(LETTERS)
        else:
            body = TASKS[rng.choice(tuple(TASKS))](prompt.split()[1:-1])
        if body != right:
            return body


def _answer(rng: random.Random, prompt: str, style: Style, share_right: float) -> str:
    body = right_body(prompt) if rng.random() < share_right else _wrong_body(rng, prompt)
    opening = rng.random() < style.opening
    fillers = rng.choices(FILLERS, k=rng.randint(1, 2)) if rng.random() < style.filler else []
    return Answer(tuple(body), opening, rng.random() < style.closing, tuple(fillers)).text()
