"""Plots of a run. They need matplotlib (extra `plots`); without it nothing is drawn and the log says so."""

import importlib.util
import io
import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hbat.reports.costs import BESIDE
from hbat.reports.front import Front
from hbat.reports.matrix import Better, ForgettingMatrix, ScoreTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

#: Colours of objectives in order, distinct for the colour-blind (Okabe and Ito); the last ones repeat.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_START = "#888888"
_WIDEST = 22.0  # inches
_MOST_POINTS = 600  # of a curve: as many as a picture has pixels
Entry = Mapping[str, Any]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _can_draw(file: Path) -> bool:
    if not can_draw():
        logger.info("matplotlib is not installed, so %s is not drawn (pip install 'hbat-trl[plots]').", file.name)
    return can_draw()


def draw_matrix(matrix: ForgettingMatrix, file: Path) -> None:
    """Draw each objective's headline score over the stages into a PNG file."""
    if _can_draw(file):
        score_figure(matrix).savefig(file, dpi=120)


def draw_front(front: Front, file: Path) -> None:
    """Draw the headline scores of every two objectives against each other into a PNG file, a dot for each point."""
    if _can_draw(file):
        labels = [f"{point:g}" for point in front.points]
        trade_off_figure(front, front, labels, front.scored).savefig(file, dpi=120)


def as_svg(figure: "Figure") -> str:
    """Write a figure as SVG to be set into a page: its text is text, in the page's colour."""
    import matplotlib as mpl  # noqa: PLC0415 - an optional extra

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _, found, svg = text.getvalue().partition("<svg")
    sizes, end, drawing = svg.partition(">")
    sizes = re.sub(r' (width|height)="[^"]*"', "", sizes) + f' style="max-width: {figure.get_figwidth():.3g}in"'
    # Not the names of things that matplotlib counts in each picture anew.
    drawing = re.sub(r' id="[A-Za-z.]+\d*_\d+"', "", drawing.replace("#000000", "currentColor"))
    return found + sizes + end + drawing


def _figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, grid: bool = True, sharex: bool = False
) -> tuple["Figure", Any]:
    """A figure in inches, and its axes from left to right and from top to bottom."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    figure = Figure(figsize=(min(width, _WIDEST), height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex).flatten()
    for axis in axes if grid else ():
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _text(label: str) -> str:
    """A label as it is: matplotlib reads mathematics between dollars, and hides what begins with an underscore."""
    return re.sub("^_", "\u200b_", label.replace("$", r"\$"))


def _label(table: ScoreTable, name: str) -> str:
    return _text(f"{name} {table.headline[name]}\n({table.better_of(name)} is better)")


def score_figure(matrix: ForgettingMatrix) -> "Figure":
    """Each objective's headline score over the stages, in the colour of the objective that a stage trained."""
    names, labels = matrix.scored, [label for label, _ in matrix.lines()]
    figure, axes = _figure(3.2 + 0.6 * len(matrix.rows), 0.6 + 2.0 * len(names), rows=len(names), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        points = [(index, value) for index, value in enumerate(matrix.series(name)) if value is not None]
        axis.plot(*zip(*points, strict=True), color="0.6", zorder=1) if points else None
        for index, value in points:
            trained = matrix.rows[index]["objective"]
            axis.scatter(index, value, color=_START if trained is None else colour(names, trained), zorder=2)
        axis.set_ylabel(_label(matrix, name), fontsize=9)
    axes[-1].set_xticks(range(len(labels)), list(map(_text, labels)), rotation=45, ha="right", fontsize=9)
    axes[0].set_title("After each stage, coloured\nby the objective that it trained", fontsize=9)
    return figure


def colour(names: Sequence[str], name: str) -> str:
    """Colour of an objective; grey for one that is not among the names."""
    return COLOURS[list(names).index(name) % len(COLOURS)] if name in names else _START


def trade_off_figure(
    table: ScoreTable, front: Front | None, labels: Sequence[str], objectives: Sequence[str]
) -> "Figure":
    """Headline scores of every two objectives against each other: a path through the rows, and the front if any."""
    figure, pairs = _pairs(table, objectives, 5.2, 4.2, margin=0.12)
    for axis, names in pairs:
        if table is not front:
            _draw_line(axis, table, names, labels, color=_START)
        _draw_front(axis, front, names, color=COLOURS[0])
    if front is not None:
        figure.suptitle("end_weight of the last stage: 0 is its start, 1 its end", fontsize=9)
    return figure


def ends_figure(
    runs: Sequence[tuple[ForgettingMatrix, Front | None]], labels: Sequence[str], objectives: Sequence[str]
) -> "Figure":
    """Headline scores of every two objectives at the end of several runs, with their fronts."""
    figure, pairs = _pairs(runs[0][0], objectives, 5.8, 4.4, margin=0.15)
    for axis, names in pairs:
        for index, ((matrix, front), label) in enumerate(zip(runs, labels, strict=True)):
            own = COLOURS[index % len(COLOURS)]
            _draw_front(axis, front, names, color=own)
            ends = [scores[-1:] for scores in _scores(matrix, names)]
            axis.plot(*ends, "*", color=own, markersize=13, label=_text(label))
        axis.legend(fontsize=8, frameon=False)
    return figure


def _pairs(
    table: ScoreTable, objectives: Sequence[str], width: float, height: float, *, margin: float
) -> tuple["Figure", list[tuple[Any, tuple[str, str]]]]:
    """A figure with axes for every two of the first four objectives."""
    pairs = list(itertools.combinations(objectives[:4], 2))
    columns = min(len(pairs), 3)
    rows = math.ceil(len(pairs) / columns)
    figure, axes = _figure(width * columns, height * rows, rows=rows, columns=columns)
    for axis in axes[len(pairs) :]:
        axis.set_visible(False)
    for axis, (x, y) in zip(axes, pairs, strict=False):
        axis.set(xlabel=_label(table, x), ylabel=_label(table, y))
        axis.margins(margin)
    return figure, list(zip(axes, pairs, strict=False))


def _scores(table: ScoreTable, names: Sequence[str]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in table.series(name)] for name in names]


def _draw_front(axis: Any, front: Front | None, names: Sequence[str], *, color: str) -> None:
    if front is not None and set(names) <= set(front.scored):
        _draw_line(axis, front, names, [f"{point:g}" for point in front.points], color=color)


def _draw_line(axis: Any, table: ScoreTable, names: Sequence[str], labels: Sequence[str], *, color: str) -> None:
    scores = _scores(table, names)
    axis.plot(*scores, "o-", color=color)
    for label, x, y in zip(labels, *scores, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            axis.annotate(_text(label), (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)


# --- of the log ------------------------------------------------------------------------------------------------------


def curve(log: Sequence[Entry], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one entry of the log, with a gap between stages.

    Of a long log means of as many neighbours as a picture has no room to show apart.
    """
    entries = [entry for entry in log if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])]
    size = math.ceil(len(entries) / _MOST_POINTS) or 1
    steps: list[float] = []
    values: list[float] = []
    for _, of_stage in itertools.groupby(entries, key=lambda entry: entry.get("hbat/stage")):
        stage = list(of_stage)
        for start in range(0, len(stage), size):
            group = stage[start : start + size]
            steps.append(fmean(entry["step"] for entry in group))
            values.append(fmean(entry[key] for entry in group))
        steps.append(math.nan)
        values.append(math.nan)
    return steps, values


def _draw_curve(axis: Any, log: Sequence[Entry], key: str, *, color: str, label: str | None = None) -> None:
    steps, values = curve(log, key)
    marker = "." if len(steps) < _MOST_POINTS // 10 else None  # a single point has no line
    axis.plot(steps, values, color=color, marker=marker, label=label)


def curves_figure(log: Sequence[Entry], keys: Sequence[str], stages: Sequence[tuple[str, float, float]]) -> "Figure":
    """Entries of the log over the steps of the run, one below the other, with the stages shaded.

    Keys begin with an objective; a stage is its objective with its first and last step.
    """
    names = list(dict.fromkeys(name for name, _, _ in stages))
    figure, axes = _figure(9.0, 0.6 + 1.8 * len(keys), rows=len(keys), sharex=True)
    for axis, key in zip(axes, keys, strict=True):
        for name, first, last in stages:
            axis.axvspan(first, last, color=colour(names, name), alpha=0.12, linewidth=0)
        _draw_curve(axis, log, key, color=colour(names, key.partition("/")[0]))
        axis.set_ylabel(_text(key.replace("/", "\n", 1)), fontsize=9)
    axes[-1].set_xlabel("optimizer steps of the run")
    return figure


def overlay_figure(logs: Sequence[Sequence[Entry]], labels: Sequence[str], keys: Sequence[str]) -> "Figure":
    """Entries of several runs' logs over their steps, one below the other."""
    figure, axes = _figure(9.0, 0.6 + 2.0 * len(keys), rows=len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for index, (log, label) in enumerate(zip(logs, labels, strict=True)):
            _draw_curve(axis, log, key, color=COLOURS[index % len(COLOURS)], label=_text(label))
        axis.set_ylabel(_text(key), fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    axes[-1].set_xlabel("optimizer steps of the run")
    return figure


def increases_figure(log: Sequence[Entry], objectives: Sequence[str]) -> "Figure":
    """By how much each stage raised the other objectives' losses: as its penalty predicted it, and as measured."""
    figure, (axis,) = _figure(5.2, 4.2)
    both: list[float] = [0.0]
    for name in objectives:
        keys = [f"{name}/ewc/{what}" for what in ("predicted", "measured")]
        found = [[entry[key] for key in keys] for entry in log if keys[1] in entry]
        if found:
            axis.scatter(
                *zip(*found, strict=True), color=colour(objectives, name), label=_text(f"after {name}"), zorder=2
            )
            both += itertools.chain(*found)
    axis.plot([min(both), max(both)], [min(both), max(both)], "--", color="0.6", zorder=1)
    axis.set(xlabel="predicted increase of the other objectives' losses", ylabel="measured increase")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def costs_figure(costs: Sequence[Entry], labels: Sequence[str]) -> "Figure":
    """Seconds of each stage by what they were spent on."""
    figure, (axis,) = _figure(9.0, 0.8 + 0.32 * len(costs))
    left = [0.0] * len(costs)
    rest = [cost["seconds"] - sum(cost.get(what, 0.0) for what in BESIDE) for cost in costs]
    parts = {"training": rest} | {what: [cost.get(key, 0.0) for cost in costs] for key, what in BESIDE.items()}
    for (what, seconds), own in zip(parts.items(), (COLOURS[0], COLOURS[5], COLOURS[4], COLOURS[1]), strict=True):
        axis.barh(range(len(costs)), seconds, left=left, label=what, color=own)
        left = [sum(both) for both in zip(left, seconds, strict=True)]
    axis.set_yticks(range(len(costs)), list(map(_text, labels)), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=len(parts), fontsize=8, frameon=False)
    return figure


def importance_figure(shares: Mapping[str, Mapping[tuple[int, str], float]]) -> "Figure":
    """What share of an objective's importance lies in which layer and module: a heat map for each objective."""
    figure, axes = _figure(1.5 + 3.8 * len(shares), 4.5, columns=len(shares), grid=False)
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        layers, modules = sorted({layer for layer, _ in share}), sorted({module for _, module in share})
        rows = [[100 * share.get((layer, module), 0.0) for module in modules] for layer in layers]
        image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
        axis.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(layers)), ["other" if layer < 0 else layer for layer in layers], fontsize=8)
        axis.set_title(_text(f"importance of {name}, %"), fontsize=9)
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    return figure


def _at(name: str) -> tuple[str, float | None]:
    """A measurement and its temperature, if its name has one."""
    start, _, end = name.rpartition("@")
    return (start, float(end)) if start and re.fullmatch(r"[\d.e+-]+", end) else (name, None)


def draw_models(
    models: Mapping[str, Mapping[str, Mapping[str, float]]],
    headlines: Mapping[str, tuple[str, Better]],
    file: Path,
) -> None:
    """Draw the headline of every measurement of several models into a PNG file, with its interval where it has one.

    A measurement at several temperatures, `rouge@0.5` and so on, is a curve over them for each model.

    Args:
        models: Scores by model, measurement and metric.
        headlines: Metric that stands for each measurement, and which of its values are better.
        file: The file.
    """
    if not _can_draw(file):
        return
    measured: dict[str, list[tuple[str, float | None]]] = {}
    for key in headlines:
        name, temperature = _at(key)
        measured.setdefault(name, []).append((key, temperature))
    columns = min(len(measured), 4)
    rows = math.ceil(len(measured) / columns)
    figure, axes = _figure(1.6 + 3.0 * columns, 0.4 + 3.0 * rows, rows=rows, columns=columns)
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    for axis, (name, points) in zip(axes, measured.items(), strict=False):
        metric, better = headlines[points[0][0]]
        for number, (label, scores) in enumerate(models.items()):
            own = [(number if at is None else at, scores[key]) for key, at in points if key in scores]
            values = [found.get(metric, math.nan) for _, found in own]
            ends = [
                [
                    abs(found.get(f"{metric}_{end}", value) - value)
                    for (_, found), value in zip(own, values, strict=True)
                ]
                for end in ("low", "high")
            ]
            color = COLOURS[number % len(COLOURS)]
            places = [place for place, _ in own]
            axis.errorbar(places, values, yerr=ends, fmt="o-", capsize=3, color=color, label=_text(label))
        axis.set_ylabel(f"{_text(name)} {_text(metric)}\n({better} is better)", fontsize=9)
        if points[0][1] is not None:
            axis.set_xlabel("temperature")
            axis.legend(fontsize=8)
        else:
            axis.set_xticks(range(len(models)), list(map(_text, models)), rotation=30, ha="right", fontsize=8)
            axis.margins(0.15)
    figure.savefig(file, dpi=120)


def draw_sweep(points: Sequence[tuple[Sequence[Any], ForgettingMatrix]], keys: Sequence[str], file: Path) -> None:
    """Draw each objective's headline score at the end of the runs of a sweep into a PNG file.

    Over two keys as a heat map, over one as a curve; over more, only the first two would be seen, so nothing is drawn.
    A point is a run's values of the keys, and its scores.
    """
    names = points[0][1].scored
    if len(keys) > 2 or not names or not _can_draw(file):  # noqa: PLR2004 - a picture has two dimensions
        return
    figure, axes = _figure(1.0 + 4.0 * len(names), 3.6, columns=len(names), grid=len(keys) == 1)
    ticks = [list(dict.fromkeys(map(str, column))) for column in zip(*(values for values, _ in points), strict=True)]
    for axis, name in zip(axes, names, strict=True):
        metric, better = points[0][1].headline[name], points[0][1].better_of(name)
        found = {tuple(map(str, values)): matrix.end.get(name, {}).get(metric, math.nan) for values, matrix in points}
        axis.set_title(_label(points[0][1], name), fontsize=9)
        axis.set_xlabel(_text(keys[-1]))
        axis.set_xticks(range(len(ticks[-1])), list(map(_text, ticks[-1])))
        if len(keys) == 1:
            axis.plot([found[value,] for value in ticks[0]], "o-", color=COLOURS[0])
            continue
        grid = [[found[row, column] for column in ticks[1]] for row in ticks[0]]
        axis.imshow(grid, cmap="viridis" if better == "higher" else "viridis_r", aspect="auto")
        axis.set_ylabel(_text(keys[0]))
        axis.set_yticks(range(len(ticks[0])), list(map(_text, ticks[0])))
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                axis.text(
                    column, row, f"{value:.3f}", ha="center", va="center", fontsize=9, backgroundcolor="#ffffffb0"
                )
    figure.savefig(file, dpi=120)
