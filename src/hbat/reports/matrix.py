"""The forgetting matrix: what every objective scores after every stage, what it says, and how it reads as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher"]

#: Metrics of `Trainer.evaluate` that are no scores.
_NOT_SCORES = (
    "runtime", "samples_per_second", "steps_per_second", "epoch", "step", "num_tokens", "model_preparation_time",
)  # fmt: skip


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Take the scores out of the metrics of `Trainer.evaluate`: without the prefix `eval_`, without run times."""
    found = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {key: float(value) for key, value in found.items() if key not in _NOT_SCORES and _is_number(value)}


def as_metrics(scores_of: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name scores by objective and metric as transformers does those of several data sets: `eval_<name>/<metric>`."""
    return {f"eval_{name}/{key}": value for name, values in scores_of.items() for key, value in values.items()}


@dataclass
class ForgettingMatrix:
    """Scores of every objective at the start of a run and after every stage.

    A row is `{"stage": index, "round": n, "objective": name, "scores": {objective: {metric: value}}}`; the row of the
    start has the index before the first stage's, -1, and objective None. Rows of runs that this one continues have
    `"run": name of its folder` as well.

    Attributes:
        headline: Metric that stands for each objective.
        rows: The rows in order.
        better: Which scores of an objective are better, `lower` (default) or `higher`.
        data: Digest of each objective's evaluation rows; every new row notes it, as `data`.
    """

    headline: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    better: Mapping[str, Better] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def better_of(self, objective: str) -> Better:
        """Which scores of an objective are better, `lower` or `higher`."""
        return self.better.get(objective, "lower")

    def add(self, *, stage: int, round_index: int, objective: str | None, scores: Mapping[str, Any]) -> None:
        """Append the scores after a stage.

        Args:
            stage: Its index; for the start one less than the first's.
            round_index: Its round.
            objective: The objective that it trained; None for the start.
            scores: Scores by objective and metric.
        """
        row = {"stage": stage, "round": round_index, "objective": objective, "scores": dict(scores)}
        self.rows.append(row | {"data": dict(self.data)})

    def has(self, stage: int) -> bool:
        """Whether a stage of this run, by its index, has its row; the start's is one less than the first's."""
        return any(row["stage"] == stage and "run" not in row for row in self.rows)

    def series(self, objective: str) -> list[float | None]:
        """Headline score of an objective in each row, None where it was not evaluated on the data of its last row."""
        metric = self.headline[objective]
        digests = [row.get("data", {}).get(objective) for row in self.rows]
        latest = next((digest for digest in reversed(digests) if digest is not None), None)
        return [
            row["scores"].get(objective, {}).get(metric) if digest == latest else None
            for row, digest in zip(self.rows, digests, strict=True)
        ]

    def backward_transfer(self) -> dict[str, float]:
        r"""What all later stages did to an objective.

        With $R_j$ the objective's headline score after stage j, and the mean over its own stages s but the run's last:
        $\mathrm{BWT} = \mathrm{mean}_s (R_s - R_{end})$ if lower is better, with the opposite sign if higher is.
        Negative means forgetting, positive that later stages helped.

        Returns:
            Backward transfer by objective, for those that have scores in these rows.
        """
        result = {}
        for objective in self.headline:
            values = self.series(objective)
            last = values[-1] if values else None
            own = [
                value
                for row, value in zip(self.rows[:-1], values, strict=False)
                if row["objective"] == objective and value is not None
            ]
            if last is not None and own:
                result[objective] = sum(self._gain(objective, value, last) for value in own) / len(own)
        return result

    def interference(self) -> dict[str, float]:
        """How much an objective's headline score gets worse over a stage of another objective, on average.

        Returns:
            Mean by objective, for those evaluated before and after such a stage; positive is damage.
        """
        result = {}
        for objective in self.headline:
            values = self.series(objective)
            changes = [
                self._gain(objective, after, before)
                for row, before, after in zip(self.rows[1:], values, values[1:], strict=False)
                if row["objective"] not in {objective, None} and before is not None and after is not None
            ]
            if changes:
                result[objective] = sum(changes) / len(changes)
        return result

    def _gain(self, objective: str, before: float, after: float) -> float:
        return after - before if self.better_of(objective) == "higher" else before - after

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file: headline metrics, which of them are better, rows, transfer, interference."""
        return {
            "headline": dict(self.headline),
            "better": {name: self.better_of(name) for name in self.headline},
            "rows": self.rows,
            "backward_transfer": self.backward_transfer(),
            "interference": self.interference(),
        }

    def lines(self) -> list[tuple[str, list[float | None]]]:
        """For each row a label, such as `round 1: sft` or `other-run, start`, and each objective's headline score."""
        columns = [self.series(objective) for objective in self.headline]
        labels = [
            (f"{row['run']}, " if "run" in row else "")
            + ("start" if row["objective"] is None else f"round {row['round'] + 1}: {row['objective']}")
            for row in self.rows
        ]
        return [(label, [column[index] for column in columns]) for index, label in enumerate(labels)]


# --- as a table ------------------------------------------------------------------------------------------------------


def table_rows(matrix: ForgettingMatrix) -> tuple[list[str], list[list[str]]]:
    """Lay the headline scores out as cells: the head, a row for each of the matrix, and backward transfer."""
    head = ["after", *(f"{name} {metric}" for name, metric in matrix.headline.items())]
    rows = [
        [label, *("" if value is None else f"{value:.4f}" for value in values)] for label, values in matrix.lines()
    ]
    transfer = matrix.backward_transfer()
    shown = (f"{transfer[name]:+.4f}" if name in transfer else "" for name in matrix.headline)
    return head, [*rows, ["backward transfer", *shown]]


def markdown_table(matrix: ForgettingMatrix) -> str:
    """Lay the headline scores out as a Markdown table."""
    head, rows = table_rows(matrix)
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines)


def directions(matrix: ForgettingMatrix) -> str:
    """Say which scores are better: `lower is better`, with the names of the objectives if they differ."""
    names: dict[str, list[str]] = {}
    for name in matrix.headline:
        names.setdefault(matrix.better_of(name), []).append(name)
    if len(names) == 1:
        return f"{next(iter(names))} is better"
    return ", ".join(f"{better} is better for {' and '.join(objectives)}" for better, objectives in names.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
