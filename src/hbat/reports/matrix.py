"""The forgetting matrix: what every objective scores after every stage, what it says, and how it reads as a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher"]

#: Metrics of `Trainer.evaluate` that are no scores.
_NOT_SCORES = (
    "runtime", "samples_per_second", "steps_per_second", "epoch", "step", "num_tokens", "model_preparation_time",
)  # fmt: skip


#: Relative change of a score of which nothing is said: a few rows cannot tell it from none.
_SAME = 0.005


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Take the scores out of the metrics of `Trainer.evaluate`: without the prefix `eval_`, without run times."""
    found = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {key: float(value) for key, value in found.items() if key not in _NOT_SCORES and _is_number(value)}


def as_metrics(scores_of: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name scores by objective and metric as transformers does those of several data sets: `eval_<name>/<metric>`."""
    return {f"eval_{name}/{key}": value for name, values in scores_of.items() for key, value in values.items()}


@dataclass
class ScoreTable:
    """Scores of objectives in rows, each with `"scores": {objective: {metric: value}}`.

    Attributes:
        headline: Metric that stands for each objective.
        rows: The rows in order.
        better: Which scores of an objective are better, `lower` (default) or `higher`.
        data: Digest of each objective's evaluation rows; every new row notes it, as `data`.
        counts: Number of each objective's evaluation rows.
    """

    headline: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    better: Mapping[str, Better] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def better_of(self, objective: str) -> Better:
        """Which scores of an objective are better, `lower` or `higher`."""
        return self.better.get(objective, "lower")

    def series(self, objective: str, metric: str | None = None) -> list[float | None]:
        """Score of an objective in each row, by default the headline's; None where it was not evaluated."""
        chosen = metric or self.headline[objective]
        return [row["scores"].get(objective, {}).get(chosen) for row in self.rows]

    @property
    def scored(self) -> list[str]:
        """The objectives that were evaluated."""
        return [name for name in self.headline if any(row["scores"].get(name) for row in self.rows)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file: headline metrics, which of them are better, rows."""
        return {
            "headline": dict(self.headline),
            "better": {name: self.better_of(name) for name in self.headline},
            "rows": self.rows,
        }


@dataclass
class ForgettingMatrix(ScoreTable):
    """Scores of every objective at the start of a run and after every stage.

    A row is `{"stage": index, "round": n, "objective": name, "scores": {objective: {metric: value}}}`; the row of the
    start has the index before the first stage's, -1, and objective None. Rows of runs that this one continues have
    `"run": name of its folder` as well, and rows with measurements of `evaluation` their columns, as `"measured"`.
    """

    measured: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, *, stage: int, round_number: int, objective: str | None, scores: Mapping[str, Any]) -> None:
        """Append the scores after a stage.

        Args:
            stage: Its index; for the start one less than the first's.
            round_number: Its round, from 1.
            objective: The objective that it trained; None for the start.
            scores: Scores by objective and metric.
        """
        row = {"stage": stage, "round": round_number, "objective": objective, "scores": dict(scores)}
        measured = {name: column for name, column in self.measured.items() if name in scores}
        self.rows.append(row | {"data": dict(self.data)} | ({"measured": measured} if measured else {}))

    def traded(self, names: Sequence[str]) -> list[str]:
        """Which of the names are set against each other: trained objectives, or all if there are fewer than two."""
        trained = [name for name in names if name not in self.measured]
        return trained if len(trained) > 1 else list(names)

    def has(self, stage: int) -> bool:
        """Whether a stage of this run, by its index, has its row; the start's is one less than the first's."""
        return any(row["stage"] == stage and "run" not in row for row in self.rows)

    def series(self, objective: str, metric: str | None = None) -> list[float | None]:
        """Score of an objective in each row; None where it was not evaluated on the data of its last row."""
        digests = [row.get("data", {}).get(objective) for row in self.rows]
        latest = next((digest for digest in reversed(digests) if digest is not None), None)
        return [
            value if digest == latest else None
            for value, digest in zip(super().series(objective, metric), digests, strict=True)
        ]

    def add_column(self, name: str, metric: str, better: Better, data: str = "") -> None:
        """Give a measurement that is none of an objective a column.

        Args:
            name: Its name in the scores of rows.
            metric: Its metric that stands for it.
            better: Which values of it are better.
            data: Digest of its rows.
        """
        self.headline = {**self.headline, name: metric}
        self.better, self.data = {**self.better, name: better}, {**self.data, name: data}
        self.measured[name] = [metric, better, data]

    def take_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take the rows of a run that resumes or is continued, with the columns of what was measured."""
        self.rows = list(map(dict, rows))
        for row in self.rows:
            for name, column in row.get("measured", {}).items():
                self.add_column(name, *column)

    @property
    def end(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of this run's last row; empty where all rows are of the runs that it continues."""
        return self.rows[-1]["scores"] if self.rows and "run" not in self.rows[-1] else {}

    def backward_transfer(self) -> dict[str, float]:
        r"""What the stages after an objective's last own stage did to it.

        With $R_j$ the objective's headline score after stage j and s its last own stage:
        $\mathrm{BWT} = R_{end} - R_s$ if higher is better, with the opposite sign if lower is. Negative means that the
        other objectives' stages made it worse, positive that they helped. Source: Lopez-Paz and Ranzato,
        arXiv 1706.08840, who train every task once.

        Returns:
            Backward transfer by objective. The objective of the run's last stage has none.
        """
        result = {}
        for objective in self.headline:
            own = [value for row, value in self._after_stages(objective) if row["objective"] == objective]
            if own and self.rows[-1]["objective"] != objective:
                after, end = own[-1], self.series(objective)[-1]
                if after is not None and end is not None:
                    result[objective] = self._gain(objective, after, end)
        return result

    def forgetting(self) -> dict[str, float]:
        r"""How far an objective ends below the best that it had reached.

        With $R_j$ the objective's headline score after stage j: $\max_{j < end} R_j - R_{end}$ if higher is better,
        $R_{end} - \min_{j < end} R_j$ if lower is. Positive means forgetting, negative that it was never better than
        at the end. Unlike backward transfer it also counts what the objective's own later stages did, or did not bring
        back. Source: Chaudhry et al., arXiv 1801.10112.

        Returns:
            Forgetting by objective. One that only the run's last stage trained has none.
        """
        result = {}
        for objective in self.headline:
            earlier = self._after_stages(objective)[:-1]
            known = [value for _, value in earlier if value is not None and not math.isnan(value)]
            end = self.series(objective)[-1] if self.rows else None
            if known and end is not None and any(row["objective"] == objective for row, _ in earlier):
                result[objective] = max(self._gain(objective, end, value) for value in known)
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

    def _after_stages(self, objective: str) -> list[tuple[dict[str, Any], float | None]]:
        return [
            (row, value)
            for row, value in zip(self.rows, self.series(objective), strict=True)
            if row["objective"] is not None
        ]

    def _gain(self, objective: str, before: float, after: float) -> float:
        return after - before if self.better_of(objective) == "higher" else before - after

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file: headline metrics, which of them are better, rows, and what they say."""
        return super().as_dict() | {
            "backward_transfer": self.backward_transfer(),
            "forgetting": self.forgetting(),
            "interference": self.interference(),
            "counts": dict(self.counts),
        }

    def last_line(self) -> str:
        """Say in a line what the last row changed: each objective's headline score before and after; else nothing."""
        parts = []
        for name in self.headline:
            before, after = [None, *self.series(name)][-2:]
            if after is not None:
                change = f"{after:.4f}" if before is None else f"{before:.4f} -> {after:.4f}"
                verdict = ""
                if before is not None and abs(after - before) > _SAME * abs(before):
                    verdict = " worse" if self._gain(name, before, after) < 0 else " better"
                parts.append(f"{name} {self.headline[name]} {change}{verdict}")
        return f"Scores: {', '.join(parts)}." if parts else ""

    def lines(self) -> list[tuple[str, list[float | None]]]:
        """For each row a label, such as `round 1: sft` or `other-run, start`, and headline scores of all `scored`."""
        columns = [self.series(objective) for objective in self.scored]
        labels = [
            (f"{row['run']}, " if "run" in row else "")
            + ("start" if row["objective"] is None else f"round {row['round']}: {row['objective']}")
            for row in self.rows
        ]
        return [(label, [column[index] for column in columns]) for index, label in enumerate(labels)]


# --- as a table ------------------------------------------------------------------------------------------------------


def headline_columns(table: ScoreTable) -> list[str]:
    """Name the columns of headline scores, by objective and metric."""
    return [f"{name} {table.headline[name]}" for name in table.scored]


def headline_cells(table: ScoreTable, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Write the headline scores of a row; empty where an objective was not evaluated."""
    values = [scores.get(name, {}).get(table.headline[name]) for name in table.scored]
    return ["" if value is None else f"{value:.4f}" for value in values]


def table_rows(matrix: ForgettingMatrix) -> tuple[list[str], list[list[str]]]:
    """Lay the headline scores out as cells: the head, and the rows of the matrix, backward transfer and forgetting."""
    head = ["after", *headline_columns(matrix)]
    rows = [
        [label, *("" if value is None else f"{value:.4f}" for value in values)] for label, values in matrix.lines()
    ]
    for label, values in ("backward transfer", matrix.backward_transfer()), ("forgetting", matrix.forgetting()):
        rows.append([label, *(f"{values[name]:+.4f}" if name in values else "" for name in matrix.scored)])
    return head, rows


def markdown_table(matrix: ForgettingMatrix) -> str:
    """Lay the headline scores out as a Markdown table."""
    head, rows = table_rows(matrix)
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines)


def directions(matrix: ScoreTable) -> str:
    """Say which scores are better: `lower is better`, with the names of the objectives if they differ."""
    names: dict[str, list[str]] = {}
    for name in matrix.scored:
        names.setdefault(matrix.better_of(name), []).append(name)
    if len(names) == 1:
        return f"{next(iter(names))} is better"
    return ", ".join(f"{better} is better for {' and '.join(objectives)}" for better, objectives in names.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
