"""Stops a stage whose loss is NaN or infinite, before the optimizer takes a step from it."""

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.ewc.backward import after_backward
from hbat.rounds import Stage


class StopOnNonFiniteLoss(TrainerCallback):
    """Raises `FloatingPointError` on `on_pre_optimizer_step`; the host would log an average instead and go on.

    Args:
        trainer: The stage's trainer.
        stage: The stage, for the message.
    """

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self._stage = stage
        self._bad: Tensor | None = None  # stays on the device, so that only one read a step waits for it
        trainer.add_callback(self)
        after_backward(trainer.accelerator, self._see)

    def _see(self, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at the losses of the step's micro-batches.

        Raises:
            FloatingPointError: If one was not finite.
        """
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise FloatingPointError(
                f"The loss is not finite in {self._stage} at its step {state.global_step + 1}. The weights at the "
                f"stage's start are on disk: lower the learning rate of `{self._stage.objective}` and train into a "
                "new folder, or fix the data."
            )
