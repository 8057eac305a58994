"""The forgetting matrix: what every objective scores after every stage, and what the stages did to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["lower", "higher"]


#: Entries of the host's evaluation that are no score.
_NOT_SCORES = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "epoch",
    "step",
    "num_tokens",
    "model_preparation_time",
)


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Take the scores out of what a trainer's `evaluate` returns.

    Args:
        metrics: Entries such as `eval_loss`.

    Returns:
        Numbers by name without the prefix, without run times.
    """
    found = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    return {key: float(value) for key, value in found.items() if key not in _NOT_SCORES and _is_number(value)}


def as_metrics(scores_of: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name scores as the host names those of several data sets.

    Args:
        scores_of: Scores by objective and metric.

    Returns:
        Scores by `eval_<objective>/<metric>`.
    """
    return {f"eval_{name}/{key}": value for name, each in scores_of.items() for key, value in each.items()}


@dataclass
class ForgettingMatrix:
    """Scores of every objective at the start of a run and after every stage.

    A row is `{"stage": index, "round": n, "objective": name, "scores": {objective: {metric: value}}}`; the row of the
    start has stage -1 and objective None.

    Attributes:
        headline: Metric that stands for each objective.
        rows: The rows in order.
        better: Which scores of an objective are the better ones; `lower` where it is left out.
    """

    headline: Mapping[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    better: Mapping[str, Better] = field(default_factory=dict)

    def better_of(self, objective: str) -> Better:
        """Say which scores of an objective are the better ones.

        Args:
            objective: Its name.

        Returns:
            `lower` or `higher`.
        """
        return self.better.get(objective, "lower")

    def add(self, *, stage: int, round_index: int, objective: str | None, scores: Mapping[str, Any]) -> None:
        """Append the scores after a stage.

        Args:
            stage: Its index; -1 for the start.
            round_index: Its round.
            objective: What it trained; None for the start.
            scores: Scores by objective and metric.
        """
        self.rows.append({"stage": stage, "round": round_index, "objective": objective, "scores": dict(scores)})

    def has(self, stage: int) -> bool:
        """Whether a stage has its row.

        Args:
            stage: Its index.

        Returns:
            True if it was added.
        """
        return any(row["stage"] == stage for row in self.rows)

    def series(self, objective: str) -> list[float | None]:
        """Headline score of an objective in each row.

        Args:
            objective: Its name.

        Returns:
            One value a row, None where it was not evaluated.
        """
        metric = self.headline[objective]
        return [row["scores"].get(objective, {}).get(metric) for row in self.rows]

    def backward_transfer(self) -> dict[str, float]:
        r"""What all that came after an objective's own stages did to it.

        With $R_j$ the objective's headline score after stage j, and the mean over its own stages s that another stage
        follows: $\mathrm{BWT} = \mathrm{mean}_s (R_s - R_{end})$ where end is the last row and lower is better, with
        the other sign where higher is. Negative is forgetting, positive is that what followed helped.

        Returns:
            Backward transfer by objective, for those with scores at these rows.
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
        """How much worse an objective's headline score gets over a stage of another objective, in the mean.

        Positive is damage.

        Returns:
            Mean by objective, for those evaluated before and after such a stage.
        """
        result = {}
        for objective in self.headline:
            values = self.series(objective)
            changes = [
                self._gain(objective, after, before)
                for row, before, after in zip(self.rows[1:], values, values[1:], strict=False)
                if row["objective"] != objective and before is not None and after is not None
            ]
            if changes:
                result[objective] = sum(changes) / len(changes)
        return result

    def _gain(self, objective: str, before: float, after: float) -> float:
        return after - before if self.better_of(objective) == "higher" else before - after

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file.

        Returns:
            Headline metrics and which of their values are better, rows, backward transfer and interference.
        """
        return {
            "headline": dict(self.headline),
            "better": {name: self.better_of(name) for name in self.headline},
            "rows": self.rows,
            "backward_transfer": self.backward_transfer(),
            "interference": self.interference(),
        }

    def lines(self) -> Sequence[tuple[str, list[float | None]]]:
        """Headline scores for a table.

        Returns:
            A label and one value an objective, for each row.
        """
        columns = [self.series(objective) for objective in self.headline]
        labels = [
            "start" if row["stage"] < 0 else f"round {row['round'] + 1}: {row['objective']}" for row in self.rows
        ]
        return [(label, [column[index] for column in columns]) for index, label in enumerate(labels)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
