"""Stops a stage whose loss or gradient is NaN or infinite, before the optimizer takes a step from it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.backward import after_backward
from hbat.engines.deepspeed.zero3 import Partitions, shares
from hbat.engines.deepspeed.zero12 import Fragments, before_step, engine_of
from hbat.engines.sharded import first_not_finite, whole_of
from hbat.ewc.parameters import canonical_name, trainable_parameters
from hbat.state.plan import Stage


class StopOnNonFinite(TrainerCallback):
    """Raises `FloatingPointError` before the optimizer's step; the host would log an average instead and go on.

    The loss is looked at on `on_pre_optimizer_step`, the gradient where the host clips it: its norm, which the host
    needs anyway. Gradients in float16 are left to the loss scaling, whose business infinite ones are.

    Args:
        trainer: The stage's trainer.
        stage: The stage, for the message.
    """

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self._stage = stage
        self._trainer = trainer
        self._bad: Tensor | None = None  # stays on the device, so that only one read a step waits for it
        self._looked_at = -1  # step at which the gradient has been looked at
        trainer.add_callback(self)
        after_backward(trainer.accelerator, self._see)
        if trainer.accelerator.scaler is None and not trainer.is_deepspeed_enabled:
            trainer.accelerator.clip_grad_norm_ = self._clip

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Under DeepSpeed: look at the gradient before the engine's step, which would be left out without a word."""
        engine = engine_of(self._trainer.accelerator)
        if engine is not None:
            model: Any = self._trainer.model
            own = shares(trainable_parameters(model))
            before_step(engine, lambda: self._require_finite_shares(own))

    def _require_finite_shares(self, own: Fragments | Partitions) -> None:
        name = first_not_finite(own.gradients())
        if name is not None:
            raise self._error(repr(name))

    def _see(self, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def _clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        # What torch's `clip_grad_norm_` does, with a look at the norm in between: clipping would spread a NaN to all.
        self._require_finite_loss()
        parameters = list(parameters)
        norm = self._finite_norm(parameters, norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        self._looked_at = self._trainer.state.global_step
        return norm

    def _finite_norm(self, parameters: list[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        gradients = [each.grad for each in parameters if each.grad is not None]
        norm = whole_of(torch.nn.utils.get_total_norm(gradients, norm_type=norm_type))
        if not bool(torch.isfinite(norm)):
            raise self._error(self._offender())
        return norm

    def _error(self, offender: str) -> FloatingPointError:
        return FloatingPointError(
            f"The gradient of {offender} is not finite in {self._stage} at its step "
            f"{self._trainer.state.global_step + 1}.{_advice(self._stage)}"
        )

    def _offender(self) -> str:
        model: Any = self._trainer.model
        gradients = {canonical_name(name): each.grad for name, each in model.named_parameters()}
        name = first_not_finite({name: each for name, each in gradients.items() if each is not None})
        return "all parameters together (each alone is finite)" if name is None else repr(name)

    def _require_finite_loss(self) -> None:
        bad, self._bad = self._bad, None
        if bad is not None and _anywhere(bad):
            raise FloatingPointError(
                f"The loss is not finite in {self._stage} at its step {self._trainer.state.global_step + 1}."
                f"{_advice(self._stage)}"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at losses and gradient, unless that has been done where gradients are clipped.

        Raises:
            FloatingPointError: If one was not finite.
        """
        self._require_finite_loss()
        # transformers 4.57 asks for no norm where it does not clip.
        looked_at = self._looked_at == state.global_step or engine_of(self._trainer.accelerator) is not None
        if not looked_at and self._trainer.accelerator.scaler is None:
            model: Any = self._trainer.model
            self._finite_norm(list(model.parameters()))


def require_finite_importance(importance: Mapping[str, Tensor], stage: Stage) -> None:
    """Refuse importance that is NaN or infinite: it would spread to every stage to come.

    Args:
        importance: What a stage yielded, by name.
        stage: The stage, for the message.

    Raises:
        FloatingPointError: If one is not finite.
    """
    name = first_not_finite(importance)
    if name is not None:
        raise FloatingPointError(f"The importance of {name!r} from {stage} is not finite.{_advice(stage)}")


def require_finite_weights(parameters: Mapping[str, Tensor], stage: Stage) -> None:
    """Refuse to go on from weights that are NaN or infinite: a gradient can be so where the loss was not.

    Args:
        parameters: Weights at the stage's end, by name.
        stage: The stage, for the message.

    Raises:
        FloatingPointError: If one is not finite.
    """
    name = first_not_finite(parameters)
    if name is not None:
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
