"""The page that shows several runs side by side."""

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from hbat.reports import plots
from hbat.reports.costs import duration
from hbat.reports.page import (
    Cell,
    Picture,
    arrow,
    column,
    is_higher_better,
    picture,
    score_columns,
    settings,
    template,
)
from hbat.reports.record import RunRecord
from hbat.state.files import write_bytes


def write_comparison(folders: Sequence[Path], file: Path) -> None:
    """Write the page of several runs.

    Raises:
        RunStateError: If a folder holds no run.
        ValueError: If the runs have no objective in common that was evaluated.
    """
    records = [RunRecord.read(folder) for folder in folders]
    write_bytes(file, render(records).encode())


def render(records: Sequence[RunRecord]) -> str:
    """Write the page as HTML."""
    names = _names(records)
    first, *others = records
    shared = [name for name in first.matrix.end if all(_same_measure(first, other, name) for other in others)]
    if not shared:
        raise ValueError("The runs have no objective in common that was evaluated, so there is nothing to compare.")
    columns = [
        (name, metric)
        for name, metric in score_columns(first.matrix)
        if name in shared and all(metric in other.matrix.end[name] for other in others)
    ]
    cells = [_column(records, name, metric) for name, metric in columns]
    traded = first.matrix.traded(shared)
    best = pareto([[_headline(record, name) for name in traded] for record in records])
    seconds = [sum(cost["seconds"] for cost in record.state.costs) for record in records]
    differing = [name for name in shared if len({_data(record, name) for record in records}) > 1]
    return template("compare.html").render(
        title="Comparison of " + ", ".join(names),
        names=names,
        evaluated={name: first.matrix.counts[name] for name in shared if name in first.matrix.counts},
        differing=differing,
        columns=[(*place, arrow(first.matrix, *place)) for place in columns],
        scores=[
            (
                f"{name}{_unfinished(records[index])}{' *' if best[index] else ''}",
                [column[index] for column in cells],
                duration(seconds[index]),
            )
            for index, name in enumerate(names)
        ],
        traded=traded,
        pictures=list(_pictures(records, names, shared, traded)) if plots.can_draw() else [],
        differences=list(differences(records)),
    )


def _names(records: Sequence[RunRecord]) -> list[str]:
    paths = [record.folder.resolve() for record in records]
    short = [path.name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def _unfinished(record: RunRecord) -> str:
    done, planned = len(record.stages_done), len(record.state.plan)
    return "" if done == planned else f" ({done} of {planned} stages)"


def _same_measure(one: RunRecord, other: RunRecord, name: str) -> bool:
    return name in other.matrix.end and one.matrix.headline[name] == other.matrix.headline[name]


def _last(record: RunRecord, name: str, metric: str) -> float | None:
    value = record.matrix.end.get(name, {}).get(metric)
    return None if value is None else float(value)


def _headline(record: RunRecord, name: str) -> float:
    """The headline score at the end, so signed that lower is better."""
    value = _last(record, name, record.matrix.headline[name])
    if value is None:
        return math.nan
    return value if record.matrix.better_of(name) == "lower" else -value


def _column(records: Sequence[RunRecord], name: str, metric: str) -> list[Cell]:
    values = [_last(record, name, metric) for record in records]
    counts = [record.matrix.counts.get(name) for record in records]
    return column(values, counts, metric, higher=is_higher_better(records[0].matrix, name, metric))


def _data(record: RunRecord, name: str) -> Any:
    return record.matrix.rows[-1].get("data", {}).get(name) if record.matrix.rows else None


def pareto(scores: Sequence[Sequence[float]]) -> list[bool]:
    """Which runs no other one beats: as good in every objective and better in one.

    Lower scores are better; a run with one that is no number is beaten.
    """
    whole = [all(map(math.isfinite, values)) for values in scores]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)

    return [
        known and not any(beats(other, own) for other, full in zip(scores, whole, strict=True) if full)
        for own, known in zip(scores, whole, strict=True)
    ]


def differences(records: Sequence[RunRecord]) -> Iterator[tuple[str, list[str]]]:
    """Values of the configuration that are not the same in all runs."""
    absent = {name for record in records for name, values in record.state.fingerprint.items() if values is None}
    found = [_settings(record, absent) | _versions(record) for record in records]
    for key in dict.fromkeys(key for values in found for key in values):
        values = [own.get(key, "") for own in found]
        if len({*values}) > 1:
            yield key, values


def _settings(record: RunRecord, absent: AbstractSet[str]) -> dict[str, str]:
    """All values; a section that another run lacks is one of them, as what was set in it."""
    every, given = settings(record, everything=True), settings(record)
    found = {key: value for key, value in every.items() if key.partition(".")[0] not in absent}
    for section in sorted(absent):
        own = [f"{key.partition('.')[2]} {value}" for key, value in given.items() if key.startswith(f"{section}.")]
        found[section] = "none" if record.state.fingerprint.get(section) is None else ", ".join(own) or "defaults"
    return found


def _versions(record: RunRecord) -> dict[str, str]:
    return {f"version of {package}": version for package, version in record.state.versions.items()}


def _pictures(
    records: Sequence[RunRecord], names: Sequence[str], shared: Sequence[str], traded: Sequence[str]
) -> Iterator[Picture]:
    if len(traded) > 1:
        caption = "Where every run ends, with the line between its last stage's start and end where it was measured."
        yield picture("Trade-off", caption, plots.ends_figure([(r.matrix, r.front) for r in records], names, traded))
    keys = [key for name in shared if any((key := f"{name}/loss") in entry for entry in records[0].log)]
    if keys:
        figure = plots.overlay_figure([record.log for record in records], names, keys)
        yield picture("Training", "Training losses over the steps of each run.", figure)
