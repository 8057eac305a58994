"""Tasks of lm-eval (EleutherAI's harness) on the model that is there."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hbat.config.fields import nearest
from hbat.ppo.networks.token_model import evaluating

#: Metrics by which a task is known, the first one that it has.
_HEADLINES = ("exact_match", "acc", "acc_norm", "f1", "bleu", "word_perplexity")
#: Of the draws of few-shot examples, as lm-eval's own default.
_SEED = 1234


class Tasks:
    """Tasks by name or YAML file, loaded once.

    Args:
        names: Names of tasks, or files.
        limit: Number of documents of each; None for all.
        batch_size: Sequences of a forward pass.

    Attributes:
        names: Names of the tasks, and of their groups.
        lower: Metrics of which lower values are better.

    Raises:
        ImportError: If lm-eval is missing.
        ValueError: If a task is unknown, or its data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], limit: int | None, batch_size: int) -> None:
        try:
            from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an optional extra, and slow
        except ImportError as error:
            raise ImportError("`tasks` requires lm-eval. Install it with `pip install 'hbat-trl[eval]'`.") from error
        self._limit, self._batch_size = limit, batch_size
        self.lower: set[tuple[str, str]] = set()
        with _quiet():
            manager: Any = TaskManager()
            try:
                self._loaded = manager.load(list(names))
            except Exception as error:  # a task may raise anything while it is read
                unknown = [name for name in names if name not in manager.all_tasks]
                hints = "".join(nearest(name, manager.all_tasks) for name in unknown)
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"`tasks` is {list(names)}, which cannot be loaded: {reason}.{hints}") from error
        self.names = [*self._loaded["tasks"], *self._loaded["groups"]]
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(_SEED)

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        """Score a model: by task its metrics, those of a filter as `metric_filter`, and standard errors."""
        from lm_eval import evaluate  # noqa: PLC0415 - an optional extra
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - an optional extra

        with _quiet(), evaluating(model), torch.no_grad():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)
            found: Any = evaluate(wrapped, self._loaded, limit=self._limit, log_samples=False)
        for name, metrics in found.get("higher_is_better", {}).items():
            self.lower |= {(name, metric) for metric, higher in metrics.items() if higher is False}
        return {name: _plain(values) for name, values in found["results"].items()}

    def is_lower_better(self, name: str, metric: str) -> bool:
        """Whether lower values of a task's metric are better, as the task says."""
        return any(name == task and metric.startswith(lower) for task, lower in self.lower)


@contextmanager
def _quiet() -> Iterator[None]:
    # lm-eval tells of each step, and draws from global states.
    log, drawn = logging.getLogger("lm_eval"), random.getstate()
    of_numpy = np.random.get_state()  # noqa: NPY002 - the state that lm-eval draws from
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        log.setLevel(level)
        random.setstate(drawn)
        np.random.set_state(of_numpy)  # noqa: NPY002 - as above


def _plain(values: Any) -> dict[str, float]:
    scores = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and chosen:
            scores[metric if chosen == "none" else f"{metric}_{chosen}"] = float(value)
    return scores


def headline_of(scores: Sequence[str]) -> str:
    """The metric by which a task is known."""
    known = [name for start in _HEADLINES for name in scores if name == start or name.startswith(f"{start}_")]
    return next((name for name in known if "stderr" not in name), next(iter(scores), "acc"))
