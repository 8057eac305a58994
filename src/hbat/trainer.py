"""HBATTrainer: the loop over the stages of a run."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from hbat.config.fields import at_home, check_number, shown
from hbat.config.hbat import HBATConfig
from hbat.data.digest import data_digest
from hbat.engines.choose import choose_engine
from hbat.engines.processes import is_main_process
from hbat.ewc.parameters import snapshot, trainable_parameters
from hbat.model.chat_template import set_chat_template
from hbat.model.load import (
    align_special_tokens,
    described,
    load_model,
    load_tokenizer,
    make_trainable,
    require_adapter_parameters,
)
from hbat.model.save import save, upload
from hbat.objectives.rewards import reward_names
from hbat.objectives.track import Track, build_tracks, fit, one_chat_template
from hbat.reports.card import write_model_card
from hbat.reports.costs import cost_entry, run_metrics, stage_line
from hbat.reports.files import FRONT_FILE, FRONT_PLOT_FILE
from hbat.reports.front import Front
from hbat.reports.log import load_log
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.page import try_report
from hbat.reports.plots import draw_front
from hbat.reports.record import forget_results, refuse_other_results
from hbat.reports.reporter import RunReporter, mean_loss
from hbat.reports.scores import RunScores
from hbat.stages.builder import TrainerBuilder
from hbat.stages.evaluator import Evaluator
from hbat.stages.guard import cheap_garbage_collection
from hbat.stages.interruption import StopRequest
from hbat.stages.lengths import RowLengths, measure_rows
from hbat.stages.measurements import Measurements
from hbat.stages.rehearsal import rehearse
from hbat.stages.runner import StageResult, StageRunner
from hbat.stages.shown_row import ShownRow, show_rows
from hbat.stages.start import StageStart
from hbat.state.continued import FinishedRun
from hbat.state.files import write_json
from hbat.state.fingerprint import Fingerprint, fingerprint
from hbat.state.folder import RunFolder
from hbat.state.last_stage import LastStage
from hbat.state.plan import Stage
from hbat.state.run import Run, check_request

logger = logging.getLogger(__name__)


class HBATTrainer:
    """Trains one model, or one adapter, on several objectives by alternating between them round by round.

    Every data set is cut into `num_rounds` parts. A round runs each objective once on its part, with the objective's
    own trainer, built anew on the same model; the reference policy of a preference or online stage is the model at the
    start of the stage. With `ewc`, a stage is held back where the other objectives' stages moved the weights most.
    After every stage every objective is evaluated, and the state of the run is saved. Source: arXiv 2406.15178.

    Args:
        model: Name or path of a causal language model, or a model, or a PeftModel with one trainable adapter.
        args: The run's configuration.
        train_dataset: Training rows by objective: a `datasets.Dataset` in one of TRL's formats or another known
            layout, or what stands under `datasets` in a run file, such as a file name or a list of them.
        eval_dataset: Evaluation rows by objective, for all or some of them, likewise.
        processing_class: The tokenizer; by default the model's own.
        peft_config: Configuration of a new adapter for the whole run.
        callbacks: Callbacks for every stage's trainer, or a mapping from objective to those of its own.
        reward_funcs: What the online objectives learn from, as for TRL's online trainers: a function from `prompts`
            and `completions` to a list of numbers, a reward model or the name of one, or a list of these.
        reward_processing_classes: Tokenizers of the reward models; by default the models' own.

    Attributes:
        model: The model.
        args: The run's configuration.
        processing_class: The tokenizer.
        tracks: What belongs to each objective: `objective`, `args`, `train_dataset`, `eval_dataset`.
        state: A `TrainerState` of the whole run: `log_history`, `global_step`.
        continued: The run that a new one continues (`continue_from`).
        matrix: The forgetting matrix.

    Raises:
        ValueError: If configuration, data or model cannot be trained as asked; the message names what and where.
        TypeError: If an argument is of the wrong type.
        ImportError: If an option needs a package that is missing.
        NotImplementedError: For combinations that `docs/support.md` lists as unsupported.
    """

    def __init__(  # noqa: PLR0913 - the arguments of TRL's trainers
        self,
        model: Any,
        args: HBATConfig,
        train_dataset: Mapping[str, Any],
        eval_dataset: Mapping[str, Any] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] | Mapping[str, Sequence[TrainerCallback]] | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        if not isinstance(args, HBATConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; give an `HBATConfig`.")
        self.args = args
        model, reward_funcs = at_home(model), at_home(reward_funcs)
        tracks = build_tracks(args, train_dataset, eval_dataset, reward_funcs, reward_processing_classes, callbacks)
        template, tracks = one_chat_template(tracks, args)
        needs_reference = any(track.objective.uses_reference for track in tracks)
        adds = peft_config is not None
        base = load_model(model, args, gets_adapter=adds, takes_reference=needs_reference)
        self.processing_class = load_tokenizer(processing_class, base, args, model)
        set_chat_template(template, base, self.processing_class, gets_adapter=adds, seed=args.seed)
        self.model = make_trainable(base, args, peft_config, takes_reference=needs_reference)
        engine = choose_engine(tracks, self.model, args.ewc, replays=args.replay_share > 0)
        if needs_reference:
            require_adapter_parameters(self.model)
        self.tracks: Mapping[str, Track] = {
            track.name: track for track in fit(tracks, args, self.model, self.processing_class)
        }
        tracks = list(self.tracks.values())
        self.state = TrainerState()
        self._folder = RunFolder(args.output_dir, writes=is_main_process(), keeps=args.keep_states)
        self._start = StageStart(self.model, needs_reference=needs_reference, engine=engine)
        builder = self._builder = TrainerBuilder(
            self.model, self.processing_class, self._start, engine, keep_adapter_dtype=args.keep_adapter_dtype
        )
        self._request = StopRequest()
        self._evaluator = Evaluator(tracks, builder, self._start, self._request, shows=not args.disable_tqdm)
        self.matrix = ForgettingMatrix(
            {track.name: track.objective.metric for track in tracks},
            better={track.name: "higher" if track.objective.greater_is_better else "lower" for track in tracks},
            counts=self._evaluator.counts,
            data={name: data_digest(rows) for name, rows in self.eval_dataset.items()},
        )
        self._scores = RunScores(self.matrix, self._folder)
        self._stages = StageRunner(
            self.model, args, builder, self._start, engine, self._request,
            self.tracks["sft"] if args.replay_share > 0 else None,
        )  # fmt: skip
        self._measurements = Measurements(args, tracks, self.model, self.processing_class)
        self._run: Run | None = None
        self._moved_to: float | None = None
        self._start.take()
        # A run that has begun no longer needs the one that it continues.
        begins = args.continue_from is not None and not self._folder.holds_run()
        self.continued = FinishedRun(args, self._fingerprint()) if begins else None
        rehearse(tracks, args, builder)
        self._built = args.as_text()
        align_special_tokens(self.model, self.processing_class)  # which `sft.eos_token` sets when a trainer is built

    @property
    def train_dataset(self) -> dict[str, Dataset]:
        """Training rows by objective, without those that were dropped."""
        return {name: track.train_dataset for name, track in self.tracks.items()}

    @property
    def eval_dataset(self) -> dict[str, Dataset]:
        """Evaluation rows by objective, without those that were dropped."""
        return {name: track.eval_dataset for name, track in self.tracks.items() if track.eval_dataset is not None}

    def train(self, resume_from_checkpoint: bool | None = None, *, allow_changed: Sequence[str] = ()) -> TrainOutput:
        """Run all stages that are not done yet.

        Args:
            resume_from_checkpoint: True resumes the run in `output_dir` where it was cut off, and starts one if there
                is none. Otherwise the folder must not hold a run.
            allow_changed: Values that may differ from the run that is resumed, such as `sft.learning_rate`; `ewc.`
                allows every value with that prefix. New values apply from the start of the current stage. What cannot
                change within a run, such as data and rounds, is refused all the same.

        Returns:
            Steps of the run, mean of the logged training losses, and as metrics the final scores,
            `eval_<objective>/<metric>`, with `train_runtime` (seconds) and `train_tokens_per_second`.

        Raises:
            TypeError: If `resume_from_checkpoint` is a path, or `allow_changed` no list.
            ValueError: If `allow_changed` is given without `resume_from_checkpoint`, `args` were changed since the
                trainer was built, or it has trained already and is to start over.
            RunStateError: If `output_dir` holds a different run, any run while `resume_from_checkpoint` is not set,
                or scores that are of no run; if no complete state of the run is left; or if another process trains
                into it.
            StorageError: If the state cannot be written; the previously saved one stays intact.
            FloatingPointError: If a loss, gradient, weight or importance is NaN or infinite; the stage's start is on
                disk.
            RunInterrupted: At SIGTERM or SIGINT, with everything saved; uncaught it ends the process with status 143
                or 130, or in a notebook the cell. A second signal ends the process at once.
        """
        check_request(resume_from_checkpoint, allow_changed, self.args.output_dir)
        self._require_as_built(resume=bool(resume_from_checkpoint))
        if not self._folder.holds_run():
            refuse_other_results(self._folder.path)
        with self._folder.locked():
            run = self._run = self._open(resume=bool(resume_from_checkpoint), allow_changed=allow_changed)
            reporter = self._make_reporter(run)
            try:
                with cheap_garbage_collection(), self._request.listening():
                    self._evaluate_if_due(run, reporter)
                    for stage in run.stages_left():
                        self._train_stage(stage, run, reporter)
                        self._request.raise_if_agreed()
                        self._evaluate_if_due(run, reporter)
                        self._request.raise_if_agreed()
            finally:
                self._close(reporter)
        metrics = run_metrics(run.state.costs) | self._scores.last()
        return TrainOutput(self.state.global_step, mean_loss(self.state, self.tracks), metrics)

    def _require_as_built(self, *, resume: bool) -> None:
        for name, now in self.args.as_text().items():
            if now != self._built[name]:
                raise ValueError(
                    f"`{name}` was changed from {shown(self._built[name])} to {shown(now)} after the trainer was "
                    "built, which has no effect. Build a new `HBATTrainer` with it."
                )
        if self._run is not None and not resume and self.args.overwrite_output_dir:
            raise ValueError(
                "This trainer has trained already: its model is not the one that the run began with. To start over, "
                "build a new `HBATTrainer`; to resume, pass `resume_from_checkpoint=True`."
            )

    def add_callback(self, callback: TrainerCallback) -> None:
        """Add a callback to every stage's trainer. In its events `state.hbat` says where in the run the stage is."""
        for track in self.tracks.values():
            track.callbacks.append(callback)

    if not TYPE_CHECKING:  # it would hide typing errors from type checkers

        def __getattr__(self, name: str) -> Any:
            known = (
                "" if name not in vars(Trainer) else " Every stage builds a trainer of its own: a callback gets its"
            )
            hint = f"{known} model, optimizer, data loader and logs." if known else ""
            raise AttributeError(f"`HBATTrainer` has no {name!r}.{hint}")

    def _fingerprint(self) -> Fingerprint:
        tracks = self.tracks.values()
        return fingerprint(
            self.args,
            {track.name: track.args for track in tracks},
            self.train_dataset,
            trainable_parameters(self.model),
            self.model,
            dropped={track.name: track.dropped for track in tracks},
            rewards=reward_names(track.objective for track in tracks),
            processing_class=self.processing_class,
        )

    def _open(self, *, resume: bool, allow_changed: Sequence[str]) -> Run:
        parameters = trainable_parameters(self.model)
        run = Run.open(
            self.args, self._folder, self._fingerprint(), parameters, continued=self.continued,
            resume=resume, allow_changed=allow_changed, needs_initial=self._evaluator.needs_reference,
        )  # fmt: skip
        run.state.model = described(self.model)
        self.matrix.take_rows(run.state.evaluations)
        self.state, self._moved_to = TrainerState(), None
        if is_main_process() and run.state.next_stage == run.state.first_stage and not self.matrix.end:
            forget_results(self._folder.path)
        if run.was_resumed:
            run.load_weights(parameters)
            self.state = load_log(self._folder.path, run.state.global_step, run.state.log)
        return run

    def _make_reporter(self, run: Run) -> RunReporter:
        if not run.stages_left():
            logger.info("The run in %s is finished; nothing is left to train.", self.args.output_dir)
        total = run.state.global_step + self._steps_from(run, run.state.next_stage).total()
        track = next(iter(self.tracks.values()))
        return RunReporter(self.args, self.model, self.state, total, track.args, track.objective.recomputed_fields)

    def _close(self, reporter: RunReporter) -> None:
        try:
            reporter.save()
            self._scores.draw()
        except OSError as error:  # the run's state is safe; an error about that one says more
            logger.warning("The log and the plot of the run could not be updated: %s", error)
        reporter.close()

    def _train_stage(self, stage: Stage, run: Run, reporter: RunReporter) -> None:
        while (result := self._try_stage(stage, run, reporter)) is None:
            reporter.forget_after(run.state.global_step)
        run.state.log = reporter.save()
        run.commit_stage(stage, weights=trainable_parameters(self.model), **vars(result))
        self.state.global_step = run.state.global_step
        cost = run.state.costs[-1]
        reporter.show(cost_entry(cost), run.state.global_step)
        reporter.progress.say(stage_line(stage, cost))

    def _try_stage(self, stage: Stage, run: Run, reporter: RunReporter) -> StageResult | None:
        # None: the stage was rolled back.
        self._start.take()
        try:
            return self._stages.run(
                stage,
                self.tracks[stage.objective],
                folder=self._folder.path / stage.folder,
                run=run,
                reporter=reporter,
                later=self._steps_from(run, stage.index + 1),
            )
        except FloatingPointError as error:
            self._folder.remove_stage(stage.folder)  # its checkpoints may hold the weights that led here
            if self.args.on_nan == "stop" or run.rollbacks(stage) >= self.args.max_rollbacks:
                raise FloatingPointError(
                    f"{error} The weights at the stage's start are on disk: lower the learning rate of "
                    f"`{stage.objective}` and train into a new folder, or fix the data."
                ) from error
            logger.warning("%s Back to the start of the stage, with half the learning rate.", error)
            run.roll_back(stage, trainable_parameters(self.model))
            return None

    def _evaluate_if_due(self, run: Run, reporter: RunReporter) -> None:
        if not (self.eval_dataset or self._measurements.are_due(run)) or not self._scores.are_due(run):
            return
        if not self.matrix.rows:
            rows = [f"{len(rows)} rows of {name}" for name, rows in self.eval_dataset.items()]
            reporter.progress.say(
                f"Evaluating the model at the start: {', '.join(rows + self._measurements.work(run))}."
            )
        reporter.progress.between("evaluating")
        with run.clock.timing("evaluation"):
            results = self.evaluate()
            if self._measurements.are_due(run):
                results |= self._measurements.take(run, reporter, self.matrix)
        self._scores.take(results, run, reporter)

    def _steps_from(self, run: Run, first: int) -> Counter[str]:
        steps: Counter[str] = Counter()
        for stage in run.plan:
            if stage.index >= first:
                steps[stage.objective] += self.tracks[stage.objective].estimated_steps(stage.num_rounds, stage.part)
        return steps

    def estimated_steps(self, objective: str, part: int = 0) -> int:
        """Estimate the optimizer steps of an objective's stage on a part of its data, from 0."""
        return self.tracks[objective].estimated_steps(self.args.num_rounds, part)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluate every objective that has evaluation rows, on the model as it is.

        The reference policy of a preference objective is the model at the start of the run, so that scores of
        different stages compare; before `train()` it is the model as it is.

        Returns:
            Scores by objective and metric.
        """
        if self._run is None or not self._evaluator.needs_reference:
            return self._evaluator.evaluate(snapshot(trainable_parameters(self.model)))
        return self._evaluator.evaluate(self._run.weights("initial"))

    def row_lengths(self) -> list[RowLengths]:
        """Count the tokens of all rows, and what `max_length` cuts and drops of them: as many builds as objectives."""
        return measure_rows(list(self.tracks.values()), self._builder, self.processing_class)

    def shown_rows(self) -> list[ShownRow]:
        """How the first row of every objective reads to the model, and what of it is learned."""
        return show_rows(list(self.tracks.values()), self._builder, self.processing_class)

    def front(self, points: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Front:
        """Evaluate the line between the start and the end of a finished run's last stage.

        The model at a point is what the run would have ended with under that `end_weight`. Writes `front.json` and
        `front.png` into `output_dir` and leaves the run there as it is; the model holds the run's end afterwards, as
        after `train()`. Collective: call on every rank.

        Args:
            points: Values of `end_weight` between 0 and 1.

        Returns:
            Scores of every objective with evaluation rows, in the order of ascending points.

        Raises:
            ValueError: If a point is no number between 0 and 1, or fewer than two objectives have evaluation rows.
            RunStateError: If `output_dir` holds no finished run of this trainer, or no longer has the start of its
                last stage (`keep_states: 1`).
        """
        chosen = list(points)
        for point in chosen:
            check_number("points", point, 0, 1)
        if not chosen:
            raise ValueError("`points` is empty; give numbers between 0 and 1.")
        if len(evaluated := list(self.eval_dataset)) < 2:  # noqa: PLR2004 - one against another
            raise ValueError(
                f"The front compares objectives, but of {list(self.tracks)} only {evaluated} have evaluation rows. "
                "Give them for two or more (`eval_dataset`, in YAML `eval_datasets`)."
            )
        line = self._last_stage()
        front = Front({name: self.matrix.headline[name] for name in evaluated}, better=self.matrix.better)
        parameters = trainable_parameters(self.model)
        try:
            for point in sorted(set(map(float, chosen))):
                line.move(parameters, point)
                front.add(point, self.evaluate())
        finally:
            line.move(parameters, line.end_weight)
            self._moved_to = None
        if is_main_process():
            write_json(self._folder.path / FRONT_FILE, front.as_dict())
            draw_front(front, self._folder.path / FRONT_PLOT_FILE)
        return front

    def move_to(self, end_weight: float) -> None:
        """Move the model to a point between the start and the end of a finished run's last stage.

        It becomes `start + end_weight * (end - start)`, with the end as it was before the run's own `end_weight`.
        The run in `output_dir` stays as it is. Collective: call on every rank.

        Args:
            end_weight: The point, between 0 and 1.

        Raises:
            ValueError: If it is no such number.
            RunStateError: As `front`.
        """
        check_number("end_weight", end_weight, 0, 1)
        self._last_stage().move(trainable_parameters(self.model), end_weight)
        self._moved_to = end_weight

    def _last_stage(self) -> LastStage:
        last = LastStage.read(self._folder, self._fingerprint())
        self._run = Run(self.args, self._folder, last.state)
        self.matrix.take_rows(last.state.evaluations)
        return last

    def save_model(self, output_dir: str | None = None) -> None:
        """Save model or adapter, tokenizer, model card and, in the run's folder, the report of the run.

        The card is `README.md`; one that no trainer has written is kept.

        Collective: call on every rank; rank 0 writes.

        Args:
            output_dir: Folder; by default the run's.

        Raises:
            StorageError: If the disk is full or read-only.
        """
        folder = Path(output_dir or self.args.output_dir)
        save(folder, self.model, self.processing_class)
        if is_main_process():
            lines = [str(track) for track in self.tracks.values()]
            sources = list(dict.fromkeys(source for track in self.tracks.values() for source in track.sources))
            write_model_card(folder, self.args, self.model, self.matrix, self._moved_to, lines, sources)
            if folder.resolve() == self._folder.path.resolve() and self._folder.holds_run():
                try_report(folder)

    def push_to_hub(self, repo_id: str | None = None, *, private: bool | None = None) -> str:
        """Save and upload what `save_model` writes.

        Args:
            repo_id: Repository; by default named like the run's folder.
            private: Whether a new repository is private.

        Returns:
            Address of the commit; empty on other processes than rank 0, which do not upload.
        """
        self.save_model()
        return upload(Path(self.args.output_dir), repo_id, private=private) if is_main_process() else ""
