"""Completions of a few prompts after every stage: a loss says that it worked, the text says whether it did."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbat.config.fields import shown
from hbat.data.formats import prompt_faults
from hbat.data.sources import load_rows
from hbat.engines.processes import is_main_process
from hbat.engines.sharded import give_back, is_sharded
from hbat.evaluation.completions import prompt_ids
from hbat.evaluation.rows import Asked, asked
from hbat.objectives.track import Track
from hbat.ppo.rollouts.generation import CompletionSampler
from hbat.ppo.rollouts.prompts import context_length
from hbat.reports.files import COMPLETIONS_FILE
from hbat.reports.record import read_completions
from hbat.state.files import write_bytes

_NEW_TOKENS = 128
_BATCH_SIZE = 8
#: As in the paper's evaluation.
_SAMPLING = {"do_sample": True, "temperature": 0.75, "top_k": 0}


def chosen_prompts(given: Any, tracks: Sequence[Track]) -> list[Asked]:
    """Prompts to complete, each once: those of `sample_prompts`, or of the first rows of every evaluation set.

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
    prompts = [asked(row)._replace(reference=None) for row in rows]
    found = {json.dumps(ask, default=str): ask for ask in prompts if ask.prompt}
    if not found:
        raise ValueError(
            f"`sample_prompts` is {shown(given)}, but there are no prompts. Give a file or a list of them, or "
            "evaluation rows (`eval_dataset`, in YAML `eval_datasets`) that have prompts."
        )
    return list(found.values())


class Completions:
    """Completes the same prompts after every stage, with the same seed; the run's folder has the texts.

    Raises:
        ValueError: If a prompt cannot be tokenized, or leaves no room for a completion in the model's context.
    """

    def __init__(self, prompts: Sequence[Asked], model: Any, tokenizer: Any, folder: Path, seed: int) -> None:
        self._asked = prompts
        self.count = len(prompts)
        self._tokens = prompt_ids(prompts, model, tokenizer, name="`sample_prompts`", new_tokens=1)
        self._model, self._tokenizer, self._seed = model, tokenizer, seed
        self._file = folder / COMPLETIONS_FILE
        room, longest = context_length(model.config), max(map(len, self._tokens))
        self._new_tokens = _NEW_TOKENS if room is None else min(_NEW_TOKENS, room - longest)

    def take(self, place: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Complete the prompts with the model as it is, in the caller's autocast. Collective where it is sharded.

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
        found = sampler.complete(self._tokens, seed=self._seed)
        give_back(self._model)
        rows = [
            {**place, "prompt": ask.prompt, "completion": row["text"], "tokens": row["tokens"], "ended": row["ended"]}
            for ask, row in zip(self._asked, found, strict=True)
        ]
        if not is_main_process():
            return []
        earlier = [row for row in read_completions(self._file.parent) if row["stage"] < place["stage"]]
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in (*earlier, *rows)]
        write_bytes(self._file, "".join(lines).encode())
        return rows
