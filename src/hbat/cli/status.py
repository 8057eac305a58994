"""`hbat status`: how far a run is, from its folder alone, while it trains or afterwards."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hbat.reports.costs import duration, tokens_per_second
from hbat.reports.progress import PROGRESS_FILE
from hbat.reports.scores import SCORES_FILE
from hbat.state.folder import RunFolder
from hbat.state.manifest import RunState, RunStateError


def print_status(path: Path) -> None:
    """Print the stages of a run with their cost and scores, and what it does now.

    Raises:
        RunStateError: If the folder holds no run.
    """
    folder = RunFolder(path)
    state = next(folder.states(), None)
    if state is None:
        raise RunStateError(f"{str(path)!r} holds no run.")
    console = Console(soft_wrap=True)
    console.print(_table(state, _read(path / SCORES_FILE).get("headline", {})))
    console.print(_now(folder, state), highlight=False)


def _table(state: RunState, headline: dict[str, str]) -> Table:
    table = Table(title_justify="left")
    for index, column in enumerate(("stage", "steps", "time", "tokens/s", "GiB")):
        table.add_column(column, justify="right" if index else "left")
    for name, metric in headline.items():
        table.add_column(f"{name} {metric}", justify="right")
    costs = {cost["stage"]: cost for cost in state.costs if "objective" in cost}
    scores = {row["stage"]: row["scores"] for row in state.evaluations if "run" not in row}

    def cells(stage: int) -> list[str]:
        values = [scores.get(stage, {}).get(name, {}).get(metric) for name, metric in headline.items()]
        return ["" if value is None else f"{value:.4f}" for value in values]

    table.add_row("start", "", "", "", "", *cells(state.first_stage - 1))
    for stage in state.plan:
        label, cost = f"round {stage.round}: {stage.objective}", costs.get(stage.index)
        if cost is None:
            table.add_row(label, style="dim")
            continue
        rate = tokens_per_second(cost)
        speed = "" if rate is None else f"{rate:,.0f}"
        table.add_row(
            label, f"{cost['steps']}", duration(cost["seconds"]), speed, f"{cost['peak_gib']:.1f}", *cells(stage.index)
        )  # fmt: skip
    return table


def _now(folder: RunFolder, state: RunState) -> str:
    left, place = len(state.plan) - (state.next_stage - state.first_stage), _read(folder.path / PROGRESS_FILE)
    try:
        with folder.locked():
            running = False
    except RunStateError:
        running = True
    if running and place:
        return (
            f"Now ({time.strftime('%X', time.localtime(place['time']))}, process {place['process']}): {place['doing']}"
        )
    if running:
        return "A process holds the run's folder; it has not begun to train."
    if left:
        return f"Interrupted: {left} of {len(state.plan)} stages are left. Continue with `hbat train --resume`."
    return "Finished."


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # not there, or being replaced
        return {}
