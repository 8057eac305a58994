"""Completions of a few prompts after every stage: a loss says that it worked, the text says whether it did."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbat.config.fields import shown
from hbat.config.hbat import HBATConfig
from hbat.data.formats import prompt_faults, shared_beginning
from hbat.data.sources import load_rows
from hbat.data.turns import answer_start
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import give_back, is_sharded
from hbat.objectives.track import Track
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import context_length, prompt_tokens
from hbat.reports.record import COMPLETIONS_FILE, read_completions
from hbat.state.files import write_bytes

_NEW_TOKENS = 128
_BATCH_SIZE = 8
#: As in the paper's evaluation.
_SAMPLING = {"do_sample": True, "temperature": 0.75, "top_k": 0}


def prepare_completions(
    config: HBATConfig, tracks: Sequence[Track], model: Any, tokenizer: Any
) -> "Completions | None":
    """Prepare what `sample_prompts` asks for; None if it is not set."""
    if config.sample_prompts is None:
        return None
    prompts = chosen_prompts(config.sample_prompts, tracks)
    return Completions(prompts, model, tokenizer, Path(config.output_dir), config.seed)


def chosen_prompts(given: Any, tracks: Sequence[Track]) -> list[Any]:
    """Prompts to complete, each once: given ones, or the first rows of every evaluation set.

    Args:
        given: `sample_prompts` of the configuration.
        tracks: The tracks of the run.

    Raises:
        DatasetError: If a file of prompts cannot be read.
        ValueError: If there are none.
    """
    if isinstance(given, int):
        sets: list[Any] = [track.eval_dataset for track in tracks if track.eval_dataset is not None]
        prompts = [prompt_of(row) for rows in sets for row in rows.select(range(min(given, len(rows))))]
    elif isinstance(given, list):
        prompts = given
    else:
        prompts = list(load_rows(given, name="`sample_prompts`", check=prompt_faults)[0].dataset["prompt"])
    found = {json.dumps(prompt, default=str): prompt for prompt in prompts if prompt}
    if not found:
        raise ValueError(
            f"`sample_prompts` is {shown(given)}, but there are no prompts. Give a file or a list of them, or "
            "evaluation rows (`eval_dataset`, in YAML `eval_datasets`) that have prompts."
        )
    return list(found.values())


def prompt_of(row: Mapping[str, Any]) -> Any:
    """Prompt of a row in one of TRL's formats, a text or messages; None for a text without one."""
    if row.get("prompt"):
        return row["prompt"]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen[: shared_beginning(chosen, rejected)]
    turns = row.get("messages") or chosen
    return turns[: answer_start(turns)] if isinstance(turns, list) and turns else None


class Completions:
    """Completes the same prompts after every stage, with the same seed, and keeps the texts in `completions.jsonl`.

    Args:
        prompts: Texts or conversations.
        model: The model.
        tokenizer: Its tokenizer.
        folder: The run's folder.
        seed: Seed of the sampling.

    Raises:
        ValueError: If a prompt cannot be tokenized, or leaves no room for a completion in the model's context.
    """

    def __init__(self, prompts: Sequence[Any], model: Any, tokenizer: Any, folder: Path, seed: int) -> None:
        self._prompts = prompts
        self._tokens = [_tokens(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._file = folder / COMPLETIONS_FILE
        room = context_length(model.config)
        longest = max(map(len, self._tokens))
        if room is not None and longest >= room:
            raise ValueError(
                f"`sample_prompts` has a prompt of {longest} tokens, which fills the model's context of {room}. "
                "Shorten it."
            )
        self._new_tokens = _NEW_TOKENS if room is None else min(_NEW_TOKENS, room - longest)

    def take(self, place: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Complete the prompts with the model as it is. Collective where it is sharded.

        Args:
            place: `stage`, `round` and `objective` of the last stage, as in a row of the forgetting matrix.

        Returns:
            A row for each prompt: `prompt`, `completion`, `tokens`, `ended` and the place; none on other processes
            than the main one.
        """
        sharded = is_sharded(self._model)
        if not (is_main_process() or sharded):
            return []
        sampler = CompletionSampler(
            self._model,
            self._tokenizer,
            max_new_tokens=self._new_tokens,
            sampling=_SAMPLING,
            batch_size=_BATCH_SIZE,
        )
        found = sampler.sample(self._tokens, seed=self._seed)
        give_back(self._model)
        texts = self._tokenizer.batch_decode(found.tokens, skip_special_tokens=True)
        rows = [
            {**place, "prompt": prompt, "completion": text, "tokens": len(tokens), "ended": ended}
            for prompt, text, tokens, ended in zip(self._prompts, texts, found.tokens, found.ended, strict=True)
        ]
        if not is_main_process():
            return []
        earlier = [row for row in read_completions(self._file.parent) if row["stage"] < place["stage"]]
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in (*earlier, *rows)]
        write_bytes(self._file, "".join(lines).encode())
        return rows


def _tokens(number: int, prompt: Any, tokenizer: Any) -> list[int]:
    try:
        if tokens := prompt_tokens(prompt, tokenizer, {}):
            return tokens
        problem: object = "it is empty"
    except Exception as error:  # noqa: BLE001 - chat templates raise anything
        problem = error
    raise ValueError(f"`sample_prompts`, prompt {number}: {problem}. It is {shown(prompt)}.")
