"""A run as its folder holds it, for reports: read without a model, also while it trains or after it was killed."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hbat.reports.files import (
    COMPLETIONS_FILE,
    EVAL_FOLDER,
    FRONT_FILE,
    FRONT_PLOT_FILE,
    LOG_FILE,
    PLOT_FILE,
    RUN_FILE,
    SCORES_FILE,
)
from hbat.reports.front import Front
from hbat.reports.matrix import ForgettingMatrix
from hbat.state.folder import RunFolder
from hbat.state.history import TENSORS
from hbat.state.manifest import DamagedStateError, RunState, RunStateError
from hbat.state.plan import Stage

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"\.(\d+)\.")
#: Keys of a row of completions.
_COMPLETION = {"stage", "prompt", "completion", "tokens", "ended"}
#: Parts of a parameter's name that say nothing about its place.
_SILENT = re.compile(r"weight|bias|default|base_layer|lora_.*|\d+")


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of it.

    Attributes:
        folder: The folder.
        state: The newest state.
        log: The log.
        matrix: The forgetting matrix; without scores, one without objectives.
        front: The front, if it was measured.
        completions: Rows of `completions.jsonl`.
        run_file: Text of `run.yaml`; empty for a run that was started from Python.
    """

    folder: Path
    state: RunState
    log: list[dict[str, Any]]
    matrix: ForgettingMatrix
    front: Front | None
    completions: list[dict[str, Any]]
    run_file: str

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Read it.

        Raises:
            RunStateError: If the folder holds no run.
        """
        state = _newest(folder)
        scores = _read(folder / SCORES_FILE, headline=dict)
        front = _read(folder / FRONT_FILE, headline=dict, rows=list, better=dict)
        matrix = ForgettingMatrix(
            scores.get("headline", {}), better=scores.get("better", {}), counts=scores.get("counts", {})
        )
        if scores:
            matrix.take_rows(state.evaluations)
        else:  # all rows are of the runs that this one continues
            matrix.rows = state.evaluations
        return cls(
            folder=folder,
            state=state,
            log=_read(folder / LOG_FILE, log_history=list).get("log_history", []),
            matrix=matrix,
            front=Front(front["headline"], front["rows"], front["better"]) if front else None,
            completions=read_completions(folder),
            run_file=_text(folder / RUN_FILE),
        )

    @property
    def stages_done(self) -> list[Stage]:
        """The stages that are done."""
        return [stage for stage in self.state.plan if stage.index < self.state.next_stage]

    @property
    def is_finished(self) -> bool:
        """Whether all stages are done."""
        return len(self.stages_done) == len(self.state.plan)

    @property
    def costs(self) -> dict[int, dict[str, Any]]:
        """Costs of the stages that are done, by index."""
        return {cost["stage"]: cost for cost in self.state.costs if "objective" in cost}

    def spans(self) -> list[tuple[str, float, float]]:
        """Objective, first and last step of every stage that is done."""
        spans, before = [], 0
        for stage in self.stages_done:
            steps = self.costs.get(stage.index, {}).get("steps", 0)
            spans.append((stage.objective, float(before), float(before + steps)))
            before += steps
        return spans

    def importance(self) -> dict[str, dict[tuple[int, str], float]]:
        """Share of each objective's importance by layer (-1: outside of layers) and module."""
        found = {}
        for kind, name in self.state.files.items():
            what, _, objective = kind.partition("-")
            file = self.folder / TENSORS / name
            if what == "importance" and file.is_file():
                found[objective] = _shares(file)
        return found


def _newest(folder: Path) -> RunState:
    """The newest state that is whole, as a run would resume from it."""
    damage: RunStateError | None = None
    states = RunFolder(folder).states()
    while True:
        try:
            return next(states)
        except StopIteration:
            raise damage or RunStateError(f"{str(folder)!r} holds no run.") from None
        except DamagedStateError as error:
            damage = damage or error


def _shares(file: Path) -> dict[tuple[int, str], float]:
    # Of what the penalty counts: no share is negative. One tensor is in memory at a time.
    sums: defaultdict[tuple[int, str], float] = defaultdict(float)
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            layer, parts = _LAYER.search(name), name.split(".")
            module = next((part for part in reversed(parts) if not _SILENT.fullmatch(part)), name)
            sums[int(layer[1]) if layer else -1, module] += float(tensors.get_tensor(name).clamp(min=0).sum())
    whole = sum(sums.values()) or 1.0
    return {place: value / whole for place, value in sums.items()}


def read_completions(folder: Path) -> list[dict[str, Any]]:
    """Read the completions of a run's folder; none if there are none."""
    try:
        with (folder / COMPLETIONS_FILE).open(encoding="utf-8") as lines:  # `splitlines` cuts at more
            rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict) and row.keys() >= _COMPLETION]


def forget_results(folder: Path) -> None:
    """Remove what an earlier run has left in the folder beside its state, so that nothing shows it as this run's."""
    for name in (SCORES_FILE, PLOT_FILE, FRONT_FILE, FRONT_PLOT_FILE, COMPLETIONS_FILE):
        (folder / name).unlink(missing_ok=True)
    for completions in (folder / EVAL_FOLDER).glob(f"*/{COMPLETIONS_FILE}"):  # not what a judge was paid for
        completions.unlink()


def refuse_other_results(folder: Path) -> None:
    """Refuse a folder without a run whose scores are of something else, which a run would overwrite.

    Raises:
        RunStateError: If there are such.
    """
    file = folder / SCORES_FILE
    if (values := _read(file)) and "rows" not in values:
        raise RunStateError(
            f"{file} holds scores that are of no run, such as those of `hbat eval`. Set another `output_dir`, or move "
            "the file."
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _read(file: Path, **expected: type) -> Mapping[str, Any]:
    """Read a JSON file's values; none if it is not there, or damaged, or has other ones."""
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return values if all(isinstance(values.get(key), kind) for key, kind in expected.items()) else {}
