"""The scores of a run: when they are due, and how they come into matrix, log and files."""

from collections.abc import Mapping, Sequence

from hbat.engines.processes import is_main_process
from hbat.reports.matrix import ForgettingMatrix, as_metrics
from hbat.reports.reporter import RunReporter
from hbat.reports.results import draw_results, write_results
from hbat.state.folder import RunFolder
from hbat.state.plan import Stage
from hbat.state.run import Run


class RunScores:
    """Keeps the forgetting matrix of a run.

    Args:
        matrix: The matrix.
        stages: The plan of the run.
        folder: Its folder.
    """

    def __init__(self, matrix: ForgettingMatrix, stages: Sequence[Stage], folder: RunFolder) -> None:
        self._matrix = matrix
        self._stages = stages
        self._folder = folder

    def are_due(self, run: Run) -> bool:
        """Whether the objectives have not been evaluated yet where the run stands.

        Args:
            run: The run.

        Returns:
            True before the first stage and after each.
        """
        return not self._matrix.has(run.state.next_stage - 1)

    def take(self, results: Mapping[str, Mapping[str, float]], run: Run, reporter: RunReporter) -> None:
        """Take in scores, and put them into the log and on disk.

        Args:
            results: Scores by objective and metric.
            run: The run.
            reporter: Its reporter.
        """
        done = run.state.next_stage - 1
        number, objective = (self._stages[done].round, self._stages[done].objective) if done >= 0 else (0, None)
        self._matrix.add(stage=done, round_index=number, objective=objective, scores=results)
        reporter.log(as_metrics(results), run.state.global_step)
        run.state.log = reporter.save()
        run.commit_evaluations(self._matrix.rows)
        if is_main_process():
            write_results(self._folder.path, self._matrix)

    def draw(self) -> None:
        """Draw the matrix, where it holds anything."""
        if is_main_process() and self._matrix.rows:
            draw_results(self._folder.path, self._matrix)

    def last(self) -> dict[str, float]:
        """Name the scores of the last row as the host names metrics.

        Returns:
            Scores by `eval_<objective>/<metric>`.
        """
        return as_metrics(self._matrix.rows[-1]["scores"] if self._matrix.rows else {})
