"""EWCCallback: when the penalty acts in a `transformers.Trainer`, and what it logs. The formulas are in `penalty`."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.ewc.backward import after_backward
from hbat.ewc.fragments import Fragments, before_step, engine_of
from hbat.ewc.parameters import policy_of, require_counterparts, snapshot, trainable_parameters
from hbat.ewc.penalty import add_penalty_gradient_, proximal_step_
from hbat.ewc.shards import shared_as
from hbat.ewc.statistics import PenaltyStatistics, measure_penalty
from hbat.ewc_config import Method
from hbat.refusals import REFUSALS
from hbat.unsupported import refuse_arguments, refuse_trainer
from hbat.zero import is_asked

#: Largest ratio of the penalty's gradient norm to the task's in a stage, below which the penalty is called dead.
_DEAD_RATIO = 1e-4
#: Mean ratio above which the penalty is said to dominate the task.
_DOMINATING_RATIO = 10.0
#: A verdict needs this many measured steps; at the first step of a stage the penalty is zero by definition.
_MEASURED_STEPS = 3


class EWCWarning(UserWarning):
    """The penalty does nothing, or nothing but the penalty does. Silence it with `warnings.filterwarnings`."""


class EWCCallback(TrainerCallback):
    r"""Holds training back with an EWC penalty, in any trainer that is a `transformers.Trainer`. Changes gradients.

    With `method="gradient"` the gradient of `f_max * sum_k F_k * ||theta_k - anchor_k||^2` joins the task's before
    clipping: bound to a trainer (`bind`) it is added after the backward pass of the synchronising micro-step; passed
    in `callbacks=[...]` alone, it is laid into `.grad` on `on_step_begin`, before the first micro-step. Both are
    exactly the gradient of loss + penalty; bound, the gradients need no memory during the forward pass. With
    `method="proximal"` the weights are pulled on `on_optimizer_step`.

    The logged `loss` stays the task's. Beside it are logged `ewc/penalty` (the penalty's value), `ewc/drift` (root
    mean square of the difference from the anchor) and, with the gradient method, `ewc/grad_norm_ratio` (norm of the
    penalty's gradient over the task's, before clipping). An `EWCWarning` at the end says if the penalty was dead or
    dominated. One instance can serve several `train()` calls, one after the other.

    Args:
        importance: $F \ge 0$ by parameter name: numbers, tensors of shape `()`, or of the parameter's shape.
        anchor: Weights to pull to, by parameter name. None: the weights at the start of each `train()`.
        f_max: Strength of the penalty.
        method: `gradient` or `proximal`.
    """

    def __init__(
        self,
        importance: Mapping[str, Tensor | float],
        anchor: Mapping[str, Tensor] | None = None,
        *,
        f_max: float = 1.0,
        method: Method = "gradient",
    ) -> None:
        if not f_max >= 0:  # NaN is not
            raise ValueError(f"`f_max` is {f_max}; it must be at least 0.")
        if method not in {"gradient", "proximal"}:
            raise ValueError(f"`method` is {method!r}; it must be 'gradient' or 'proximal'.")
        self.importance = importance
        self.anchor = anchor
        self.f_max = f_max
        self.method = method
        self._trainer: Trainer | None = None
        self._reset()

    def _reset(self) -> None:
        self._parameters: Mapping[str, Tensor] = {}
        self._fragments: Fragments | None = None
        self._anchor: Mapping[str, Tensor] = {}
        self._importance: dict[str, Tensor | float] = {}
        self._undo: Callable[[], None] | None = None
        self._measured: PenaltyStatistics | None = None
        self._ratios: list[float] = []

    def bind(self, trainer: Trainer) -> "EWCCallback":
        """Attach to a trainer, as its first callback, so that every reporter sees the added log entries.

        Args:
            trainer: The trainer, before `train()`.

        Returns:
            The callback itself.
        """
        refuse_trainer(trainer.args, trainer.model)
        if self.method == "proximal" and is_asked(trainer.args):
            raise REFUSALS["proximal steps under DeepSpeed"].error()
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the parameters, the anchor and the importance as this `train()` needs them.

        Raises:
            ValueError: If training resumes without an `anchor`.
        """
        self._detach()
        refuse_arguments(args)
        if self._trainer is not None and self._trainer.state is not state:
            self._trainer = None  # bound to another trainer, and now passed to this one in `callbacks`
        if model is None or self.f_max == 0:
            return
        refuse_trainer(args, model)
        if self._trainer is None and is_asked(args):
            raise REFUSALS["EWCCallback alone under DeepSpeed"].error()
        if self.anchor is None and state.global_step > 0:
            raise ValueError(
                f"`EWCCallback` has no `anchor` and training resumes at step {state.global_step}: the weights are no "
                "longer those of the start. Save `snapshot(...)` of the start and pass it as `anchor`."
            )
        parameters = trainable_parameters(policy_of(model))
        anchor = snapshot(parameters) if self.anchor is None else self.anchor
        require_counterparts(parameters, anchor, "anchor")
        require_counterparts(parameters, self.importance, "importance")
        self._parameters = parameters
        self._anchor = {
            name: shared_as(anchor[name].detach(), each).to(each.device) for name, each in parameters.items()
        }
        self._importance = {name: _beside(self.importance[name], each) for name, each in parameters.items()}
        engine = None if self._trainer is None else engine_of(self._trainer.accelerator)
        if engine is not None:
            self._take_fragments(parameters)
            self._undo = before_step(engine, self._before_step)
        elif self.method == "gradient" and self._trainer is not None:
            self._undo = after_backward(self._trainer.accelerator, self._after_backward)

    def _take_fragments(self, parameters: dict[str, nn.Parameter]) -> None:
        self._fragments = Fragments(parameters)
        self._anchor, self._importance = self._fragments.of(self._anchor), self._fragments.of(self._importance)
        self._parameters = self._fragments.weights

    def _before_step(self) -> None:
        if self._fragments is not None:
            self._fragments.take_gradients()
            self._add_pull()
            self._fragments.let_go()

    def _after_backward(self, loss: Tensor) -> None:
        if self._trainer is not None and self._trainer.accelerator.sync_gradients:
            self._add_pull()

    def _add_pull(self) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        scaler = trainer.accelerator.scaler
        measured = add_penalty_gradient_(
            self._parameters,
            self._anchor,
            self._importance,
            strength=self.f_max,
            scale=1.0 if scaler is None else scaler.get_scale(),
            measure=_is_logged(trainer.args, trainer.state),
        )
        if measured is not None:
            self._measured = measured

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without a trainer: lay the penalty's gradient down for the backward passes to add to."""
        if self.method != "gradient" or self._trainer is not None or not self._parameters:
            return
        for each in self._parameters.values():
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        add_penalty_gradient_(self._parameters, self._anchor, self._importance, strength=self.f_max, scale=scale)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without a trainer: measure, where the sum of both gradients lies clipped."""
        if self.method == "gradient" and self._trainer is None and self._parameters and _is_logged(args, state):
            self._measured = measure_penalty(
                self._parameters, self._anchor, self._importance, strength=self.f_max, gradient_scale=1.0
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With the proximal method: pull the weights, with the learning rates of the step just taken."""
        optimizer = kwargs.get("optimizer")
        if self.method != "proximal" or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        learning_rates = {name: float(rates[id(each)]) for name, each in self._parameters.items() if id(each) in rates}
        proximal_step_(
            self._parameters, self._anchor, self._importance, strength=self.f_max, learning_rates=learning_rates
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the penalty's numbers beside the training loss."""
        if logs is None or "loss" not in logs or not self._parameters:
            return
        entry = self._entry(logs.get("grad_norm"))
        logs.update(entry)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(entry)

    def _entry(self, total_norm: float | None) -> dict[str, float]:
        measured, self._measured = self._measured, None
        if measured is None:
            measured = measure_penalty(self._parameters, self._anchor, self._importance, strength=self.f_max)
            ratio = {}
        else:
            task = float(measured.task_gradient_norm)
            if self._trainer is None:
                task = _task_norm(measured, total_norm)
            ratio = {"ewc/grad_norm_ratio": float(measured.gradient_norm) / task if task > 0 else 0.0}
            self._ratios.extend(ratio.values())
        return {"ewc/penalty": float(measured.penalty), "ewc/drift": float(measured.drift)} | ratio

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say if the penalty was dead or dominated, and let go of the trainer's tensors."""
        if len(self._ratios) >= _MEASURED_STEPS:
            self._judge(max(self._ratios), sum(self._ratios) / len(self._ratios))
        self._detach()

    def _judge(self, largest: float, mean: float) -> None:
        if largest < _DEAD_RATIO:
            warnings.warn(
                f"The EWC penalty did nothing: its gradient reached at most {largest:.1e} of the task's. "
                f"Raise `f_max` (now {self.f_max:g}), or set `ewc=None`.",
                EWCWarning,
                stacklevel=2,
            )
        elif mean > _DOMINATING_RATIO:
            warnings.warn(
                f"The EWC penalty dominated: its gradient was {mean:.1f} times the task's on average. "
                f"Lower `f_max` (now {self.f_max:g}).",
                EWCWarning,
                stacklevel=2,
            )

    def _detach(self) -> None:
        if self._undo is not None:
            self._undo()
        self._reset()


def _beside(value: Tensor | float, parameter: Tensor) -> Tensor | float:
    # A mapping from disk or CPU is brought to the parameter's device once, not at every step.
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.dim() == 0 else shared_as(value.detach(), parameter).to(parameter.device)


def _task_norm(measured: PenaltyStatistics, total_norm: float | None) -> float:
    # The measured gradient is s (task + penalty) with s the clipping factor, and `total_norm` |task + penalty|.
    clipped = float(measured.task_gradient_norm)
    total = clipped if total_norm is None else float(total_norm)
    if clipped == 0.0:
        return 0.0
    inner = float(measured.inner_product) * total / clipped
    return math.sqrt(max(total**2 - 2.0 * inner + float(measured.gradient_norm) ** 2, 0.0))


def _is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    step = state.global_step + 1  # the step under way
    if step == 1 and args.logging_first_step:
        return True
    return args.logging_strategy == "steps" and state.logging_steps > 0 and step % state.logging_steps == 0
