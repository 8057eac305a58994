"""`hbat status`: how far a run is, from its folder alone, while it trains or afterwards."""

import json
import time
from pathlib import Path

from rich.table import Table

from hbat.cli.output import Output, number_table
from hbat.reports.costs import duration, tokens_per_second
from hbat.reports.files import PROGRESS_FILE
from hbat.reports.matrix import headline_cells, headline_columns
from hbat.reports.record import RunRecord
from hbat.state.lock import is_held


def print_status(folder: Path) -> None:
    """Print the stages of a run with their cost and scores, and what it does now.

    Raises:
        RunStateError: If the folder holds no run.
    """
    record, output = RunRecord.read(folder), Output()
    output.table(_table(record))
    output.print(_now(record))


def _table(record: RunRecord) -> Table:
    matrix, state = record.matrix, record.state
    table = number_table("stage", "steps", "time", "tokens/s", "GiB", *headline_columns(matrix))
    scores = {row["stage"]: headline_cells(matrix, row["scores"]) for row in state.evaluations if "run" not in row}
    table.add_row("start", "", "", "", "", *scores.get(state.first_stage - 1, ()))
    for stage in state.plan:
        label, cost = f"round {stage.round}: {stage.objective}", record.costs.get(stage.index)
        if cost is None:
            table.add_row(label, style="dim")
            continue
        rate = tokens_per_second(cost)
        cells = [f"{cost['steps']}", duration(cost["seconds"]), "" if rate is None else f"{rate:,.0f}"]
        table.add_row(label, *cells, f"{cost['peak_gib']:.1f}", *scores.get(stage.index, ()))
    return table


def _now(record: RunRecord) -> str:
    if is_held(record.folder):
        try:
            place = json.loads((record.folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "A process holds the run's folder; it does not train yet."
        written = time.strftime("%X", time.localtime(place["time"]))
        return f"Now ({written}, process {place['process']}): {place['doing']}"
    planned, done = len(record.state.plan), len(record.stages_done)
    if done < planned:
        left = f"{planned - done} of {planned} stages are left"
        return f"Interrupted: {left}. Resume with `hbat train --config FILE --resume`."
    if not any((record.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "All stages are trained, but no model is saved. `hbat train --config FILE --resume` ends the run."
    return "Finished."
