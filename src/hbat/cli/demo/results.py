"""What the demo shows: the table of scores, the picture of the trade-off, and what to try next."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hbat.cli.demo.scoring import Scores
from hbat.reports.plots import can_draw

_NEXT = """What to try next
  hbat demo --seed 1                     another draw of data and base model
  hbat demo --preference ppo             the same with PPO on the judge's utility; `dpo` is the default
  hbat train --config run.yaml           your model and data; examples/configs/ has files to start from
  hbat validate --config run.yaml        check configuration and data, train nothing"""


@dataclass
class Outcome:
    """What a method came to.

    Attributes:
        name: The method.
        stages: Label and scores after each of its stages.
        steps: Optimizer steps, over all stages.
        seconds: Time it took.
    """

    name: str
    stages: list[tuple[str, Scores]]
    steps: int
    seconds: float


def print_results(base: Scores, outcomes: Sequence[Outcome], *, seconds: float, files: Sequence[Path]) -> None:
    """Print the table, what it says, and where the files lie.

    Args:
        base: Scores before training.
        outcomes: What each method came to.
        seconds: Time of the whole demo.
        files: Files that were written.
    """
    console = Console()
    table = Table(title="Instruction following against preference, greedy answers to unseen prompts")
    table.add_column("method", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for column in ("right", "style", "both", "utility"):
        table.add_column(column, justify="right")
    table.add_row("base model", "", *_cells(base))
    for outcome in outcomes:
        table.add_section()
        for index, (label, scores) in enumerate(outcome.stages):
            last = index == len(outcome.stages) - 1
            table.add_row(outcome.name if index == 0 else "", label, *_cells(scores), style="bold" if last else None)
    console.print(table)
    console.print("right: body exactly as instructed. style: as the judge prefers. utility: what the judge gives.")
    steps = ", ".join(str(outcome.steps) for outcome in outcomes)
    console.print(
        f"Same data and the same number of optimizer steps for all ({steps}). {seconds:.0f} s in all.", soft_wrap=True
    )
    console.print(verdict(outcomes), soft_wrap=True)
    console.print("Written: " + ", ".join(str(file) for file in files), soft_wrap=True)
    console.print(_NEXT, highlight=False, soft_wrap=True)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Say in words what came out, whatever it is.

    Args:
        outcomes: HBAT first, then what it is compared with.

    Returns:
        A sentence for each comparison of the share of answers that are right and in the preferred style.
    """
    own, *others = outcomes
    mine = own.stages[-1][1].joint
    lines = []
    for other in others:
        gap = 100 * (mine - other.stages[-1][1].joint)
        relation = f"{abs(gap):.1f} points {'ahead of' if gap > 0 else 'behind'}" if gap else "level with"
        lines.append(f"In answers that are both, {own.name} is {relation} {other.name}.")
    return "\n".join([*lines, "One seed: repeat with others before you believe a difference of a few points."])


def draw_trade_off(base: Scores, outcomes: Sequence[Outcome], file: Path) -> Path | None:
    """Draw the way of each method through the plane of both objectives.

    Args:
        base: Scores before training.
        outcomes: What each method came to.
        file: PNG to write.

    Returns:
        The file, or None where matplotlib is not installed.
    """
    if not can_draw():
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    for outcome in outcomes:
        way = [base, *(scores for _, scores in outcome.stages)]
        x, y = [100 * each.style for each in way], [100 * each.accuracy for each in way]
        (line,) = axis.plot(x, y, linewidth=1, alpha=0.6)
        axis.scatter(x[:-1], y[:-1], s=12, color=line.get_color())
        axis.scatter(x[-1:], y[-1:], s=90, marker="*", color=line.get_color(), label=outcome.name, zorder=3)
    axis.scatter([100 * base.style], [100 * base.accuracy], color="black", s=30, label="base model", zorder=3)
    axis.set_xlabel("answers in the preferred style, %")
    axis.set_ylabel("right answers, %")
    axis.set_title("Every stage of every method; the star is the end", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    return file


def _cells(scores: Scores) -> list[str]:
    return [f"{100 * each:.1f} %" for each in (scores.accuracy, scores.style, scores.joint)] + [
        f"{scores.utility:+.2f}"
    ]
