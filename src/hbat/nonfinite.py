"""Stops a stage whose loss is NaN or infinite, before the optimizer takes a step from it."""

from collections.abc import Mapping

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
        if bad is not None and _anywhere(bad):
            raise FloatingPointError(
                f"The loss is not finite in {self._stage} at its step {state.global_step + 1}.{_advice(self._stage)}"
            )


def require_finite_weights(parameters: Mapping[str, Tensor], stage: Stage) -> None:
    """Refuse to go on from weights that are NaN or infinite: a gradient can be so where the loss was not.

    Args:
        parameters: Weights at the stage's end, by name.
        stage: The stage, for the message.

    Raises:
        FloatingPointError: If one is not finite.
    """
    for name, each in parameters.items():
        if not bool(torch.isfinite(each).all()):
            raise FloatingPointError(f"The weight {name!r} is not finite at the end of {stage}.{_advice(stage)}")


def _anywhere(bad: Tensor) -> bool:
    # One process that stopped alone would leave the others waiting for it.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flag = bad.float()
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        bad = flag
    return bool(bad)


def _advice(stage: Stage) -> str:
    return (
        f" The weights at the stage's start are on disk: lower the learning rate of `{stage.objective}` and train "
        "into a new folder, or fix the data."
    )
