"""DeepSpeed in bfloat16: stages hand over the float32 weights that its optimizer steps, not those it computes with.

DeepSpeed (0.19) rounds a model in place when its engine is made, takes the float32 weights that the optimizer steps
from what is left, and drops them with the engine: in every stage anew, small updates would be rounded away.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.deepspeed.zero12 import engine_of


def rounds_weights(trainer: Trainer) -> bool:
    """Whether a trainer's engine rounds the models that it is given.

    Args:
        trainer: The trainer.

    Returns:
        True under DeepSpeed in bfloat16, whoever asked for it: arguments, configuration or launcher.
    """
    return trainer.is_deepspeed_enabled and trainer.accelerator.mixed_precision == "bf16"


class FullPrecision(TrainerCallback):
    """Keeps the precision of models through a stage whose engine rounds them.

    The engine's own weights begin with what is kept, and at the stage's end they are put together: a collective for
    each tensor. A stage that does not come to its end gives back the weights of its start. What was loaded in bfloat16
    stays so.

    Args:
        models: The model that is trained and others that the trainer may round, before it is built.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = [
            (each, each.data) for model in models for each in model.parameters()
        ]
        self._is_begun = False

    def attach(self, trainer: Trainer) -> None:
        """Attach to a stage's trainer.

        Args:
            trainer: The trainer, before its engine is made; a `StageGuard` takes back what is changed.
        """
        if not rounds_weights(trainer):
            self._kept.clear()
            return
        # In main memory, so that an accelerator holds the rounded weights alone.
        self._kept = [(parameter, kept.cpu()) for parameter, kept in self._kept]
        trainer.add_callback(self)
        accelerator: Any = trainer.accelerator
        prepare = accelerator.prepare

        def preparing(*objects: Any, **options: Any) -> Any:
            prepared = prepare(*objects, **options)
            if engine_of(accelerator) is not None:
                self._begin()
            return prepared

        accelerator.prepare = preparing

    @torch.no_grad()
    def _begin(self) -> None:
        if self._is_begun:  # batches for evaluation are prepared later in the stage
            return
        self._is_begun = True
        for parameter, kept in self._stepped():
            parameter.set_full_hp_param(kept)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the engine's own weights together."""
        for parameter, kept in self._stepped():
            kept.copy_(parameter.get_full_hp_param())

    def _stepped(self) -> list[tuple[Any, Tensor]]:  # parameters that have methods of DeepSpeed's
        return [
            (parameter, kept)
            for parameter, kept in self._kept
            if parameter.dtype != kept.dtype and hasattr(parameter, "get_full_hp_param")
        ]

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the models the weights that are kept, in their own precision, once the engine is gone."""
        for parameter, kept in self._kept:
            if parameter.dtype != kept.dtype:
                parameter.data = kept.to(parameter.device)
        self._kept.clear()
