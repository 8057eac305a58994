"""Runs one stage: builds its trainer, holds it back, trains, measures what it moved, and leaves a clean model."""

import functools
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.data.load import DatasetError
from hbat.engines.deepspeed.bf16 import rounds_weights
from hbat.engines.fsdp2 import is_loaded_in_shards
from hbat.ewc.callback import EWCCallback
from hbat.ewc.fisher import Example, diagonal_fisher
from hbat.ewc.importance import displacement
from hbat.ewc.parameters import trainable_parameters
from hbat.objectives.objective import Objective
from hbat.reports.reporter import ForwardLogs, RunReporter
from hbat.stages.builder import TrainerBuilder
from hbat.stages.callbacks import HookLimit, KeepEpoch
from hbat.stages.checkpoints import SealCheckpoints, last_checkpoint, named_checkpoint
from hbat.stages.interruption import StopAtStep, StopRequest
from hbat.stages.learning_rate import extend_schedule
from hbat.stages.moments import CarryMoments
from hbat.stages.nonfinite import StopOnNonFinite, require_finite_importance, require_finite_weights
from hbat.stages.start import StageStart
from hbat.state.consolidation import Consolidation
from hbat.state.files import storage_errors
from hbat.state.plan import Stage, part_indices
from hbat.state.run import Run

logger = logging.getLogger(__name__)


def report_left_out(trainer: Trainer, stage: Stage, rows: int) -> None:
    """Say how many rows of a stage the host has left out: TRL does so where a prompt alone fills `max_length`.

    Args:
        trainer: The stage's trainer.
        stage: The stage.
        rows: Number of rows that it was given.

    Raises:
        DatasetError: If no row is left.
    """
    prepared: Any = trainer.train_dataset
    left = len(prepared) if hasattr(prepared, "__len__") else rows
    length = getattr(trainer.args, "max_length", None)
    why = f"`{stage.objective}.max_length` is {length}, which the prompt alone fills or nothing to learn is left below"
    if left == 0:
        raise DatasetError(
            f"{stage}: none of the {rows} rows of train_dataset[{stage.objective!r}] is left to train on: {why}. "
            "Raise it, or give shorter prompts."
        )
    if left < rows and not getattr(trainer.args, "packing", False):
        logger.warning(
            "%s: %d of %d rows of train_dataset[%r] are left out by the trainer: %s.",
            stage, rows - left, rows, stage.objective, why,
        )  # fmt: skip


_STEP_BACK = 0.5  # learning rate of a stage that was rolled back, over what it was


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves beside the model's weights.

    Attributes:
        steps: Its optimizer steps.
        importance: Raw importance that it yields; None without consolidation.
        moments: Optimizer moments for the objective's next stage; empty if they are reset.
        kept: What the objective keeps for its next stage beside the model.
    """

    steps: int
    importance: Mapping[str, Tensor] | None
    moments: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]


class StageRunner:
    """Runs the stages of a run on one model.

    Args:
        model: The model, with its adapter where there is one.
        config: The run's configuration.
        sections: Configuration of each objective.
        callbacks: The user's callbacks, for every stage.
        builder: Builder of the stages' trainers.
        start: Holder of the stage's start.
        request: Where signals are remembered.
    """

    def __init__(
        self,
        model: Any,
        config: HBATConfig,
        sections: Mapping[str, TrainingArguments],
        callbacks: list[TrainerCallback],
        builder: TrainerBuilder,
        start: StageStart,
        request: StopRequest,
    ) -> None:
        self._model = model
        self._config = config
        self._sections = sections
        self._callbacks = callbacks
        self._builder = builder
        self._start = start
        self._request = request

    def run(
        self,
        stage: Stage,
        objective: Objective,
        dataset: Dataset,
        eval_dataset: Dataset | None,
        *,
        folder: Path,
        run: Run,
        reporter: RunReporter,
        steps_after: int,
    ) -> StageResult:
        """Train one stage. The stage's start must have been taken.

        Args:
            stage: The stage.
            objective: Its objective.
            dataset: All training rows of the objective; the stage takes its part.
            eval_dataset: Rows for the host's own evaluation inside the stage, where its configuration asks for one.
            folder: The stage's folder.
            run: The run; what the stage's objective carries is taken out of it.
            reporter: The run's reporter.
            steps_after: Estimate of the run's steps after this stage.

        Raises:
            RunInterrupted: If a signal stopped the stage; its checkpoint is saved.

        Returns:
            What the stage leaves. The model's weights are those of its end, averaged with its start where that is set.
        """
        consolidation = run.consolidation
        carry = CarryMoments(run.moments.pop(stage.objective, {}))
        kept = run.kept.pop(stage.objective, {})
        begins_anew = is_loaded_in_shards(self._model)
        interruption = StopAtStep(self._request, saves=not begins_anew)
        carries = self._config.optimizer_state == "carry"
        evaluates = str(getattr(self._sections[stage.objective].eval_strategy, "value", "no")) != "no"
        part = dataset.select(part_indices(len(dataset), stage.num_rounds, stage.round, self._config.seed))
        if not objective.uses_reference:
            self._start.set_aside()
        with self._builder.building(
            objective,
            folder,
            train_dataset=part,
            eval_dataset=eval_dataset if evaluates else None,
            seed_offset=stage.index,
            callbacks=[
                *([carry] if carries else []),
                HookLimit(),
                KeepEpoch(),
                *self._callbacks,
                interruption,
                SealCheckpoints(),
                ForwardLogs(reporter, stage, steps_after),
            ],
            frozen=consolidation.frozen(stage) if consolidation is not None else (),
        ) as trainer:
            report_left_out(trainer, stage, len(part))
            trainer.args.learning_rate *= _STEP_BACK ** run.rollbacks(stage)
            if not rounds_weights(trainer):
                self._start.share_adapter()
            extend_schedule(
                trainer,
                self._config.lr_schedule_of(stage.objective),
                round_index=stage.round,
                num_rounds=stage.num_rounds,
                steps_before=run.state.objective_steps.get(stage.objective, 0),
            )
            self._hold_back(trainer, stage, consolidation)
            StopOnNonFinite(trainer, stage)
            if kept and objective.restores is not None:
                objective.restores(trainer, kept)
            resumes_at = functools.partial(objective.resumes_at, trainer.args, len(part))
            checkpoint = None if begins_anew else last_checkpoint(folder, trainer.args.max_steps, resumes_at)
            with storage_errors(folder), named_checkpoint(checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint)
            if interruption.stopped:
                self._request.raise_if_agreed()
            steps = trainer.state.global_step
            kept = _copies(objective.keeps(trainer)) if objective.keeps is not None else {}
            examples = self._fisher_examples(objective, trainer.train_dataset)
        require_finite_weights(trainable_parameters(self._model), stage)
        self._keep_end(self._config.end_weight_of(stage.objective))
        yielded = self._yielded(stage, consolidation, examples)
        require_finite_importance(yielded or {}, stage)
        return StageResult(steps, yielded, carry.saved if carries else {}, kept)

    def _hold_back(self, trainer: Trainer, stage: Stage, consolidation: Consolidation | None) -> None:
        if consolidation is None or consolidation.config.f_max == 0:
            return
        importance = consolidation.importance(stage)
        if importance is not None:
            config = consolidation.config
            callback = EWCCallback(
                importance,
                # The engine's own weights begin with the stage's start, which the reference policy is rounded from.
                None if rounds_weights(trainer) else self._start.anchor,
                f_max=config.f_max,
                method=config.method,
                anchor_device=config.anchor_device,
            )
            callback.bind(trainer)

    @torch.no_grad()
    def _keep_end(self, share: float) -> None:
        if share == 1.0:
            return
        for name, each in trainable_parameters(self._model).items():
            start = self._start.anchor[name].to(each.device).float()
            each.copy_(start + share * (each.float() - start))

    def _yielded(
        self, stage: Stage, consolidation: Consolidation | None, examples: list[Example]
    ) -> Mapping[str, Tensor] | None:
        if consolidation is None or (consolidation.config.f_max == 0 and consolidation.config.freeze == 0):
            return None
        config, parameters = consolidation.config, trainable_parameters(self._model)
        if config.source == "displacement":
            # To the CPU one by one, so that an accelerator never holds a float32 copy of the whole model.
            return displacement(parameters, self._start.anchor, config.granularity, device="cpu")
        if config.source == "fisher":
            return diagonal_fisher(
                self._model,
                examples,
                estimator=config.estimator,
                granularity=config.granularity,
                batch_size=config.fisher_batch_size,
                generator=torch.Generator().manual_seed(self._config.seed + stage.index),
            )
        return consolidation.control(parameters, stage)

    def _fisher_examples(self, objective: Objective, rows: Any) -> list[Example]:
        ewc = self._config.ewc
        if ewc is None or ewc.source != "fisher" or objective.examples is None:
            return []
        count = min(len(rows), ewc.fisher_samples)
        spread = (rows[index * len(rows) // count] for index in range(count))
        sequences = itertools.chain.from_iterable(map(objective.examples, spread))  # a packed row holds several
        return list(itertools.islice(sequences, ewc.fisher_samples))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.detach().to("cpu", copy=True) for name, each in tensors.items()}
