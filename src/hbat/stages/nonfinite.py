"""Stops a stage whose loss or gradient is NaN or infinite, before the optimizer takes a step from it."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from hbat.engines.engine import Engine
from hbat.engines.patches import after_backward, at_clipping
from hbat.engines.processes import largest_of_all
from hbat.engines.sharded import first_not_finite, whole_of
from hbat.ewc.parameters import canonical_name, trainable_parameters
from hbat.state.plan import Stage


class StopOnNonFinite(TrainerCallback):
    """Raises `FloatingPointError` before the optimizer's step; transformers would log an average instead and continue.

    The loss is checked on `on_pre_optimizer_step`, the gradient where it is clipped: its norm, which clipping needs
    anyway. Gradients in float16 are left to the loss scaling, whose business infinite ones are.
    """

    def __init__(self, trainer: Trainer, stage: Stage, engine: Engine) -> None:
        self._stage = stage
        self._trainer = trainer
        self._engine = engine
        self._bad: Tensor | None = None  # stays on the device, so that only one read per step waits for it
        self._checked_step = -1
        trainer.add_callback(self)
        after_backward(trainer.accelerator, self._note)
        if trainer.accelerator.scaler is None and not engine.clips_itself:
            at_clipping(trainer.accelerator, self._clip)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With an engine that clips inside its step: check the gradients before, it would silently skip the step."""
        if self._engine.clips_itself:
            model: Any = self._trainer.model
            local = self._engine.local(trainable_parameters(model))
            self._engine.before_clipping(self._trainer, lambda: self._require_finite(local.gradients()))

    def _require_finite(self, gradients: Mapping[str, Tensor]) -> None:
        name = first_not_finite(gradients)
        if name is not None:
            raise self._error(repr(name))

    def _note(self, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss).all()
        self._bad = bad if self._bad is None else self._bad | bad

    def _clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
        # torch's `clip_grad_norm_`, with a check of the norm in between: clipping would spread a NaN to all.
        self._require_finite_loss()
        parameters = list(parameters)
        norm = self._finite_norm(parameters, norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        self._checked_step = self._trainer.state.global_step
        return norm

    def _finite_norm(self, parameters: list[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole_of(torch.nn.utils.get_total_norm(gradients, norm_type=norm_type))
        if not bool(torch.isfinite(norm)):
            raise self._error(self._offender())
        return norm

    def _error(self, offender: str) -> FloatingPointError:
        return FloatingPointError(
            f"The gradient of {offender} is not finite in {self._stage} at its step "
            f"{self._trainer.state.global_step + 1}."
        )

    def _offender(self) -> str:
        model: Any = self._trainer.model
        gradients = {canonical_name(name): parameter.grad for name, parameter in model.named_parameters()}
        name = first_not_finite({name: gradient for name, gradient in gradients.items() if gradient is not None})
        return "all parameters together (each alone is finite)" if name is None else repr(name)

    def _require_finite_loss(self) -> None:
        bad, self._bad = self._bad, None
        # One process that stopped alone would leave the others waiting for it.
        if bad is not None and largest_of_all(bad):
            raise FloatingPointError(
                f"The loss is not finite in {self._stage} at its step {self._trainer.state.global_step + 1}."
            )

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Check losses and gradient, unless that was done where gradients are clipped.

        Raises:
            FloatingPointError: If one is not finite.
        """
        self._require_finite_loss()
        # transformers 4.57 asks for no norm where it does not clip.
        is_checked = self._checked_step == state.global_step or self._engine.clips_itself
        if not is_checked and self._trainer.accelerator.scaler is None:
            model: Any = self._trainer.model
            self._finite_norm(list(model.parameters()))


def require_finite(tensors: Mapping[str, Tensor], what: Literal["weight", "importance of"], stage: Stage) -> None:
    """Refuse what a stage leaves if it is NaN or infinite: it would spread to every later stage.

    Raises:
        FloatingPointError: If a tensor is not finite.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise FloatingPointError(f"The {what} {name!r} is not finite at the end of {stage}.")
