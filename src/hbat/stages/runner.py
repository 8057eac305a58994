"""Runs one stage: builds its trainer, holds it back, trains, measures what it moved, and leaves a clean model."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer

from hbat.config.hbat import HBATConfig
from hbat.engines.engine import Engine
from hbat.ewc.callback import EWCCallback
from hbat.ewc.parameters import trainable_parameters
from hbat.objectives.track import Track
from hbat.reports.reporter import ForwardLogs, RunReporter
from hbat.stages.builder import TrainerBuilder
from hbat.stages.callbacks import HookLimit, KeepEpoch, LogLastStep, TellPlace
from hbat.stages.checkpoints import SealCheckpoints, last_checkpoint, named_checkpoint
from hbat.stages.costs import StageCosts
from hbat.stages.dropped_rows import report_dropped_rows
from hbat.stages.importance import fisher_examples, is_used, measure
from hbat.stages.interruption import StopAtStep, StopRequest
from hbat.stages.learning_rate import extend_schedule
from hbat.stages.moments import CarryMoments
from hbat.stages.nonfinite import StopOnNonFinite, require_finite
from hbat.stages.path import PathIntegral
from hbat.stages.replay import Replay, prepare_replay
from hbat.stages.start import StageStart
from hbat.state.consolidation import Record
from hbat.state.files import storage_errors
from hbat.state.plan import Stage
from hbat.state.run import Run

_STEP_BACK = 0.5  # factor of the learning rate, each time a stage is rolled back


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves beside the model's weights.

    Attributes:
        steps: Its optimizer steps.
        importance: What it leaves to its objective's importance; None without consolidation.
        moments: Optimizer moments for the objective's next stage; empty if they are reset.
        kept: State that the objective keeps for its next stage beside the model.
        counted: For its costs: `tokens`, `resumed_at` if it was resumed inside, `ewc_ratio` if it was measured.
    """

    steps: int
    importance: Record | None
    moments: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    counted: Mapping[str, float]


@dataclass(frozen=True)
class StageRunner:
    """Runs the stages of a run on one model."""

    model: Any
    config: HBATConfig
    builder: TrainerBuilder
    start: StageStart
    engine: Engine
    request: StopRequest
    replayed: Track | None  # whose rows the other stages replay

    def run(
        self, stage: Stage, track: Track, *, folder: Path, run: Run, reporter: RunReporter, later: Mapping[str, int]
    ) -> StageResult:
        """Train one stage, whose start must have been taken. The model's weights are then those of its end.

        Those of the run's last stage are moved by `end_weight`. The state that the stage's objective carries is taken
        out of the run. `later` has the estimated steps of the stages after this one, by objective.

        Raises:
            RunInterrupted: If a signal stopped the stage; its checkpoint is saved.
        """
        objective, consolidation = track.objective, run.consolidation
        carry = CarryMoments(run.moments.pop(stage.objective, {}), self.engine)
        kept = run.kept.pop(stage.objective, {})
        carries = [carry] if self.config.optimizer_state == "carry" else []
        stop = StopAtStep(self.request, saves=self.engine.resumes_inside_stage)
        own = [TellPlace(stage, run.state.global_step), LogLastStep(), HookLimit(), KeepEpoch()]
        costs = StageCosts(run.clock)
        last = [stop, SealCheckpoints(), ForwardLogs(reporter, stage, later), costs]
        part = track.part(stage, self.config.seed)
        replay = self._replay(stage, track)
        with self.builder.building(
            track,
            folder,
            train_dataset=part,
            eval_dataset=track.eval_dataset if track.args.eval_strategy != "no" else None,
            seed_offset=stage.index,
            callbacks=[*carries, *own, *track.callbacks, *last],
            frozen=consolidation.frozen(stage, trainable_parameters(self.model)) if consolidation is not None else (),
            learning_rate_factor=_STEP_BACK ** run.rollbacks(stage),
        ) as trainer:
            report_dropped_rows(trainer, "train", len(part), stage.objective, str(stage))
            checkpoint = self._checkpoint(track, trainer, len(part), folder)
            if replay is not None:
                replay.bind(trainer, self.engine)
            extend_schedule(
                trainer,
                self.config.lr_schedule_of(stage.objective),
                round_index=stage.part,
                num_rounds=stage.num_rounds,
                steps_before=run.state.objective_steps.get(stage.objective, 0),
                ahead=track.rows_ahead(stage.num_rounds, stage.part),
            )
            penalty, path = self._consolidate(trainer, stage, run, checkpoint)
            StopOnNonFinite(trainer, stage, self.engine)
            if kept:
                objective.load_state_dict(trainer, kept)
            with storage_errors(folder), named_checkpoint(checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint)
            if stop.stopped:
                self.request.raise_if_agreed()
            steps, kept = trainer.state.global_step, _copies(objective.state_dict(trainer))
            examples = fisher_examples(consolidation, objective, trainer.train_dataset)
        require_finite(trainable_parameters(self.model), "weight", stage)
        if stage.is_last:
            self.start.interpolate(self.config.end_weight)
        anchor, seed = self.start.anchor, self.config.seed
        integral = path.total if path is not None else {}
        with run.clock.timing("ewc"):
            importance = measure(consolidation, self.model, anchor, integral, examples, stage=stage, seed=seed)
        for tensors in (importance or {}).values():
            require_finite(tensors, "importance of", stage)
        return StageResult(steps, importance, carry.saved if carries else {}, kept, _counted(costs, penalty))

    def _replay(self, stage: Stage, track: Track) -> Replay | None:
        if self.replayed is None or self.replayed.name == stage.objective:
            return None
        share, seed = self.config.replay_share, self.config.seed
        return prepare_replay(stage, track, self.replayed, self.builder, share=share, seed=seed)

    def _consolidate(
        self, trainer: Trainer, stage: Stage, run: Run, checkpoint: str | None
    ) -> tuple[EWCCallback | None, PathIntegral | None]:
        precise = self.engine.keeps_precision(trainer)
        if precise:
            self.start.share_adapter()
        consolidation, timing = run.consolidation, partial(run.clock.timing, "ewc")
        if not is_used(consolidation):
            return None, None
        config, importance, penalty = consolidation.config, None, None
        if config.strength > 0:
            importance = consolidation.importance(stage, trainable_parameters(self.model))
        if importance is not None:
            # Weights that the engine keeps more precisely than the model begin with the start that it rounded.
            anchor = self.start.anchor if precise else None
            penalty = EWCCallback(importance, anchor, strength=config.strength, method=config.method).bind(trainer)
            penalty.timing = timing
        if config.source != "path":
            return penalty, None
        return penalty, PathIntegral(trainer, self.engine, self.start.anchor, checkpoint, timing)

    def _checkpoint(self, track: Track, trainer: Trainer, rows: int, folder: Path) -> str | None:
        if not self.engine.resumes_inside_stage:
            return None
        can_resume_at = partial(track.objective.can_resume_at, trainer.args, rows)
        return last_checkpoint(folder, trainer.args.max_steps, can_resume_at)


def _counted(costs: StageCosts, penalty: EWCCallback | None) -> dict[str, float]:
    counted: dict[str, float] = {"tokens": costs.tokens}
    if costs.resumed_at:
        counted["resumed_at"] = costs.resumed_at
    if penalty is not None and penalty.ratio is not None:
        counted["ewc_ratio"] = round(penalty.ratio, 4)
    return counted


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
