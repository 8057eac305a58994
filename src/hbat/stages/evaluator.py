"""Evaluates every objective on the model as it is, with the host's own evaluation."""

import tempfile
from collections.abc import Mapping

from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from hbat.objectives.objective import Objective
from hbat.reports.matrix import scores
from hbat.stages.builder import TrainerBuilder
from hbat.stages.rehearsal import first_rows
from hbat.stages.start import StageStart


class Evaluator:
    """Evaluates the objectives of a run.

    Args:
        objectives: The objectives by name.
        sections: Configuration of each.
        datasets: Evaluation rows by objective; an objective may be left out.
        builder: Builder of trainers on the run's model.
        start: Holder of the reference policy.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        sections: Mapping[str, TrainingArguments],
        datasets: Mapping[str, Dataset],
        builder: TrainerBuilder,
        start: StageStart,
    ) -> None:
        self._objectives = objectives
        self._sections = sections
        self._datasets = datasets
        self._builder = builder
        self._start = start

    @property
    def needs_reference(self) -> bool:
        """Whether an objective that is evaluated takes a reference policy."""
        return any(self._objectives[name].uses_reference for name in self._datasets)

    def evaluate(self, reference: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Evaluate all objectives that have rows.

        Args:
            reference: Trainable weights of the reference policy by name; not read where no objective takes one.

        Returns:
            Scores by objective and metric.
        """
        results = {}
        for name, dataset in self._datasets.items():
            needed = self._objectives[name].rows_of_a_stage(self._sections[name])
            with (
                tempfile.TemporaryDirectory() as folder,
                self._builder.building(
                    self._objectives[name],
                    folder,
                    train_dataset=first_rows(dataset, needed),
                    eval_dataset=dataset,
                    for_evaluation=True,
                ) as trainer,
            ):
                if self._objectives[name].uses_reference:
                    self._start.set_reference(reference)
                metrics = trainer.evaluate()
                # TRL below 1.6 puts its own metrics into the log entry only.
                results[name] = scores(next(iter(trainer.state.log_history[-1:]), {}) | metrics)
        return results
