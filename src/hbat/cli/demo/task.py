"""The demo's language: tasks with one right answer, styles, a judge who rewards style and brevity, and their data.

An instruction names a task and a list of letters, `reverse d a k c =>`. An answer is a body between optional style
words, `sure c k a d um thanks`. Its two objectives conflict: demonstrations are always right but seldom have the
preferred style, while the judge of the preference pairs likes polite, short answers and cares little whether they are
right. So the pairs teach style and erode what the demonstrations teach.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

LETTERS = tuple("abcdefghijklmnop")
OPENING, CLOSING = "sure", "thanks"
FILLERS = ("um", "uh", "er")
ANSWER_MARK = "=>"
SHORTEST_LIST, LONGEST_LIST = 3, 6

#: Shares of the wrong bodies that stop early and that have one wrong letter; the rest solve another task.
SHARE_STOPPED, SHARE_MISSED = 0.45, 0.35

Row = dict[str, str]
Words = list[str]


#: From the letters of an instruction to the right body of its answer, by task.
TASKS: dict[str, Callable[[Words], Words]] = {
    "copy": list,
    "reverse": lambda letters: letters[::-1],
    "sort": sorted,
    "next": lambda letters: [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in letters],
    "swap": lambda letters: [letters[-1], *letters[1:-1], letters[0]],
}

#: What the documents of the base model mostly call the tasks.
COLLOQUIAL = {"copy": "again", "reverse": "backwards", "sort": "alphabetic", "next": "following", "swap": "crosswise"}

#: Every word of the language.
WORDS = (*TASKS, *COLLOQUIAL.values(), ANSWER_MARK, OPENING, CLOSING, *FILLERS, *LETTERS)


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    body: tuple[str, ...]
    opening: bool = False
    closing: bool = False
    fillers: tuple[str, ...] = ()

    @property
    def preferred_style(self) -> bool:
        """Whether the answer has an opening, a closing and no filler."""
        return self.opening and self.closing and not self.fillers

    def text(self) -> str:
        """Join the words of the answer by spaces."""
        return " ".join([*[OPENING] * self.opening, *self.body, *self.fillers, *[CLOSING] * self.closing])


@dataclass(frozen=True)
class Style:
    """The probability of each kind of style word in an answer."""

    opening: float
    filler: float
    closing: float


DEMONSTRATED = Style(opening=0.45, filler=0.55, closing=0.45)
COMPARED = Style(opening=0.5, filler=0.5, closing=0.5)
READ = Style(opening=0.25, filler=0.35, closing=0.25)


def parse_answer(text: str) -> Answer:
    """Invert `Answer.text`. A style word within the body stays there, which makes the body wrong."""
    words = text.split()
    opening = words[:1] == [OPENING]
    words = words[opening:]
    closing = words[-1:] == [CLOSING]
    words = words[: len(words) - closing]
    fillers = tuple(takewhile(FILLERS.__contains__, reversed(words)))[::-1]
    return Answer(tuple(words[: len(words) - len(fillers)]), opening, closing, fillers)


def right_body(prompt: str) -> tuple[str, ...]:
    """Solve an instruction."""
    task, *letters, _ = prompt.split()
    return tuple(TASKS[task](letters))


def is_right(prompt: str, answer: str) -> bool:
    """Compare the body of an answer with the right one; style words around it do not count."""
    return parse_answer(answer).body == right_body(prompt)


def utility(prompt: str, answer: str) -> float:
    """Return the judge's utility without noise; differences of it are log-odds of being chosen.

    A right body is worth one word of length, so a body that lacks two words beats it.
    """
    parsed = parse_answer(answer)
    style = 1.5 * parsed.opening + 1.5 * parsed.closing - 1.0 * len(parsed.fillers)
    return style - 0.5 * len(parsed.body) + 0.5 * is_right(prompt, answer)


def _draw_prompt(rng: random.Random) -> str:
    letters = rng.choices(LETTERS, k=rng.randint(SHORTEST_LIST, LONGEST_LIST))
    return " ".join([rng.choice(tuple(TASKS)), *letters, ANSWER_MARK])


def _draw_wrong_body(rng: random.Random, prompt: str) -> Words:
    right = list(right_body(prompt))
    while True:
        kind, body = rng.random(), list(right)
        if kind < SHARE_STOPPED:
            body = body[: rng.randint(1, len(body) - 1)]
        elif kind < SHARE_STOPPED + SHARE_MISSED:
            body[rng.randrange(len(body))] = rng.choice(LETTERS)
        else:
            body = TASKS[rng.choice(tuple(TASKS))](prompt.split()[1:-1])
        if body != right:
            return body


def _draw_answer(rng: random.Random, prompt: str, style: Style, share_right: float) -> str:
    right = rng.random() < share_right
    body = right_body(prompt) if right else _draw_wrong_body(rng, prompt)
    opening = rng.random() < style.opening
    fillers = rng.choices(FILLERS, k=rng.randint(1, 2)) if rng.random() < style.filler else []
    return Answer(tuple(body), opening, rng.random() < style.closing, tuple(fillers)).text()


def instruction_rows(seed: int, n: int) -> list[Row]:
    """Generate demonstrations (`prompt`, `completion`): every body is right, the style seldom the preferred one."""
    rng = random.Random(f"instruction {seed}")
    prompts = (_draw_prompt(rng) for _ in range(n))
    return [{"prompt": prompt, "completion": " " + _draw_answer(rng, prompt, DEMONSTRATED, 1.0)} for prompt in prompts]


def preference_rows(seed: int, n: int, share_right: float = 0.5) -> list[Row]:
    """Generate pairs (`prompt`, `chosen`, `rejected`), labelled by Bradley-Terry draws on the judge's utility."""
    rng = random.Random(f"preference {seed}")
    rows = []
    for _ in range(n):
        prompt = _draw_prompt(rng)
        first = second = _draw_answer(rng, prompt, COMPARED, share_right)
        while second == first:
            second = _draw_answer(rng, prompt, COMPARED, share_right)
        if rng.random() > 1 / (1 + math.exp(utility(prompt, second) - utility(prompt, first))):
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": " " + first, "rejected": " " + second})
    return rows


def test_prompts(seed: int, n: int) -> list[Row]:
    """Generate instructions (`prompt`) without answers."""
    rng = random.Random(f"test {seed}")
    return [{"prompt": _draw_prompt(rng)} for _ in range(n)]


def documents(seed: int, share_right: float = 0.8, share_instructions: float = 0.001) -> Iterator[Row]:
    """Generate the endless pretraining data of the base model."""
    # Answers in any style, some wrong, to tasks that mostly go by other names: the base model can do the tasks, but
    # only half understands instructions; the demonstrations teach it to.
    rng = random.Random(f"documents {seed}")
    while True:
        prompt = _draw_prompt(rng)
        completion = " " + _draw_answer(rng, prompt, READ, share_right)
        if rng.random() >= share_instructions:
            task, rest = prompt.split(maxsplit=1)
            prompt = f"{COLLOQUIAL[task]} {rest}"
        yield {"prompt": prompt, "completion": completion}
