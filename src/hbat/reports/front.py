"""The front: what the objectives score along the line from the start to the end of a run's last stage."""

from collections.abc import Mapping
from typing import Any

from hbat.reports.matrix import ScoreTable


class Front(ScoreTable):
    """Scores of every objective at points `start + end_weight * (end - start)` of a run's last stage.

    A row is `{"end_weight": point, "scores": {objective: {metric: value}}}`.
    """

    @property
    def points(self) -> list[float]:
        """The points, as values of `end_weight`."""
        return [row["end_weight"] for row in self.rows]

    def add(self, end_weight: float, scores: Mapping[str, Any]) -> None:
        """Append the scores at a point."""
        self.rows.append({"end_weight": end_weight, "scores": dict(scores)})
