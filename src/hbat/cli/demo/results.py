"""What the demo shows: a table of scores, a plot of the trade-off, a verdict, and what to try next."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from hbat.cli.demo.scoring import TEMPERATURE, Scores
from hbat.reports.plots import can_draw

_NEXT = """What to try next
  hbat demo --seed 3                     other data and another base model
  hbat demo --preference ppo             PPO on the judge's utility instead of DPO
  hbat train --config run.yaml           your model and data; start from a file in examples/configs/
  hbat validate --config run.yaml        check configuration, model and data without training
  hbat front run.yaml                    the same averaging line for your run, and `--save` a point of it"""

#: Quantile 0.975 of Student's t, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


@dataclass(frozen=True)
class Point:
    """Scores at a point between the start (0) and the end (1) of the last stage."""

    end_weight: float
    greedy: Scores
    sampled: Scores


@dataclass
class Outcome:
    """The result of one method: its points, the start first, for every seed."""

    name: str
    runs: list[list[Point]] = field(default_factory=list)
    steps: int = 0  # optimizer steps of a run

    def columns(self) -> Iterator[tuple[Point, ...]]:
        """The same point of every seed."""
        return zip(*self.runs, strict=True)

    def best(self) -> tuple[Point, ...]:
        """The point after the start with the most sampled answers that are both, on average."""
        return max(list(self.columns())[1:], key=lambda column: fmean(point.sampled.joint for point in column))


def print_results(outcomes: Sequence[Outcome], *, seconds: float, files: Sequence[Path]) -> None:
    """Print the table, its reading, and the files written."""
    console = Console()
    table = Table(title=f"Answers to unseen prompts, %: at temperature {TEMPERATURE}, and greedy (0)")
    for label in ("method", "point"):
        table.add_column(label, no_wrap=True)
    for kind in (f"{TEMPERATURE}", "0"):
        for label in ("right", "style", "both"):
            table.add_column(f"{kind}\n{label}", justify="right", no_wrap=True)
    # All methods share the first stage, as nothing holds it back.
    start, *_ = outcomes[0].columns()
    table.add_row("SFT alone", "", *_cells(start))
    for outcome in outcomes:
        table.add_section()
        best = outcome.best()
        for index, column in enumerate(list(outcome.columns())[:0:-1]):
            name = outcome.name if index == 0 else ""
            style = "bold" if column == best else None
            table.add_row(name, f"{column[0].end_weight:g}", *_cells(column), style=style)
    console.print(table)
    lines = [
        "right: the body is correct. style: as the judge prefers. both: right and in style. point: average between",
        "start (0) and end (1) of the last stage (`end_weight`). Bold: most sampled answers that are both.",
        f"Means over seeds: {len(outcomes[0].runs)}. Same data for {outcomes[0].steps} steps a run. {seconds:.0f} s.",
        verdict(outcomes),
        "Saved: " + ", ".join(map(str, files)),
    ]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    console.print(_NEXT, highlight=False, soft_wrap=True)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Compare the best point of the first outcome, HBAT, with the best of all points of the others."""
    own, *others = outcomes
    other = max(others, key=lambda outcome: fmean(point.sampled.joint for point in outcome.best()))
    ours, theirs = own.best(), other.best()
    gaps = [100 * (one.sampled.joint - two.sampled.joint) for one, two in zip(ours, theirs, strict=True)]
    gap, count = fmean(gaps), len(gaps)
    around = _T[count - 1] * stdev(gaps) / math.sqrt(count) if count > 1 else math.inf
    decided = "HBAT is ahead" if gap > around else "HBAT is behind" if gap < -around else "Undecided"
    interval = f", 95 % interval [{gap - around:+.1f}, {gap + around:+.1f}]" if count > 1 else ", one seed"
    total = sum(len(outcome.runs[0]) - 1 for outcome in others)
    return (
        f"{decided}: {_share(ours)} % of its sampled answers are both at point {ours[0].end_weight:g}, against "
        f"{_share(theirs)} % at the best of {total} points of two-stage training\n"
        f"({other.name}, point {theirs[0].end_weight:g}): {gap:+.1f} points{interval}."
    )


def draw_trade_off(outcomes: Sequence[Outcome], file: Path) -> Path | None:
    """Plot the averaging line of each method through both objectives into a PNG; None without matplotlib."""
    if not can_draw():
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    for index, outcome in enumerate(outcomes):
        columns = list(outcome.columns())
        x = [100 * fmean(point.sampled.style for point in column) for column in columns]
        y = [100 * fmean(point.sampled.accuracy for point in column) for column in columns]
        (line,) = axis.plot(x, y, "o-", markersize=4, linewidth=2.5 if index == 0 else 1)
        axis.scatter(x[-1:], y[-1:], s=120, marker="*", color=line.get_color(), label=outcome.name, zorder=3)
    axis.scatter(x[:1], y[:1], color="black", s=30, label="SFT alone", zorder=4)
    axis.set_xlabel("sampled answers in the preferred style, %")
    axis.set_ylabel("right sampled answers, %")
    axis.set_title("Between the start of the preference stage and its end (star)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    return file


def _cells(column: Sequence[Point]) -> list[str]:
    scores = [[point.sampled for point in column], [point.greedy for point in column]]
    return [
        f"{100 * fmean(getattr(score, name) for score in kind):.1f}"
        for kind in scores
        for name in ("accuracy", "style", "joint")
    ]


def _share(column: Sequence[Point]) -> str:
    return f"{100 * fmean(point.sampled.joint for point in column):.1f}"
