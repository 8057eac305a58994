"""Live reporting: one log, one set of reporters, one progress bar and one step axis for all stages of a run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from hbat.config.hbat import HBATConfig
from hbat.engines.environment import kept_environment
from hbat.reports.log import save_log
from hbat.reports.progress import Progress, StageProgress
from hbat.reports.tables import show_table
from hbat.state.plan import Stage

#: Entries about a single stage, which would be wrong in the log of the whole run.
_DROPPED = {"epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
_RUN_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class RunReporter:
    """Owns the reporters, the log and the progress of a run.

    Args:
        config: The run's configuration.
        model: The model, for reporters that describe it.
        state: The log so far; `global_step` is the step of the whole run.
        total_steps: Estimate of the run's optimizer steps, corrected as stages begin.
        args: Configuration of a stage's trainer, whose device and processes are the run's.
        derived: Fields that the configuration computes from others.

    Attributes:
        state: The log.
        progress: What shows how far the run is.
    """

    def __init__(
        self,
        config: HBATConfig,
        model: Any,
        state: TrainerState,
        total_steps: int,
        args: TrainingArguments,
        derived: Collection[str] = (),
    ) -> None:
        self.state = state
        self._folder = Path(config.output_dir)
        own: dict[str, Any] = dict.fromkeys(derived)
        own |= {"output_dir": config.output_dir, "report_to": config.report_to, "run_name": config.run_name}
        with kept_environment():
            self._args = replace(args, **own)
        self._control = TrainerControl()
        state.is_world_process_zero = self._args.process_index == 0
        state.is_local_process_zero = self._args.local_process_index == 0
        state.max_steps = total_steps
        self._handler = CallbackHandler([DefaultFlowCallback(), *self._reporters()], model, None, None, None)
        self._handler.on_train_begin(self._args, state, self._control)
        self.progress = Progress(
            self._folder if state.is_world_process_zero else None,
            state.global_step,
            total_steps,
            shows=state.is_local_process_zero and not config.disable_tqdm,
        )

    def _reporters(self) -> list[TrainerCallback]:
        reporters = [callback() for callback in get_reporting_integration_callbacks(self._args.report_to)]
        events = str(self._folder / "runs")  # fixed, so that a resumed run appends
        if hasattr(self._args, "logging_dir"):  # transformers < 5 takes it from here
            self._args.logging_dir = events
        for reporter in reporters:
            if isinstance(reporter, TensorBoardCallback):
                reporter.logging_dir = events
        return reporters

    def log(self, entry: dict[str, Any], step: int) -> None:
        """Log numbers by name at a step of the whole run, and pass them to the reporters."""
        self.remember(entry, step)
        self.show(entry, step)

    def show(self, entry: dict[str, Any], step: int) -> None:
        """Pass numbers that another run of the same would not repeat, such as times, to the reporters alone."""
        self.state.global_step = step
        if self.state.is_world_process_zero:
            self._handler.on_log(self._args, self.state, self._control, dict(entry))

    def remember(self, entry: dict[str, Any], step: int) -> None:
        """Log an entry that reporters have seen already."""
        self.state.log_history.append(entry | {"step": step})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Pass rows with the same keys to the reporters that show tables."""
        if rows and self.state.is_world_process_zero:
            show_table(self._handler.callbacks, name, rows, step)

    def forget_after(self, step: int) -> None:
        """Remove entries of later steps, which are done again, from the log. Reporters keep what they have seen."""
        self.state.log_history = [entry for entry in self.state.log_history if entry["step"] <= step]
        self.state.global_step = step

    def save(self) -> dict[str, Any]:
        """Write the log to disk; returns what the run's state records of it."""
        return save_log(self._folder, self.state)

    def close(self) -> None:
        """Close the reporters and the progress."""
        self._handler.on_train_end(self._args, self.state, self._control)
        self.progress.close()


def mean_loss(state: TrainerState, objectives: Iterable[str]) -> float:
    """Mean of the training losses that a run logged, over all objectives; 0 if it logged none."""
    names = {f"{name}/loss" for name in objectives}
    losses = [value for entry in state.log_history for key, value in entry.items() if key in names]
    return float(sum(losses) / max(len(losses), 1))


class ForwardLogs(TrainerCallback):
    """Last callback of a stage's trainer: forwards its log to the run's, with the objective as prefix, and progress.

    `later` are the estimated steps of the stages after it, by objective.
    """

    def __init__(self, reporter: RunReporter, stage: Stage, later: Mapping[str, int]) -> None:
        self._reporter = reporter
        self._stage = stage
        self._later = later
        self._before = reporter.state.global_step

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Announce the stage, and log again what it logged before it was cut off."""
        self._at = StageProgress(self._stage, state.global_step, state.max_steps)
        self._reporter.state.max_steps = self._before + state.max_steps + sum(self._later.values())
        self._reporter.progress.stage_begins(self._at, before=self._before, later=self._later)
        for entry in state.log_history:  # of a stage that is resumed from its checkpoint
            logs = {key: value for key, value in entry.items() if key != "step"}
            if placed := self._placed(logs):
                self._reporter.remember(placed, self._before + int(entry["step"]))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show the step."""
        self._at.step(state.global_step)
        self._reporter.progress.show(self._at)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave an evaluation out of the time left."""
        self._at.pause()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave saving out of the time left."""
        self._at.pause()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Forward an entry."""
        self._at.note(logs or {})
        if placed := self._placed(logs or {}):
            self._reporter.log(placed, self._before + state.global_step)

    def _placed(self, logs: dict[str, Any]) -> dict[str, Any]:
        entry = renamed(logs, self._stage.objective)
        return entry | {"hbat/stage": self._stage.index, "hbat/round": self._stage.round} if entry else {}


def renamed(logs: dict[str, Any], objective: str) -> dict[str, Any]:
    """Prefix a stage's log entries by its objective: `sft/loss`, `dpo/ewc/penalty`, `eval_sft_stage/loss`."""
    # Evaluation inside a stage has a name of its own: its reference policy is the model at the stage's start, while
    # that between stages, logged at the same steps, has the model at the run's start.
    result = {}
    for key, value in logs.items():
        if key in _DROPPED or key.endswith(_RUN_TIMES):
            continue
        inside = key.startswith("eval_")
        result[f"eval_{objective}_stage/{key.removeprefix('eval_')}" if inside else f"{objective}/{key}"] = value
    return result
