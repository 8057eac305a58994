"""Completions of held-out prompts in a JSONL file: written once, and continued where it was cut off."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hbat.config.evaluation import Measured
from hbat.config.fields import shown
from hbat.evaluation.rows import Asked
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import context_length, prompt_tokens

Row = dict[str, Any]


def prompt_ids(asked: Sequence[Asked], model: Any, tokenizer: Any, *, name: str, new_tokens: int) -> list[list[int]]:
    """Tokenize prompts.

    Args:
        asked: The prompts.
        model: The model that completes them.
        tokenizer: Its tokenizer.
        name: How the user knows them, for messages.
        new_tokens: Tokens that a completion may have.

    Raises:
        ValueError: If a prompt cannot be tokenized, or leaves no room for a completion in the model's context.
    """
    found = [_tokens(number, ask, tokenizer, name) for number, ask in enumerate(asked)]
    context = context_length(model.config)
    lengths = [len(tokens) for tokens in found]
    if context is not None and max(lengths) + new_tokens > context:
        number = lengths.index(max(lengths))
        many = sum(length + new_tokens > context for length in lengths)
        raise ValueError(
            f"{name}, prompt {number}: {lengths[number]} tokens and {new_tokens} for the completion do not fit the "
            f"model's context of {context} ({many} such prompts). Shorten or remove them, or ask for fewer tokens."
        )
    return found


def _tokens(number: int, ask: Asked, tokenizer: Any, name: str) -> list[int]:
    try:
        if tokens := prompt_tokens(ask.prompt, tokenizer, ask.options):
            return tokens
        problem: object = "it is empty"
    except Exception as error:  # noqa: BLE001 - chat templates raise anything
        problem = error
    raise ValueError(f"{name}, prompt {number}: {problem}. It is {shown(ask.prompt)}.")


class CompletionFile:
    """The completions of one model, a row for each prompt, temperature and sample.

    A row has `prompt` (its number), `asked` and `reference` (of the prompt's row), `temperature`, `sample`, `text`,
    `tokens`, `ended` (by an end token or a stop string). Batches are of prompts of similar length and always the same
    ones, each with a seed of its own, so that a file that was cut off continues to the same rows as one that was not.

    Args:
        file: The file.
        config: What is measured.
        asked: The prompts.
    """

    def __init__(self, file: Path, config: Measured, asked: Sequence[Asked]) -> None:
        self._file = file
        self._config = config
        self._asked = asked

    def complete(self, model: Any, tokenizer: Any) -> list[Row]:
        """Write the rows that are missing, and return all in order of temperature, sample and prompt."""
        ids = prompt_ids(self._asked, model, tokenizer, name="`prompts`", new_tokens=self._config.max_new_tokens)
        size = self._config.batch_size
        order = sorted(
            range(len(ids)), key=lambda number: -len(ids[number])
        )  # the longest first: memory shows at once
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        known = {(row["temperature"], row["sample"], row["prompt"]): row for row in own_rows(self._file)}
        samples = [
            (temperature, sample)
            for temperature in self._config.temperatures
            for sample in range(self._config.samples if temperature else 1)
        ]
        left = [
            (*which, number)
            for which in samples
            for number, batch in enumerate(batches)
            if not all((*which, prompt) in known for prompt in batch)
        ]
        with self._file.open("a", encoding="utf-8") as lines:
            for job in tqdm(left, desc="Completing prompts", unit="batch", disable=None, leave=False):
                prompts = batches[job[-1]]
                rows = self._rows(model, tokenizer, [ids[prompt] for prompt in prompts], *job)
                for prompt, row in zip(prompts, rows, strict=True):
                    if (*job[:2], prompt) not in known:  # of a batch that was cut off
                        ask = self._asked[prompt]
                        named = {"prompt": prompt, "asked": ask.prompt, "reference": ask.reference}
                        known[*job[:2], prompt] = named | row
                        lines.write(json.dumps(known[*job[:2], prompt], ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
        return [known[*which, prompt] for which in samples for prompt in range(len(ids))]

    def _rows(
        self, model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, sample: int, batch: int
    ) -> list[Row]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        sampler = CompletionSampler(model, tokenizer, max_new_tokens=self._config.max_new_tokens, sampling=sampling)
        seed = random.Random(f"{self._config.seed} {temperature} {sample} {batch}").getrandbits(32)  # noqa: S311
        rows = sampler.complete(prompts, seed=seed if temperature else None)
        return [{"temperature": temperature, "sample": sample} | row for row in rows]


def own_rows(file: Path) -> list[Row]:
    """Read a JSONL file that is continued; a last line that was cut off is taken out of it."""
    rows, whole = _read(file)
    if file.exists() and whole < file.stat().st_size:
        os.truncate(file, whole)
    return rows


def read_rows(file: Path) -> list[Row]:
    """Read the whole lines of a JSONL file; none if it is not there."""
    return _read(file)[0]


def _read(file: Path) -> tuple[list[Row], int]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    whole, rows = content.rfind(b"\n") + 1, []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no JSON object: {error}. Remove the line, or the file."
            ) from error
    return rows, whole
