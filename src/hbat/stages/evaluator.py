"""Evaluates every objective on the model as it is, with its trainer's own evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbat.objectives.track import Track
from hbat.reports.matrix import scores
from hbat.reports.progress import EvaluationBar
from hbat.stages.builder import TrainerBuilder
from hbat.stages.dropped_rows import report_dropped_rows
from hbat.stages.interruption import StopAtPrediction, StopRequest
from hbat.stages.start import StageStart


class Evaluator:
    """Evaluates the objectives of a run; `shows` a progress bar.

    Attributes:
        counts: Number of evaluation rows that each objective's trainer keeps, once it was built.
    """

    def __init__(
        self, tracks: Sequence[Track], builder: TrainerBuilder, start: StageStart, request: StopRequest, *, shows: bool
    ) -> None:
        self._tracks = [track for track in tracks if track.eval_dataset is not None]
        self._builder = builder
        self._start = start
        self._stop = StopAtPrediction(request)
        self._shows = shows
        self.counts = {track.name: len(track.eval_dataset or ()) for track in self._tracks}
        self._reported: set[str] = set()

    @property
    def needs_reference(self) -> bool:
        """Whether an objective that is evaluated takes a reference policy."""
        return any(track.objective.uses_reference for track in self._tracks)

    def evaluate(self, reference: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Evaluate all objectives that have evaluation rows.

        Args:
            reference: Trainable weights of the reference policy by name; unused if no objective takes one.

        Returns:
            Scores by objective and metric.

        Raises:
            DatasetError: If an objective's trainer drops all its evaluation rows.
            RunInterrupted: If a signal came since the run began to listen.
        """
        results = {}
        for track in self._tracks:
            rows: Any = track.eval_dataset
            needed = track.objective.minimum_rows(track.args)
            with self._builder.building(
                track,
                train_dataset=rows.select([index % len(rows) for index in range(needed)]),
                eval_dataset=rows,
                callbacks=[self._stop, *([EvaluationBar(track.name)] if self._shows else [])],
                for_evaluation=True,
            ) as trainer:
                kept: Any = trainer.eval_dataset
                self.counts[track.name] = len(kept)
                if track.name not in self._reported:
                    report_dropped_rows(trainer, "eval", len(rows), track.name, "evaluation")
                    self._reported.add(track.name)
                if track.objective.uses_reference:
                    self._start.set_reference(reference)
                metrics = trainer.evaluate()
                # TRL below 1.6 puts its own metrics into the log entry only.
                results[track.name] = scores(next(iter(trainer.state.log_history[-1:]), {}) | metrics)
        return results
