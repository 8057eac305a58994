"""What a run measures beside its objectives' own evaluation: `sample_prompts` and `evaluation`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hbat.config.hbat import HBATConfig
from hbat.engines.processes import process_count
from hbat.evaluation.suite import Scores, Suite
from hbat.objectives.track import Track
from hbat.reports.files import EVAL_FOLDER
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.reporter import RunReporter
from hbat.stages.completions import Completions, chosen_prompts
from hbat.state.run import Run


class Measurements:
    """Completes and measures with the model of a run as it is; the files of `evaluation` have a folder for each stage.

    Raises:
        DatasetError: If rows cannot be read.
        NotImplementedError: With `evaluation` in several processes.
        ValueError: If prompts, a task or a judge cannot be used.
    """

    def __init__(self, config: HBATConfig, tracks: Sequence[Track], model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer, args = model, tokenizer, next(iter(tracks)).args
        self._dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None  # None: of the weights
        self._completions: Completions | None = None
        if config.sample_prompts is not None:
            prompts = chosen_prompts(config.sample_prompts, tracks)
            self._completions = Completions(prompts, model, tokenizer, Path(config.output_dir), config.seed)
        self._config = config.evaluation
        if self._config is None:
            return
        if process_count() > 1:
            raise NotImplementedError(
                f"`evaluation` measures in one process, and this run has {process_count()}. Remove it, and measure "
                "the run's model afterwards with `hbat eval`."
            )
        self._suite, self._folder = Suite(self._config, in_run=True), Path(config.output_dir) / EVAL_FOLDER
        self._suite.check(model, tokenizer)

    def work(self, run: Run) -> list[str]:
        """What there is to do at this point of the run, in words."""
        prompts = [] if self._completions is None else [f"{self._completions.count} prompts to complete"]
        counts = self._suite.counts if self._measures(run) else {}
        return prompts + [f"{count} rows of `evaluation.{name}`" for name, count in counts.items()]

    def are_due(self, run: Run) -> bool:
        """Whether there is something to do at this point of the run."""
        return self._completions is not None or self._measures(run)

    def _measures(self, run: Run) -> bool:
        if self._config is None:
            return False
        stage, after = run.state.next_stage - 1, self._config.after
        ends = {planned.round: planned.index for planned in run.plan}  # the last stage of each round
        due = {"stage": True, "round": stage < run.state.first_stage or stage in ends.values()}
        return due.get(after, stage == max(ends.values()))

    def take(self, run: Run, reporter: RunReporter, matrix: ForgettingMatrix) -> Scores:
        """Complete and measure, with a column of the matrix for each measurement."""
        place, scores = run.place(), Scores()
        computing = partial(torch.autocast, self._model.device.type, self._dtype, enabled=self._dtype is not None)
        if self._completions is not None:
            reporter.progress.between(f"completing {self._completions.count} prompts")
            with computing():
                rows = self._completions.take(place)
            reporter.table("completions", rows, run.state.global_step)
        if self._measures(run):
            reporter.progress.between("measuring what `evaluation` names")
            # The checksums of the weights on disk: a stage that is trained again gives others.
            identity = [place["stage"], run.state.checksums]
            name = next((stage.folder for stage in run.plan if stage.index == place["stage"]), "start")
            folder = self._folder / name
            with computing():
                scores = self._suite.measure(self._model, self._tokenizer, folder, identity=identity)
            data = self._suite.data
            for name, values in scores.items():
                matrix.add_column(name, *self._suite.headline(name, values), data.get(name.partition("@")[0], ""))
        return scores
