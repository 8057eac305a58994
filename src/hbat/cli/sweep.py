"""`hbat sweep`: trains a run file with every combination of some values, one after the other."""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbat.cli.output import Output, number_table
from hbat.cli.run_file import RunFile, as_it_runs, parse, parse_overrides
from hbat.cli.yaml import PlainYAMLError, load_yaml
from hbat.model.load import is_adapter
from hbat.reports.files import SWEEP_FILE, SWEEP_PLOT_FILE
from hbat.reports.matrix import ForgettingMatrix, directions, headline_cells, headline_columns
from hbat.reports.plots import draw_sweep
from hbat.reports.record import RunRecord
from hbat.state.files import write_json
from hbat.state.folder import RunFolder


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its values by key, and its scores at the end."""

    values: dict[str, Any]
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
    held_out = any(isinstance(data, Mapping) and data.get("eval_split") for data in run.datasets.values())
    if not (run.eval_datasets or run.config.evaluation or held_out):
        raise ValueError(
            "A sweep compares scores: give the run `eval_datasets`, an `eval_split` of its data, or `evaluation`."
        )
    whole, jobs = Path(run.config.output_dir), {}
    for values in itertools.product(*columns):
        own = dict(zip(keys, values, strict=True))
        name = re.sub(r"[^\w.=,+-]", "_", ",".join(f"{key}={_text(value)}" for key, value in own.items()))
        if name in jobs:
            raise ValueError(f"`--set` has values that share the folder {name!r}. Leave one of them out.")
        given = {**own, "output_dir": str(whole / name)}
        options = [*words, *(f"--{key}={json.dumps(value)}" for key, value in given.items())]
        parse(file, parse_overrides(options))  # all of them before the first one trains
        jobs[name] = own, options
    points = []
    for number, (name, (own, options)) in enumerate(jobs.items(), start=1):
        Output(stderr=True).print(f"{number} of {len(jobs)}: {name}")
        _train(file, whole / name, options)
        points.append(Point(own, RunRecord.read(whole / name).matrix))
    _write(whole, keys, points)
    return points


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    try:
        found = load_yaml(f"[{values}]") if equals else None
    except PlainYAMLError:
        found = None
    if not key or not found:
        raise ValueError(f"`--set` is {text!r}; write a key and its values, as `--set num_rounds=1,2,4`.")
    return key.replace("-", "_"), found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _train(file: str, folder: Path, options: Sequence[str]) -> None:
    if _is_done(file, folder, options):
        return
    command = [sys.executable, "-m", "hbat", "train", "--config", file, "--resume", *options]
    # In a session of its own, so that a signal comes from here alone, and once: the run then ends with a checkpoint.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:  # noqa: S603
        received: list[int] = []

        def forward(number: int, _: Any) -> None:
            received.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(
            f"The run in {folder} failed; see above. The same command continues it, once that is mended."
        )


def _is_done(file: str, folder: Path, options: Sequence[str]) -> bool:
    """Whether the folder holds this very run, finished and with its model."""
    saved = is_adapter(folder) or (folder / "config.json").is_file()
    if not saved or not RunFolder(folder).holds_run():
        return False
    record = RunRecord.read(folder)
    return record.is_finished and record.run_file == as_it_runs(file, parse_overrides([*options]))


def _write(folder: Path, keys: Sequence[str], points: Sequence[Point]) -> None:
    rows = [{"values": point.values, "scores": dict(point.matrix.end)} for point in points]
    write_json(folder / SWEEP_FILE, {"keys": list(keys), "rows": rows})
    draw_sweep([(list(point.values.values()), point.matrix) for point in points], keys, folder / SWEEP_PLOT_FILE)


def print_sweep(points: Sequence[Point], folder: Path) -> None:
    """Print each objective's headline score at the end of every run, and the paths of the results."""
    output, matrix = Output(), points[0].matrix
    table = number_table(*points[0].values, *headline_columns(matrix))
    for point in points:
        table.add_row(*map(_text, point.values.values()), *headline_cells(matrix, point.matrix.end))
    output.table(table, f"At the end of each run ({directions(matrix)})")
    for label, name in (("Scores", SWEEP_FILE), ("Plot", SWEEP_PLOT_FILE)):
        if (folder / name).is_file():
            output.print(f"{label + ':':8}{(folder / name).absolute()}")
