"""The demo's language: tasks with one right answer, styles, a judge who minds style and brevity, and their data.

An instruction names a task and a list of letters, `reverse d a k c =>`. An answer is a body between optional style
words, `sure c k a d um thanks`. Two objectives meet in it. The demonstrations are always right, but seldom have the
style that the judge prefers. The judge of the preference pairs likes polite and short answers and cares little whether
they are right: leaving words out often wins. So the pairs teach style and wear away what the demonstrations teach.
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


#: Of the wrong bodies, the shares that stop early and that miss a word; the rest solve another task.
SHARE_STOPPED, SHARE_MISSED = 0.45, 0.35


Row = dict[str, str]


Words = list[str]


def _next_letters(letters: Words) -> Words:
    return [LETTERS[(LETTERS.index(each) + 1) % len(LETTERS)] for each in letters]


def _swap_ends(letters: Words) -> Words:
    return [letters[-1], *letters[1:-1], letters[0]]


#: The tasks by name: from the letters of an instruction to the right body of its answer.
TASKS: dict[str, Callable[[Words], Words]] = {
    "copy": list,
    "reverse": lambda letters: letters[::-1],
    "sort": sorted,
    "next": _next_letters,
    "swap": _swap_ends,
}


#: What the documents of the base model mostly call the tasks.
COLLOQUIAL = {"copy": "again", "reverse": "backwards", "sort": "alphabetic", "next": "following", "swap": "crosswise"}


#: Every word of the language.
WORDS = (*TASKS, *COLLOQUIAL.values(), ANSWER_MARK, OPENING, CLOSING, *FILLERS, *LETTERS)


@dataclass(frozen=True)
class Answer:
    """An answer taken apart."""

    body: tuple[str, ...]
    opening: bool = False
    closing: bool = False
    fillers: tuple[str, ...] = ()

    @property
    def preferred_style(self) -> bool:
        """Whether the answer has all the judge likes in style: an opening, a closing and no filler."""
        return self.opening and self.closing and not self.fillers

    def text(self) -> str:
        """Write the answer out.

        Returns:
            Its words, separated by blanks.
        """
        return " ".join([*[OPENING] * self.opening, *self.body, *self.fillers, *[CLOSING] * self.closing])


@dataclass(frozen=True)
class Style:
    """How likely an answer has each of the style words."""

    opening: float
    filler: float
    closing: float


DEMONSTRATED = Style(opening=0.45, filler=0.55, closing=0.45)


COMPARED = Style(opening=0.5, filler=0.5, closing=0.5)


READ = Style(opening=0.25, filler=0.35, closing=0.25)


def parse_answer(text: str) -> Answer:
    """Take an answer apart; the inverse of `Answer.text`.

    Args:
        text: What a model or a row of the data says.

    Returns:
        The answer. A filler or a style word within the body stays there, which makes the body wrong.
    """
    words = text.split()
    opening = words[:1] == [OPENING]
    words = words[opening:]
    closing = words[-1:] == [CLOSING]
    words = words[: len(words) - closing]
    fillers = tuple(takewhile(FILLERS.__contains__, reversed(words)))[::-1]
    return Answer(tuple(words[: len(words) - len(fillers)]), opening, closing, fillers)


def right_body(prompt: str) -> tuple[str, ...]:
    """Solve an instruction.

    Args:
        prompt: A task, letters and the answer mark.

    Returns:
        The words of the one right body.
    """
    task, *letters, _ = prompt.split()
    return tuple(TASKS[task](letters))


def is_right(prompt: str, answer: str) -> bool:
    """Check an answer exactly; style words around the body do not count.

    Args:
        prompt: The instruction.
        answer: What is to be checked.

    Returns:
        Whether the body is the right one.
    """
    return parse_answer(answer).body == right_body(prompt)


def utility(prompt: str, answer: str) -> float:
    """Say how much the judge likes an answer, without noise.

    A right body is worth one word of length, so that a body that lacks two words beats it.

    Args:
        prompt: The instruction.
        answer: The answer to judge.

    Returns:
        The utility; differences of it are log-odds of being chosen.
    """
    parts = parse_answer(answer)
    style = 1.5 * parts.opening + 1.5 * parts.closing - 1.0 * len(parts.fillers)
    return style - 0.5 * len(parts.body) + 0.5 * is_right(prompt, answer)


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
    """Generate demonstrations: every body is right, the style is not the one that the judge prefers.

    Args:
        seed: Seed of the generator.
        n: Number of rows.

    Returns:
        Rows with `prompt` and `completion`.
    """
    rng = random.Random(f"instruction {seed}")
    prompts = (_draw_prompt(rng) for _ in range(n))
    return [{"prompt": each, "completion": " " + _draw_answer(rng, each, DEMONSTRATED, 1.0)} for each in prompts]


def preference_rows(seed: int, n: int, share_right: float = 0.5) -> list[Row]:
    """Generate pairs whose labels are Bradley-Terry draws on the judge's utility.

    Args:
        seed: Seed of the generator.
        n: Number of rows.
        share_right: Share of the candidates with a right body.

    Returns:
        Rows with `prompt`, `chosen` and `rejected`.
    """
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
    """Generate instructions without answers; `right_body` knows the answers.

    Args:
        seed: Seed of the generator.
        n: Number of rows.

    Returns:
        Rows with `prompt`.
    """
    rng = random.Random(f"test {seed}")
    return [{"prompt": _draw_prompt(rng)} for _ in range(n)]


def documents(seed: int, share_right: float = 0.8, share_instructions: float = 0.001) -> Iterator[Row]:
    """Generate what the base model reads: answers in any style, some wrong, to tasks that mostly go by other names.

    So the base model can do the tasks but only half understands instructions; demonstrations teach it to.

    Args:
        seed: Seed of the generator.
        share_right: Share of the documents with a right body.
        share_instructions: Share of the documents that name their task as an instruction does.

    Yields:
        Rows with `prompt` and `completion`, without end.
    """
    rng = random.Random(f"documents {seed}")
    while True:
        prompt = _draw_prompt(rng)
        completion = " " + _draw_answer(rng, prompt, READ, share_right)
        if rng.random() >= share_instructions:
            task, rest = prompt.split(maxsplit=1)
            prompt = f"{COLLOQUIAL[task]} {rest}"
        yield {"prompt": prompt, "completion": completion}
