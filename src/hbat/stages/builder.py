"""Builds an objective's trainer on the run's model, and leaves the model clean afterwards."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import Trainer, TrainerCallback

from hbat.engines.engine import Engine
from hbat.engines.environment import kept_environment, without_deprecations
from hbat.engines.patches import after_backward
from hbat.ewc.parameters import trainable_parameters
from hbat.model.adapters import complete_reference_adapter, keep_adapter_dtype, load_adapter_as_it_was
from hbat.model.copies import switch_off_dropout
from hbat.objectives.track import Track
from hbat.stages.guard import StageGuard
from hbat.stages.interruption import RunInterrupted
from hbat.stages.start import StageStart

_LEARNING_RATES = ("learning_rate", "critic_learning_rate")


@dataclass(frozen=True)
class TrainerBuilder:
    """Builds one trainer at a time on one model."""

    model: Any
    processing_class: Any
    start: StageStart
    engine: Engine
    keep_adapter_dtype: bool  # of a trained one, on a quantized base

    @contextmanager
    def building(  # noqa: PLR0913 - all but two by name
        self,
        track: Track,
        folder: Path | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        seed_offset: int = 0,
        callbacks: Iterable[TrainerCallback] = (),
        frozen: Iterable[str] = (),
        learning_rate_factor: float = 1.0,
        for_evaluation: bool = False,
    ) -> Iterator[Trainer]:
        """Build the trainer of a track, and leave the model clean afterwards, whatever happens.

        Args:
            track: The track.
            folder: Folder of the trainer's checkpoints; by default one that is gone afterwards.
            train_dataset: Rows to train on.
            eval_dataset: Rows to evaluate on.
            seed_offset: Added to the seeds of the track's arguments.
            callbacks: Callbacks of the trainer.
            frozen: Names of parameters that get no update.
            learning_rate_factor: Factor of every learning rate of the track's arguments.
            for_evaluation: The reference policy is given other weights before the trainer is used.

        Yields:
            The trainer, the only one alive.

        Raises:
            FloatingPointError: If the block does, on all processes.
            RunInterrupted: If the block does, on all processes.
        """
        models = self._models_of(track)
        rates = {name: getattr(track.args, name, None) for name in _LEARNING_RATES}
        slower = {name: rate * learning_rate_factor for name, rate in rates.items() if rate is not None}
        with (
            tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as output_dir,
            kept_environment(),
            without_deprecations(),
            self.engine.stage(models),
        ):
            guard, trainer, together = StageGuard(*models, engine=self.engine), None, False
            try:
                parameters = trainable_parameters(self.model)
                held = [parameters[name] for name in frozen]
                for parameter in held:
                    parameter.requires_grad_(False)
                given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "callbacks": list(callbacks)}
                trainer = self._build(track, output_dir, seed_offset, slower, evaluating=for_evaluation, **given)
                _hold(trainer, held)
                yield trainer
                together = True
            except (FloatingPointError, RunInterrupted):  # which all processes agree on
                together = True
                raise
            finally:
                guard.restore(trainer, together=together)

    def _models_of(self, track: Track) -> list[nn.Module]:
        rewards = track.objective.trainer_kwargs.get("reward_funcs")
        candidates = [self.model, self.start.reference, *(rewards if isinstance(rewards, list) else [rewards])]
        return [model for model in candidates if isinstance(model, nn.Module)]

    def _build(
        self,
        track: Track,
        folder: str,
        seed_offset: int,
        rates: Mapping[str, float],
        *,
        evaluating: bool,
        **given: Any,
    ) -> Trainer:
        with (
            _quiet_datasets(),
            self.engine.building(track.args, evaluating=evaluating) as changes,
            complete_reference_adapter(self.model),
            keep_adapter_dtype(self.model) if self.keep_adapter_dtype else nullcontext(),
        ):
            args: Any = track.objective.stage_args(track.args, folder, seed_offset, **rates, **changes)
            if evaluating and hasattr(args, "precompute_ref_log_probs"):
                args.precompute_ref_log_probs = False
            if getattr(args, "dataset_num_proc", None):  # datasets warns where there are fewer rows than processes
                fewest = min(len(rows) for rows in (given["train_dataset"], given["eval_dataset"]) if rows is not None)
                args.dataset_num_proc = min(args.dataset_num_proc, fewest) if fewest > 1 else None
            trainer = track.objective.build_trainer(
                model=self.model,
                args=args,
                processing_class=self.processing_class,
                reference=self.start.reference,
                **given,
            )
        self.engine.adapt(trainer)
        if getattr(trainer.args, "disable_dropout", False):  # TRL leaves the attention's own dropout on
            for model in (self.model, self.start.reference):
                if model is not None:
                    switch_off_dropout(model)
        self.start.complete_adapter()
        load_adapter_as_it_was(trainer)
        return trainer


def _hold(trainer: Trainer, frozen: list[nn.Parameter]) -> None:
    # TRL's switch to the reference adapter and back sets `requires_grad` on the whole adapter, so frozen parameters
    # would get gradients, which count for the clipping norm.
    def drop(_: object) -> None:
        for parameter in frozen:
            parameter.grad = None

    if frozen:
        after_backward(trainer.accelerator, drop)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    # The run has one progress bar; tokenising a stage's part would draw another.
    quiet_before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not quiet_before:
            enable_progress_bars()
