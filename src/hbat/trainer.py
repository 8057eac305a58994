"""HBATTrainer: the loop over the stages of a run."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hbat.config.hbat import HBATConfig
from hbat.engines.checks import refuse_trainer
from hbat.engines.deepspeed.request import require_trainable
from hbat.engines.environment import forget_deepspeed
from hbat.engines.fsdp2 import sharding
from hbat.engines.processes import is_main_process
from hbat.ewc.parameters import snapshot, trainable_parameters
from hbat.model.load import load_model, load_tokenizer, require_adapter_parameters
from hbat.model.save import save, upload
from hbat.objectives.built_in import build_sections, resolve
from hbat.objectives.data import checked_inputs, fitting_inputs
from hbat.objectives.rewards import reward_names, with_rewards
from hbat.objectives.track import estimated_steps
from hbat.reports.card import write_model_card
from hbat.reports.log import load_log
from hbat.reports.matrix import ForgettingMatrix
from hbat.reports.reporter import RunReporter, mean_loss
from hbat.reports.scores import RunScores
from hbat.stages.builder import TrainerBuilder
from hbat.stages.evaluator import Evaluator
from hbat.stages.guard import cheap_garbage_collection
from hbat.stages.interruption import StopRequest
from hbat.stages.rehearsal import rehearse
from hbat.stages.runner import StageRunner
from hbat.stages.start import StageStart
from hbat.state.fingerprint import fingerprint
from hbat.state.folder import RunFolder
from hbat.state.plan import Stage, plan
from hbat.state.run import Run, check_request

logger = logging.getLogger(__name__)


class HBATTrainer:
    """Trains one model, or one adapter, on several objectives by alternating between them round by round.

    Every data set is cut into `num_rounds` parts. A round runs each objective once on its part, with the objective's
    own trainer, built anew on the same model; the reference policy of a preference or online stage is the model at the
    stage's start. With `ewc`, a stage is held back where the other objectives' stages moved the weights most. After
    every stage every objective is evaluated, and the state of the run is on disk.

    Args:
        model: Name or path of a causal language model, or a model, or a PeftModel with one trainable adapter.
        args: The run's configuration.
        train_dataset: Training rows by objective, in TRL's formats.
        eval_dataset: Evaluation rows by objective; an objective may be left out.
        processing_class: The tokenizer; the model's own where left out.
        peft_config: Configuration of a new adapter for the whole run.
        callbacks: Callbacks for every stage's trainer.
        reward_funcs: What the online objectives learn from, as TRL's online trainers take it: a function from
            `prompts` and `completions` to a list of numbers, a reward model or the name of one, or a list of these.
        reward_processing_classes: Tokenizers of the reward models; the models' own where left out.

    Raises:
        ValueError: If configuration, data or model cannot be trained as asked; the message names what and where.
        TypeError: If an argument is of the wrong kind.
        NotImplementedError: With what `docs/support.md` says is not supported.
    """

    def __init__(  # noqa: PLR0913 - the host's own arguments
        self,
        model: Any,
        args: HBATConfig,
        train_dataset: Mapping[str, Dataset],
        eval_dataset: Mapping[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        if not isinstance(args, HBATConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; give an `HBATConfig`.")
        self.args = args
        objectives = with_rewards(resolve(args), reward_funcs, reward_processing_classes)
        self._objectives = {each.name: each for each in objectives}
        self._sections = build_sections(objectives, args)
        forget_deepspeed()  # between stages every process has the whole model
        checked = checked_inputs(args, self._objectives, self._sections, train_dataset, eval_dataset)
        takes_reference = any(each.uses_reference for each in objectives)
        self.model = load_model(model, args, peft_config, takes_reference=takes_reference)
        for section in self._sections.values():
            refuse_trainer(section, self.model)
        require_trainable(args, objectives, self._sections)
        shard = sharding(args, objectives, self._sections, self.model)
        if takes_reference:
            require_adapter_parameters(self.model)
        self.processing_class = load_tokenizer(processing_class, self.model, args, model)
        self._train_dataset, self._eval_dataset = fitting_inputs(
            args, self._objectives, self._sections, checked, self.model, self.processing_class
        )
        self.state = TrainerState()
        self.matrix = ForgettingMatrix(
            {each.name: each.metric for each in objectives},
            better={each.name: "higher" if each.greater_is_better else "lower" for each in objectives},
        )
        self._plan = plan(args.num_rounds, args.objective_names)
        self._folder = RunFolder(args.output_dir, writes=is_main_process(), keeps=args.keep_states)
        self._scores = RunScores(self.matrix, self._plan, self._folder)
        self._start = StageStart(
            self.model,
            needs_reference=takes_reference,
            shard=shard,
            anchor_device="model" if args.ewc is None else args.ewc.anchor_device,
        )
        builder = TrainerBuilder(self.model, self._sections, self.processing_class, self._start)
        self._request = StopRequest()
        self._runner = StageRunner(
            self.model, args, self._sections, list(callbacks or []), builder, self._start, self._request
        )
        self._evaluator = Evaluator(self._objectives, self._sections, self._eval_dataset, builder, self._start)
        self._run: Run | None = None
        self._start.take()
        rehearse(self._objectives, args, self._sections, self._train_dataset, self._eval_dataset, builder)

    @property
    def train_dataset(self) -> Mapping[str, Dataset]:
        """Training rows by objective, without those that were dropped."""
        return self._train_dataset

    @property
    def eval_dataset(self) -> Mapping[str, Dataset]:
        """Evaluation rows by objective, without those that were dropped."""
        return self._eval_dataset

    @property
    def sections(self) -> Mapping[str, TrainingArguments]:
        """Configuration of each objective's trainer, as it was given."""
        return self._sections

    def estimated_steps(self, objective: str) -> int:
        """Estimate the optimizer steps of one of an objective's stages.

        Args:
            objective: Its name.

        Returns:
            Optimizer steps; packing and filters can make them fewer.
        """
        rows, rounds = len(self._train_dataset[objective]), self.args.num_rounds
        return estimated_steps(self._sections[objective], rows, rounds, self._objectives[objective].epoch_steps)

    def train(self, resume_from_checkpoint: bool | None = None, *, allow_changed: Sequence[str] = ()) -> TrainOutput:
        """Run all stages that are not done yet.

        Args:
            resume_from_checkpoint: True goes on where the run in `output_dir` was cut off and starts where there is
                none. Otherwise the folder must not hold a run.
            allow_changed: Values that may differ from the run that goes on, as `sft.learning_rate`, or `ewc.` for all
                that begin so. They hold from the start of the stage under way. What cannot change within a run, such
                as data and rounds, is refused all the same.

        Returns:
            Steps of the run, mean of the logged training losses, and the final scores as `eval_<objective>/<metric>`.

        Raises:
            TypeError: If `resume_from_checkpoint` is a path, or `allow_changed` no list.
            ValueError: If `allow_changed` is given where nothing goes on.
            RunStateError: If `output_dir` holds another run, or one and `resume_from_checkpoint` is not set; if no
                complete state of the run is left; or if another process trains into it.
            StorageError: If the state cannot be written; the last one is untouched.
            FloatingPointError: If a loss, gradient, weight or importance is NaN or infinite; the stage's start is on
                disk.
            RunInterrupted: At SIGTERM or SIGINT, with everything saved; uncaught it ends the process with status 143
                or 130. A second signal ends the process at once.
        """
        check_request(resume_from_checkpoint, allow_changed, self.args.output_dir)
        with self._folder.locked():
            return self._train(self._begin(resume=bool(resume_from_checkpoint), allow_changed=allow_changed))

    def _train(self, run: Run) -> TrainOutput:
        self._run = run
        if run.state.next_stage == len(self._plan):
            logger.info("The run in %s is finished; nothing is left to train.", self.args.output_dir)
        total = run.state.global_step + self._steps_from(run.state.next_stage)
        name, host = next(iter(self._sections.items()))
        derived = self._objectives[name].derived
        reporter = RunReporter(self.args, self.model, self.state, total, host, derived)
        try:
            with cheap_garbage_collection(), self._request.listening():
                self._evaluate_if_due(run, reporter)
                for stage in self._plan[run.state.next_stage :]:
                    self._run_stage(stage, run, reporter)
                    self._request.raise_if_agreed()
                    self._evaluate_if_due(run, reporter)
        finally:
            self._close(reporter)
        return TrainOutput(self.state.global_step, mean_loss(self.state, self._objectives), self._scores.last())

    def _close(self, reporter: RunReporter) -> None:
        try:
            reporter.save()
            self._scores.draw()
        except OSError as error:  # all that counts is in the run's state; an error about that one says more
            logger.warning("Log and picture of the run are not up to date: %s", error)
        reporter.close()

    def _begin(self, *, resume: bool, allow_changed: Sequence[str]) -> Run:
        parameters, rewards = trainable_parameters(self.model), reward_names(self._objectives.values())
        what = (self.args, self._sections, self._train_dataset, parameters, self.model)
        described = fingerprint(*what, rewards=rewards, processing_class=self.processing_class)
        run = Run.open(
            self.args, self._folder, described, parameters,
            resume=resume, allow_changed=allow_changed, needs_initial=self._evaluator.needs_reference,
        )  # fmt: skip
        if not run.was_resumed:
            self.matrix.rows, self.state = [], TrainerState()
            return run
        run.load_weights(parameters)
        self.matrix.rows = list(run.state.evaluations)
        self.state = load_log(self._folder.path, run.state.global_step, run.state.log)
        return run

    def _run_stage(self, stage: Stage, run: Run, reporter: RunReporter) -> None:
        self._start.take()
        try:
            result = self._runner.run(
                stage,
                self._objectives[stage.objective],
                self._train_dataset[stage.objective],
                self._eval_dataset.get(stage.objective),
                folder=self._folder.path / stage.folder,
                run=run,
                reporter=reporter,
                steps_after=self._steps_from(stage.index + 1),
            )
        except FloatingPointError as error:
            self._folder.remove_stage(stage.folder)  # its checkpoints may hold the weights that led here
            if self.args.on_nan == "stop" or run.rollbacks(stage) == self.args.max_rollbacks:
                raise
            logger.warning("%s Back to the start of the stage, with half the learning rate.", error)
            run.roll_back(stage, trainable_parameters(self.model))
            reporter.forget_after(run.state.global_step)
            self._run_stage(stage, run, reporter)
            return
        run.state.log = reporter.save()
        run.commit_stage(stage, weights=trainable_parameters(self.model), **vars(result))
        self.state.global_step = run.state.global_step

    def _evaluate_if_due(self, run: Run, reporter: RunReporter) -> None:
        if self._eval_dataset and self._scores.are_due(run):
            self._scores.take(self.evaluate(), run, reporter)

    def _steps_from(self, first: int) -> int:
        return sum(self.estimated_steps(stage.objective) for stage in self._plan[first:])

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

    def save_model(self, output_dir: str | None = None) -> None:
        """Save model or adapter, tokenizer and model card. Every process has to call it; the main one writes.

        Args:
            output_dir: Folder; the run's where left out.

        Raises:
            StorageError: If the disk is full or may not be written to.
        """
        folder = Path(output_dir or self.args.output_dir)
        save(folder, self.model, self.processing_class)
        if is_main_process():
            write_model_card(folder, self.args, self.model, self.matrix)

    def push_to_hub(self, repo_id: str | None = None, *, private: bool | None = None) -> str:
        """Save and upload what `save_model` writes.

        Args:
            repo_id: Repository; the name of the run's folder where left out.
            private: Whether a new repository is private.

        Returns:
            Address of the commit; empty on other processes than the main one, which do not upload.
        """
        self.save_model()
        return upload(Path(self.args.output_dir), repo_id, private=private) if is_main_process() else ""
