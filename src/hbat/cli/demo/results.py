"""What the demo shows: a table of scores, a plot of the trade-off, and what to try next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hbat.cli.demo.scoring import Scores
from hbat.reports.plots import can_draw

_NEXT = """What to try next
  hbat demo --seed 1                     other data and another base model
  hbat demo --preference ppo             PPO on the judge's utility instead of DPO
  hbat train --config run.yaml           your model and data; start from a file in examples/configs/
  hbat validate --config run.yaml        check configuration, model and data without training"""


@dataclass
class Outcome:
    """The result of one method."""

    name: str
    stages: list[tuple[str, Scores]]  # label and scores after each stage
    steps: int  # optimizer steps of all stages
    seconds: float


def print_results(base: Scores, outcomes: Sequence[Outcome], *, seconds: float, files: Sequence[Path]) -> None:
    """Print the table, its reading, and the files written."""
    console = Console()
    table = Table(title="Instruction following and preference: greedy answers to unseen prompts")
    for column in ("method", "after"):
        table.add_column(column, no_wrap=True)
    for column in ("right", "style", "both", "utility"):
        table.add_column(column, justify="right")
    table.add_row("base model", "", *_cells(base))
    for outcome in outcomes:
        table.add_section()
        for index, (label, scores) in enumerate(outcome.stages):
            last = index == len(outcome.stages) - 1
            table.add_row(outcome.name if index == 0 else "", label, *_cells(scores), style="bold" if last else None)
    console.print(table)
    console.print(
        "right: the body is correct. style: as the judge prefers. both: right and style. utility: the judge's."
    )
    steps = ", ".join(str(outcome.steps) for outcome in outcomes)
    lines = [
        f"All methods train on the same data for the same number of steps ({steps}). Total: {seconds:.0f} s.",
        verdict(outcomes),
        "Saved: " + ", ".join(map(str, files)),
    ]
    console.print("\n".join(lines), soft_wrap=True)
    console.print(_NEXT, highlight=False, soft_wrap=True)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Compare the final joint score of the first outcome, HBAT, with each of the others."""
    own, *others = outcomes
    lines = []
    for other in others:
        gap = 100 * (own.stages[-1][1].joint - other.stages[-1][1].joint)
        relation = f"{abs(gap):.1f} points {'ahead of' if gap > 0 else 'behind'}" if gap else "level with"
        lines.append(f"In answers that are both, {own.name} is {relation} {other.name}.")
    return "\n".join([*lines, "This is one seed: try others before you trust a difference of a few points."])


def draw_trade_off(base: Scores, outcomes: Sequence[Outcome], file: Path) -> Path | None:
    """Plot the path of each method through both objectives into a PNG; None without matplotlib."""
    if not can_draw():
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    for outcome in outcomes:
        path = [base, *(scores for _, scores in outcome.stages)]
        x, y = [100 * scores.style for scores in path], [100 * scores.accuracy for scores in path]
        (line,) = axis.plot(x, y, linewidth=1, alpha=0.6)
        axis.scatter(x[:-1], y[:-1], s=12, color=line.get_color())
        axis.scatter(x[-1:], y[-1:], s=90, marker="*", color=line.get_color(), label=outcome.name, zorder=3)
    axis.scatter([100 * base.style], [100 * base.accuracy], color="black", s=30, label="base model", zorder=3)
    axis.set_xlabel("answers in the preferred style, %")
    axis.set_ylabel("right answers, %")
    axis.set_title("A point per stage; the star is the final model", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    return file


def _cells(scores: Scores) -> list[str]:
    shares = (scores.accuracy, scores.style, scores.joint)
    return [*(f"{100 * share:.1f} %" for share in shares), f"{scores.utility:+.2f}"]
