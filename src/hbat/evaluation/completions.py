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
    """Tokenize prompts that leave room for `new_tokens`; messages call them `name`.

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


def complete(
    file: Path, config: Measured, asked: Sequence[Asked], ids: Sequence[list[int]], model: Any, tokenizer: Any
) -> list[Row]:
    """Write the completions that a JSONL file lacks; returns all rows in order of temperature, sample and prompt.

    A row has `prompt` (its number), `asked` and `reference` (of the prompt's row), `temperature`, `sample`, `text`,
    `tokens`, `ended` (by an end token or a stop string). Batches are of prompts of similar length and always the same
    ones, each with a seed of its own, so that a file that was cut off continues to the same rows as one that was not.
    """
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))  # the longest first: memory shows at once
    batches = [order[at : at + config.batch_size] for at in range(0, len(order), config.batch_size)]
    known = {place_of(row): row for row in read_rows(file, continued=True)}
    samples = [
        (temperature, sample)
        for temperature in config.temperatures
        for sample in range(config.samples if temperature else 1)
    ]
    left = [
        (*which, number)
        for which in samples
        for number, batch in enumerate(batches)
        if not all((*which, prompt) in known for prompt in batch)
    ]
    bar = tqdm(left, desc="Completing prompts", unit="batch", disable=None, leave=False)
    with file.open("a", encoding="utf-8") as lines:
        for temperature, sample, number in bar:
            prompts = [ids[prompt] for prompt in batches[number]]
            seed = f"{config.seed} {temperature} {sample} {number}"
            found = _sampled(model, tokenizer, prompts, config.max_new_tokens, temperature, seed)
            for prompt, completion in zip(batches[number], found, strict=True):
                row = {"prompt": prompt, "asked": asked[prompt].prompt, "reference": asked[prompt].reference}
                row |= {"temperature": temperature, "sample": sample, **completion}
                if place_of(row) not in known:  # of a batch that was cut off
                    known[place_of(row)] = row
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    return [known[*which, prompt] for which in samples for prompt in range(len(ids))]


def place_of(row: Row) -> tuple[float, int, int]:
    """Temperature, sample and prompt of a row: there is one of each."""
    return row["temperature"], row["sample"], row["prompt"]


def _sampled(
    model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int, temperature: float, seed: str
) -> list[Row]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    sampler = CompletionSampler(model, tokenizer, max_new_tokens=new_tokens, sampling=sampling)
    drawn = random.Random(seed).getrandbits(32) if temperature else None  # noqa: S311 - no secret
    return sampler.complete(prompts, seed=drawn)


def read_rows(file: Path, *, continued: bool = False) -> list[Row]:
    """Read the whole lines of a JSONL file, if it is there; one that is `continued` loses a last line that is not."""
    content = file.read_bytes() if file.exists() else b""
    whole, rows = content.rfind(b"\n") + 1, []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no JSON object: {error}. Remove the line, or the file."
            ) from error
    if continued and whole < len(content):
        os.truncate(file, whole)
    return rows
