"""bf16 under DeepSpeed: stages hand over the float32 weights that its optimizer steps, not those it computes with.

DeepSpeed rounds a model in place when its engine is made, takes the optimizer's float32 weights from what is left, and
drops them with the engine: small updates would be rounded away in every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.patches import after_prepare


def engine_of(accelerator: Any) -> Any:
    """DeepSpeed's engine, once the accelerator has prepared a model for it."""
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def rounds_weights(trainer: Trainer) -> bool:
    """Whether a trainer's engine rounds the models that it is given."""
    return trainer.is_deepspeed_enabled and trainer.accelerator.mixed_precision == "bf16"


class FullPrecision(TrainerCallback):
    """Keeps the weights of models in their own precision through a stage whose engine rounds them.

    The optimizer's weights start from what is kept, and are gathered at the stage's end: a collective for each tensor.
    A stage that does not end gives back the weights of its start. What was loaded in bfloat16 stays so.

    Args:
        models: The trained model and others that the trainer may round, before it is built.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = [
            (parameter, parameter.data) for model in models for parameter in model.parameters()
        ]
        self._has_begun = False

    def attach(self, trainer: Trainer) -> None:
        """Attach to a stage's trainer before its engine is made."""
        if not rounds_weights(trainer):
            self._kept.clear()
            return
        # On the CPU, so that an accelerator holds the rounded weights alone.
        self._kept = [(parameter, kept.cpu()) for parameter, kept in self._kept]
        trainer.add_callback(self)
        after_prepare(trainer.accelerator, lambda: self._begin(trainer.accelerator))

    @torch.no_grad()
    def _begin(self, accelerator: Any) -> None:
        if self._has_begun or engine_of(accelerator) is None:  # evaluation batches are prepared later in the stage
            return
        self._has_begun = True
        for parameter, kept in self._stepped():
            parameter.set_full_hp_param(kept)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gather the optimizer's weights."""
        for parameter, kept in self._stepped():
            kept.copy_(parameter.get_full_hp_param())

    def _stepped(self) -> list[tuple[Any, Tensor]]:
        return [
            (parameter, kept)
            for parameter, kept in self._kept
            if parameter.dtype != kept.dtype and hasattr(parameter, "get_full_hp_param")
        ]

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the models the weights that are kept, once the engine is gone."""
        for parameter, kept in self._kept:
            if parameter.dtype != kept.dtype:
                parameter.data = kept.to(parameter.device)
        self._kept.clear()
