"""Completions of a few prompts after every stage: a loss says that it worked, the text says whether it did."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hbat.config.fields import shown
from hbat.config.hbat import HBATConfig
from hbat.data.formats import prompt_faults, shared_beginning
from hbat.data.sources import load_rows
from hbat.data.turns import answer_start
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import give_back, is_sharded
from hbat.objectives.track import Track
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import completion_texts, context_length, prompt_tokens
from hbat.reports.files import COMPLETIONS_FILE
from hbat.reports.record import read_completions
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
    asked = chosen_prompts(config.sample_prompts, tracks)
    args = next(iter(tracks)).args
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return Completions(asked, model, tokenizer, Path(config.output_dir), config.seed, dtype)


class Asked(NamedTuple):
    """A prompt, and what the chat template takes beside it."""

    prompt: Any
    options: Mapping[str, Any]


def chosen_prompts(given: Any, tracks: Sequence[Track]) -> list[Asked]:
    """Prompts to complete, each once: given ones, or those of the first rows of every evaluation set.

    Args:
        given: `sample_prompts` of the configuration.
        tracks: The tracks of the run.

    Raises:
        DatasetError: If a file of prompts cannot be read.
        ValueError: If there are none.
    """
    if isinstance(given, int):
        sets: list[Any] = [track.eval_dataset for track in tracks if track.eval_dataset is not None]
        rows = [row for rows in sets for row in rows.select(range(min(given, len(rows))))]
    elif isinstance(given, list | tuple):
        rows = [{"prompt": prompt} for prompt in given]
    else:
        rows = list(load_rows(given, name="`sample_prompts`", check=prompt_faults)[0].dataset)
    asked = [Asked(prompt_of(row), _template_options(row)) for row in rows]
    found = {json.dumps(ask, default=str): ask for ask in asked if ask.prompt}
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


def _template_options(row: Mapping[str, Any]) -> Mapping[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str):  # as TRL takes them too
        tools = json.loads(tools)
    return {**(row.get("chat_template_kwargs") or {}), **({"tools": tools} if tools else {})}


class Completions:
    """Completes the same prompts after every stage, with the same seed, and keeps the texts in `completions.jsonl`.

    Args:
        asked: The prompts.
        model: The model.
        tokenizer: Its tokenizer.
        folder: The run's folder.
        seed: Seed of the sampling.
        dtype: In which the stages compute; None: that of the weights.

    Raises:
        ValueError: If a prompt cannot be tokenized, or leaves no room for a completion in the model's context.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        model: Any,
        tokenizer: Any,
        folder: Path,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._asked = asked
        self.count = len(asked)
        self._tokens = [_tokens(number, ask, tokenizer) for number, ask in enumerate(asked)]
        self._model, self._tokenizer, self._seed, self._dtype = model, tokenizer, seed, dtype
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
        with torch.autocast(self._model.device.type, self._dtype, enabled=self._dtype is not None):
            found = sampler.sample(self._tokens, seed=self._seed)
        give_back(self._model)
        texts = completion_texts(self._tokenizer, self._tokens, found.tokens)
        rows = [
            {**place, "prompt": ask.prompt, "completion": text, "tokens": len(tokens), "ended": ended}
            for ask, text, tokens, ended in zip(self._asked, texts, found.tokens, found.ended, strict=True)
        ]
        if not is_main_process():
            return []
        earlier = [row for row in read_completions(self._file.parent) if row["stage"] < place["stage"]]
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in (*earlier, *rows)]
        write_bytes(self._file, "".join(lines).encode())
        return rows


def _tokens(number: int, asked: Asked, tokenizer: Any) -> list[int]:
    try:
        if tokens := prompt_tokens(asked.prompt, tokenizer, asked.options):
            return tokens
        problem: object = "it is empty"
    except Exception as error:  # noqa: BLE001 - chat templates raise anything
        problem = error
    raise ValueError(f"`sample_prompts`, prompt {number}: {problem}. It is {shown(asked.prompt)}.")
