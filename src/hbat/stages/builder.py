"""Builds an objective's trainer on the run's model, and leaves the model clean afterwards."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hbat.engines.backward import after_backward
from hbat.engines.deepspeed.bf16 import FullPrecision
from hbat.engines.deepspeed.request import drop_empty_groups, is_asked, left_aside
from hbat.engines.environment import forget_deepspeed
from hbat.engines.fsdp2 import is_loaded_in_shards, keep_sharded, let_go, without_checkpoints
from hbat.engines.sharded import is_sharded
from hbat.ewc.parameters import trainable_parameters
from hbat.model.adapters import REFERENCE_ADAPTER, load_adapter_as_it_was
from hbat.objectives.objective import Objective
from hbat.stages.guard import StageGuard
from hbat.stages.interruption import RunInterrupted
from hbat.stages.start import StageStart


class TrainerBuilder:
    """Builds one trainer at a time on one model.

    Args:
        model: The model, with its adapter where there is one.
        sections: Configuration of each objective.
        processing_class: The tokenizer.
        start: Holder of the stage's start.
    """

    def __init__(
        self, model: Any, sections: Mapping[str, TrainingArguments], processing_class: Any, start: StageStart
    ) -> None:
        self._model = model
        self._sections = sections
        self._processing_class = processing_class
        self._start = start

    @contextmanager
    def building(
        self,
        objective: Objective,
        folder: Path | str,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        seed_offset: int = 0,
        callbacks: Iterable[TrainerCallback] = (),
        frozen: Iterable[str] = (),
        for_evaluation: bool = False,
    ) -> Iterator[Trainer]:
        """Build an objective's trainer, and leave the model clean afterwards, whatever happens.

        Args:
            objective: The objective.
            folder: Folder for the host's checkpoints.
            train_dataset: Rows to train on.
            eval_dataset: Rows to evaluate on.
            seed_offset: Added to the objective's seed.
            callbacks: Callbacks of the trainer.
            frozen: Names of parameters that get no update.
            for_evaluation: The reference policy is given other weights before the trainer is used.

        Yields:
            The trainer, the only one alive.

        Raises:
            FloatingPointError: If the block does, on all processes.
            RunInterrupted: If the block does, on all processes.
        """
        rewards = objective.trainer_kwargs.get("reward_funcs")
        candidates = [self._model, self._start.reference, *(rewards if isinstance(rewards, list) else [rewards])]
        models = [each for each in candidates if isinstance(each, nn.Module)]
        guard, trainer, together = StageGuard(*models), None, False
        precision = FullPrecision(*(models if is_asked(self._sections[objective.name]) else ()))
        try:
            parameters = trainable_parameters(self._model)
            for name in frozen:
                parameters[name].requires_grad_(False)
            if REFERENCE_ADAPTER in getattr(self._model, "peft_config", {}):
                # It is there for the whole run, and the host has only to fill it. The guard takes this back.
                self._model.add_adapter = _nothing
            base = self._sections[objective.name]
            forget_deepspeed()  # a configuration that is built for another purpose tells the host of it too
            with _quiet_datasets(), left_aside(base, wanted=for_evaluation) as changes:
                unsaved = without_checkpoints(base) if is_loaded_in_shards(self._model) else {}
                args = objective.stage_args(base, str(folder), seed_offset, **changes, **unsaved)
                if for_evaluation and hasattr(args, "precompute_ref_log_probs"):
                    args.precompute_ref_log_probs = False
                trainer = objective.build_trainer(
                    model=self._model,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=self._processing_class,
                    reference=self._start.reference,
                    callbacks=list(callbacks),
                )
            precision.attach(trainer)
            self._complete(trainer)
            self._hold_frozen(trainer, [parameters[name] for name in frozen])
            yield trainer
            together = True
        except (FloatingPointError, RunInterrupted):  # which all processes agree on
            together = True
            raise
        finally:
            guard.restore(trainer, together=together)
            precision.give_back()
            if is_loaded_in_shards(self._model):
                let_go(self._model)

    def _complete(self, trainer: Trainer) -> None:
        if is_sharded(self._model) and not is_loaded_in_shards(self._model):
            keep_sharded(trainer)
        drop_empty_groups(trainer)
        self._start.complete_adapter()
        load_adapter_as_it_was(trainer)

    @staticmethod
    def _hold_frozen(trainer: Trainer, frozen: list[nn.Parameter]) -> None:
        # TRL's switch to the reference adapter and back sets `requires_grad` on the whole adapter, so gradients would
        # come up and count for the clipping norm.
        def drop(_: object) -> None:
            for each in frozen:
                each.grad = None

        if frozen:
            after_backward(trainer.accelerator, drop)


def _nothing(*_: object, **__: object) -> None:
    pass


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
