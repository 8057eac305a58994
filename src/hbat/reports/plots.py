"""Plots of a run. They need matplotlib (extra `plots`); without it nothing is drawn and the log says so."""

import importlib.util
import itertools
import logging
import math
from pathlib import Path

from hbat.reports.front import Front
from hbat.reports.matrix import ForgettingMatrix

logger = logging.getLogger(__name__)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _can_draw(file: Path) -> bool:
    if not can_draw():
        logger.info("matplotlib is not installed, so %s is not drawn (pip install 'hbat-trl[plots]').", file.name)
    return can_draw()


def draw_matrix(matrix: ForgettingMatrix, file: Path) -> None:
    """Draw each objective's headline score over the stages into a PNG file."""
    if not _can_draw(file):
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    names = list(matrix.headline)
    figure = Figure(figsize=(2.5 + 0.6 * len(matrix.rows), 2.4 * len(names)), layout="constrained")
    labels = [label for label, _ in matrix.lines()]
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        points = [(index, value) for index, value in enumerate(matrix.series(name)) if value is not None]
        axis.plot(*zip(*points, strict=True), color="0.6", zorder=1) if points else None
        for index, value in points:
            own = matrix.rows[index]["objective"] == name
            axis.scatter(index, value, color="tab:blue" if own else "tab:orange", zorder=2)
        axis.set_ylabel(f"{name} {matrix.headline[name]}\n({matrix.better_of(name)} is better)")
        axis.grid(alpha=0.3)
    axes[0].set_title("blue: after a stage of this objective, orange: after another's", fontsize=9)
    axes[-1].set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    figure.savefig(file, dpi=120)


def draw_front(front: Front, file: Path) -> None:
    """Draw the headline scores of every two objectives against each other into a PNG file, a dot for each point."""
    if not _can_draw(file):
        return
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    pairs = list(itertools.combinations(front.headline, 2))
    figure = Figure(figsize=(5.2 * len(pairs), 4.2), layout="constrained")
    for axis, names in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        scores = [[math.nan if value is None else value for value in front.series(name)] for name in names]
        axis.plot(*scores, "o-", color="tab:blue")
        for point, x, y in zip(front.points, *scores, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                axis.annotate(f"{point:g}", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9)
        x_label, y_label = (f"{name} {front.headline[name]} ({front.better_of(name)} is better)" for name in names)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.margins(0.12)
        axis.grid(alpha=0.3)
    figure.suptitle("end_weight of the last stage: 0 is its start, 1 its end", fontsize=9)
    figure.savefig(file, dpi=120)
