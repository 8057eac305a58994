"""How far a run is: a bar in a terminal, lines elsewhere, and `progress.json`, which `hbat status` reads."""

import builtins
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.reports.costs import duration
from hbat.reports.files import PROGRESS_FILE
from hbat.state.clock import peak_memory
from hbat.state.plan import Stage

_FILE_EVERY = 2.0  # seconds
_LINE_EVERY = 60.0  # seconds, where there is no bar
_SMOOTHING = 0.8  # weight of the earlier losses in the one that is shown
_BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}"
#: What trainers log that says more than their loss: the first that one logs is shown, by this name.
_TELLING = {"rewards/accuracies": "accuracy", "reward": "reward", "mean_token_accuracy": "token accuracy"}


class StageProgress:
    """How far one stage is, and how fast; `done` are its optimizer steps that another process has done."""

    def __init__(self, stage: Stage, done: int, steps: int) -> None:
        self.stage, self.done, self.steps = stage, done, steps
        self._first = done
        self._seconds, self._since = 0.0, time.perf_counter()
        self._loss: float | None = None
        self._parts: list[str] = []
        self._tokens, self._seconds_at_tokens = 0.0, 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per optimizer step, without those of `pause`; None before the first."""
        return self._seconds / (self.done - self._first) if self.done > self._first else None

    def step(self, done: int) -> None:
        """Count the seconds until now as training."""
        self.done = done
        self._seconds += time.perf_counter() - self._since
        self.pause()

    def pause(self) -> None:
        """Do not count the seconds until now, of evaluating or saving, as training."""
        self._since = time.perf_counter()

    def note(self, logs: Mapping[str, Any]) -> None:
        """Take what is shown out of an entry of the trainer's log."""
        found = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        found = {key: value for key, value in found.items() if math.isfinite(value)}  # users' trainers log anything
        if (loss := found.get("loss")) is None:
            return
        self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        self._parts = [f"loss {self._loss:.3f}"]
        self._parts += [f"{name} {found[key]:.2f}" for key, name in _TELLING.items() if key in found][:1]
        if penalty := found.get("ewc/penalty"):
            self._parts.append(f"penalty {100 * penalty / (abs(loss) + penalty):.0f} %")
        tokens, seconds = found.get("num_tokens", 0.0), self._seconds - self._seconds_at_tokens
        if tokens and seconds > 0:
            if self._tokens:  # the first count may be from before a resume
                self._parts.append(f"{tqdm.format_sizeof((tokens - self._tokens) / seconds)} tokens/s")
            self._tokens, self._seconds_at_tokens = tokens, self._seconds

    def shown(self, left: tuple[float, float] | None, width: float = math.inf) -> str:
        """Say how far the stage is, with the seconds that are left of it and of the run if they are known.

        What does not fit into the width, in characters, is dropped from the end.
        """
        times = [] if left is None else [f"{duration(left[0])} left, of the run {duration(left[1])}"]
        parts = [f"{self.done}/{self.steps}", *times, *self._parts, f"{peak_memory():.1f} GiB"]
        ends = itertools.accumulate(len(part) + len(", ") for part in parts)
        return ", ".join(part for part, end in zip(parts, ends, strict=True) if end - len(", ") <= width)


def redraws() -> bool:
    """Whether a bar can be drawn: in a terminal and in a notebook."""
    return sys.stderr.isatty() or hasattr(builtins, "get_ipython")  # a notebook's stderr is no terminal


class Progress:
    """Shows and writes how far a run is.

    Args:
        folder: Folder of the run; None on processes that do not write.
        done: Optimizer steps of the run that are done.
        total: Estimate of all its steps.
        shows: Whether this process shows it.
    """

    def __init__(self, folder: Path | None, done: int, total: int, *, shows: bool) -> None:
        self._file = None if folder is None else folder / PROGRESS_FILE
        self._shows = shows
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (shows and redraws()),
            dynamic_ncols=True,
            unit="step",
            bar_format=_BAR,
        )
        self._written = self._said = 0.0
        self._known: dict[str, float] = {}  # seconds per step of an objective's last stage
        self._later: Mapping[str, int] = {}
        self._before = done

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._shows and text:
            tqdm.write(text, file=sys.stderr)

    def stage_begins(self, at: StageProgress, *, before: int, later: Mapping[str, int]) -> None:
        """Show the beginning of a stage; `before` are the steps of the run before it, `later` those after it."""
        self._before, self._later = before, later
        self._bar.total = before + at.steps + sum(later.values())
        self.show(at)

    def show(self, at: StageProgress) -> None:
        """Show how far the stage is."""
        now, ends = time.perf_counter(), at.done in {0, at.steps}
        title = f"round {at.stage.round}/{at.stage.last_round} {at.stage.objective}"
        left = None if ends else self._seconds_left(at)
        shown = at.shown(left)
        self._bar.n = self._before + at.done
        self._bar.set_description_str(title, refresh=False)
        columns = self._bar.format_dict["ncols"] or math.inf
        room = columns - len(f"{title} 100%|{'':10}| {self._bar.n}/{self._bar.total}, ")
        self._bar.set_postfix_str(at.shown(left, room), refresh=False)
        self._bar.refresh() if ends else self._bar.update(0)
        if self._bar.disable and (at.done == 0 or now - self._said > _LINE_EVERY):
            self._said = now
            self.say(f"{title}: {shown}")
        if ends or now - self._written > _FILE_EVERY:
            self._write(f"{title}: {shown}", stage=at.stage.index)
        if at.done == at.steps and at.seconds_per_step is not None:
            self._known[at.stage.objective] = at.seconds_per_step

    def _seconds_left(self, at: StageProgress) -> tuple[float, float] | None:
        # Of stage and run; of training alone.
        own = at.seconds_per_step or self._known.get(at.stage.objective)
        if own is None:
            return None
        left = own * (at.steps - at.done)
        return left, left + sum(self._known.get(name, own) * steps for name, steps in self._later.items())

    def between(self, doing: str) -> None:
        """Show what the run does between its stages."""
        self._bar.set_description_str(doing, refresh=False)
        self._bar.set_postfix_str("")
        self._write(doing)

    def _write(self, doing: str, **more: Any) -> None:
        self._written = time.perf_counter()
        if self._file is None:
            return
        # Not by `state.files`: it comes every few seconds, and is worth no waiting for the disk.
        temporary = self._file.with_name(self._file.name + ".tmp")
        values = {"doing": doing, "process": os.getpid(), "time": time.time(), **more}
        try:
            temporary.write_text(json.dumps(values), encoding="utf-8")
            temporary.replace(self._file)
        except OSError:  # a full disk stops the run where something would be lost
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """End the bar, and remove the file: the state says what is done."""
        self._bar.set_description_str("done" if self._bar.n == self._bar.total else "stopped", refresh=False)
        self._bar.close()
        with suppress(OSError):
            if self._file is not None:
                self._file.unlink(missing_ok=True)


class EvaluationBar(TrainerCallback):
    """Shows how far an evaluation of an objective between stages is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch."""
        if self._bar is None:
            total = None if eval_dataloader is None else len(eval_dataloader)
            shown = state.is_local_process_zero and redraws()
            self._bar = tqdm(
                total=total, desc=f"evaluating {self._name}", leave=False, unit="batch", disable=not shown
            )
        self._bar.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
