"""The scores of a run: when they are due, and their way into the forgetting matrix, the log and `evaluation.json`."""

from collections.abc import Mapping

from hbat.engines.processes import is_main_process
from hbat.reports.files import PLOT_FILE, SCORES_FILE
from hbat.reports.matrix import ForgettingMatrix, as_metrics
from hbat.reports.plots import draw_matrix
from hbat.reports.reporter import RunReporter
from hbat.state.files import write_json
from hbat.state.folder import RunFolder
from hbat.state.run import Run


class RunScores:
    """Keeps the forgetting matrix of a run, and its files `evaluation.json` and `evaluation.png`."""

    def __init__(self, matrix: ForgettingMatrix, folder: RunFolder) -> None:
        self._matrix = matrix
        self._folder = folder.path

    def are_due(self, run: Run) -> bool:
        """Whether the objectives have not been evaluated yet at this point of the run."""
        return not self._matrix.has(run.state.next_stage - 1)

    def take(self, results: Mapping[str, Mapping[str, float]], run: Run, reporter: RunReporter) -> None:
        """Log and commit scores by objective and metric."""
        place = run.place()
        increases = self._increases(results, run.state.predicted, place["objective"])
        self._matrix.add(
            stage=place["stage"], round_number=place["round"], objective=place["objective"], scores=results
        )
        reporter.log(as_metrics(results) | increases, run.state.global_step)
        run.state.log = reporter.save()
        run.commit_evaluations(self._matrix.rows)
        reporter.progress.say(self._matrix.last_line())
        if is_main_process():
            write_json(self._folder / SCORES_FILE, self._matrix.as_dict())

    def _increases(
        self, results: Mapping[str, Mapping[str, float]], predicted: Mapping[str, float], objective: str | None
    ) -> dict[str, float]:
        # By how much the last stage raised the losses of other objectives, as its penalty and as evaluation has it.
        before = self._matrix.rows[-1]["scores"] if self._matrix.rows else {}
        both = [name for name in predicted if "loss" in before.get(name, {}) and "loss" in results.get(name, {})]
        measured = sum(results[name]["loss"] - before[name]["loss"] for name in both)
        increases = {"predicted": sum(predicted[name] for name in both), "measured": measured} if both else {}
        return {f"{objective}/ewc/{name}": value for name, value in increases.items()}

    def draw(self) -> None:
        """Draw the matrix, unless it is empty."""
        if is_main_process() and self._matrix.scored:
            draw_matrix(self._matrix, self._folder / PLOT_FILE)

    def last(self) -> dict[str, float]:
        """Name the scores of this run's last row `eval_<objective>/<metric>`."""
        return as_metrics(self._matrix.end)
