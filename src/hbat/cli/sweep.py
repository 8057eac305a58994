"""`hbat sweep`: trains a run file with every combination of some values, one after the other."""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from hbat.cli.run_file import RunFile, parse, parse_overrides
from hbat.model.load import is_adapter
from hbat.reports.files import SWEEP_FILE, SWEEP_PLOT_FILE
from hbat.reports.matrix import ForgettingMatrix, directions
from hbat.reports.plots import draw_sweep
from hbat.reports.record import RunRecord
from hbat.state.files import write_json
from hbat.state.folder import RunFolder


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its values by key, its folder, and its scores at the end."""

    values: dict[str, Any]
    folder: Path
    matrix: ForgettingMatrix


def sweep(file: str, run: RunFile, axes: Sequence[str], words: Sequence[str]) -> list[Point]:
    """Train all combinations, each in a process of its own and a folder below `output_dir`; finished ones are read.

    Args:
        file: The run file.
        run: The run that it describes.
        axes: `KEY=VALUE,VALUE` of each key.
        words: Further values, as on the command line.

    Raises:
        ValueError: If a key or value is none of a run.
        RuntimeError: If a run fails; those before it are kept.
    """
    keys, columns = zip(*map(_axis, axes), strict=True)
    if len(set(keys)) < len(keys):
        raise ValueError(f"`--set` names a key twice: {', '.join(keys)}.")
    whole = Path(run.config.output_dir)
    jobs = []
    for values in itertools.product(*columns):
        own = dict(zip(keys, values, strict=True))
        folder = whole / ",".join(f"{key}={_text(value)}" for key, value in own.items()).replace("/", "_")
        options = [*words, *(f"--{key}={_text(value)}" for key, value in own.items()), f"--output_dir={folder}"]
        parse(file, parse_overrides(options))  # all of them before the first one trains
        jobs.append((own, folder, options))
    points = []
    for number, (own, folder, options) in enumerate(jobs, start=1):
        Console(stderr=True).print(f"{number} of {len(jobs)}: {folder.name}", highlight=False)
        _train(file, folder, options)
        points.append(Point(own, folder, RunRecord.read(folder).matrix))
    _write(whole, keys, points)
    return points


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    found = yaml.safe_load(f"[{values}]") if equals else None
    if not key or not found:
        raise ValueError(f"`--set` is {text!r}; write a key and its values, as `--set num_rounds=1,2,4`.")
    return key.replace("-", "_"), found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _train(file: str, folder: Path, options: Sequence[str]) -> None:
    saved = is_adapter(folder) or (folder / "config.json").is_file()
    if saved and RunFolder(folder).holds_run() and RunRecord.read(folder).is_finished:
        return
    command = [sys.executable, "-m", "hbat", "train", "--config", file, "--resume", *options]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:  # noqa: S603 - this program
        raise RuntimeError(
            f"The run in {folder} failed; see above. The same command goes on with it, once that is mended."
        )


def _write(folder: Path, keys: Sequence[str], points: Sequence[Point]) -> None:
    rows = [{"values": point.values, "scores": dict(point.matrix.end)} for point in points]
    write_json(folder / SWEEP_FILE, {"keys": list(keys), "rows": rows})
    draw_sweep([(list(point.values.values()), point.matrix) for point in points], keys, folder / SWEEP_PLOT_FILE)


def print_sweep(points: Sequence[Point], folder: Path) -> None:
    """Print each objective's headline score at the end of every run, and the paths of the results."""
    console, matrix = Console(soft_wrap=True), points[0].matrix
    table = Table(title=f"At the end of each run ({directions(matrix)})", title_justify="left")
    for key in points[0].values:
        table.add_column(key, justify="right")
    for name, metric in matrix.headline.items():
        table.add_column(f"{name} {metric}", justify="right")
    for point in points:
        ends = [point.matrix.end.get(name, {}).get(metric) for name, metric in point.matrix.headline.items()]
        cells = ("" if value is None else f"{value:.4f}" for value in ends)
        table.add_row(*map(_text, point.values.values()), *cells)
    console.print(table)
    for label, name in (("Scores", SWEEP_FILE), ("Plot", SWEEP_PLOT_FILE)):
        if (folder / name).is_file():
            console.print(f"{label + ':':8}{(folder / name).absolute()}", highlight=False)
