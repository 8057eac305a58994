"""EWCCallback: when the penalty acts in a `transformers.Trainer`, and what it logs. The formulas are in `penalty`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.config.ewc import Method
from hbat.engines.checks import policy_of, refuse_arguments, refuse_trainer
from hbat.engines.choose import engine_for
from hbat.engines.engine import Local
from hbat.ewc.importance import displacement, normalize_to_stage, relative_importance
from hbat.ewc.log import PenaltyLog, counts, is_logged, unclipped_task_norm
from hbat.ewc.parameters import require_counterparts, snapshot, trainable_parameters
from hbat.ewc.penalty import PenaltyStatistics, add_penalty_gradient_, measure_penalty, proximal_step_


class EWCCallback(TrainerCallback):
    r"""Holds training back with an EWC penalty, in any trainer that is a `transformers.Trainer`. Changes gradients.

    With `method="gradient"` the gradient of `strength * sum_k F_k * ||theta_k - anchor_k||^2` joins the task's before
    clipping: bound to a trainer (`bind`) it is added after the backward pass of the synchronising micro-step; passed
    in `callbacks=[...]` alone, it is written into `.grad` on `on_step_begin`, before the first micro-step. Both give
    exactly the gradient of loss + penalty; bound, the gradients need no memory during the forward pass. With
    `method="proximal"` the weights are pulled on `on_optimizer_step`.

    The logged `loss` stays the task's. Logged beside it are `ewc/penalty` (the penalty's value), `ewc/drift` (root
    mean square of the difference from the anchor) and, with the gradient method, `ewc/grad_norm_ratio` (norm of the
    penalty's gradient over the task's, before clipping). An `EWCWarning` at the end says if the penalty was dead or
    dominated. One instance can serve several `train()` calls, one after the other.

    Args:
        importance: $F \ge 0$ by parameter name: numbers, tensors of shape `()`, or of the parameter's shape.
        anchor: Weights to pull to, by parameter name. None: the weights at the start of each `train()`.
        strength: Strength of the penalty.
        method: `gradient` or `proximal`.

    Raises:
        ValueError: If `strength` is negative or NaN, or `method` is unknown.
    """

    def __init__(
        self,
        importance: Mapping[str, Tensor | float],
        anchor: Mapping[str, Tensor] | None = None,
        *,
        strength: float = 0.5,
        method: Method = "gradient",
    ) -> None:
        if not strength >= 0:  # NaN is not
            raise ValueError(f"`strength` is {strength}; it must be at least 0.")
        if method not in {"gradient", "proximal"}:
            raise ValueError(f"`method` is {method!r}; it must be 'gradient' or 'proximal'.")
        self.importance = importance
        self.anchor = anchor
        self.strength = strength
        self.method = method
        #: Mean of the ratio of the penalty's gradient norm to the task's in the last `train()`; None if not measured.
        self.ratio: float | None = None
        #: Times what the penalty adds to every step.
        self.timing: Callable[[], AbstractContextManager[None]] = nullcontext
        self._trainer: Trainer | None = None
        self._reset()

    @staticmethod
    def measure() -> "MeasureImportance":
        """Make the callback of the training before: it finds out what is important to that task.

        Returns:
            A callback whose `importance`, once training has ended, is what this one takes.
        """
        return MeasureImportance()

    def _reset(self) -> None:
        self._local = Local({})
        self._anchor: Mapping[str, Any] = {}
        self._importance: Mapping[str, Any] = {}
        self._undo: Callable[[], None] | None = None
        self._measured: PenaltyStatistics | None = None
        self._entry: dict[str, float] | None = None
        self._log = PenaltyLog()

    def bind(self, trainer: Trainer) -> "EWCCallback":
        """Attach to a trainer, as its first callback, so that every reporter sees the added log entries.

        Args:
            trainer: The trainer, before `train()`.

        Returns:
            The callback itself.

        Raises:
            NotImplementedError: With what `docs/support.md` says is not supported.
        """
        refuse_trainer(trainer.args, trainer.model)
        engine_for(trainer.args).check_penalty(method=self.method, bound=True)
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
        """Place anchor and importance beside the weights as this `train()` has them.

        Raises:
            ValueError: If training resumes without an `anchor`.
        """
        self._detach()
        refuse_arguments(args)
        if self._trainer is not None and self._trainer.state is not state:
            self._trainer = None  # bound to another trainer, and now passed to this one in `callbacks`
        if model is None or self.strength == 0:
            return
        refuse_trainer(args, model)
        engine = engine_for(args)
        engine.check_penalty(method=self.method, bound=self._trainer is not None)
        parameters = trainable_parameters(policy_of(model))
        self._require_usable(parameters, state.global_step)
        self._local = local = engine.local(parameters)
        # An engine that computes in half precision may hold more precise weights than the model.
        self._anchor = local.of(self.anchor) if self.anchor is not None else snapshot(local.weights)
        self._importance = local.of(self.importance)
        if self.method == "gradient" and (trainer := self._trainer) is not None:
            self._undo = engine.before_clipping(trainer, lambda: self._add_gradient(trainer))

    def _require_usable(self, parameters: Mapping[str, Tensor], step: int) -> None:
        if self.anchor is None and step > 0:
            raise ValueError(
                f"`EWCCallback` has no `anchor` and training resumes at step {step}: the weights are no longer those "
                "of the start. Save `snapshot(...)` of the start and pass it as `anchor`."
            )
        if self.anchor is not None:
            require_counterparts(parameters, self.anchor, "anchor")
        require_counterparts(parameters, self.importance, "importance")

    def _add_gradient(self, trainer: Trainer) -> None:
        measured_step, logged = counts(trainer.state), is_logged(trainer.args, trainer.state)
        with self.timing():
            self._local.take_gradients()
            measured = add_penalty_gradient_(
                self._local.weights,
                self._anchor,
                self._importance,
                strength=self.strength,
                scale=_scale(trainer.accelerator.scaler),
                measure=measured_step or logged,
            )
            self._local.release_gradients()
            if measured is not None:
                ratio = self._log.ratio(measured, float(measured.task_gradient_norm), counts=measured_step)
                self._entry = self._log.entry(measured, ratio) if logged else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without a trainer: write the penalty's gradient for the backward passes to add to."""
        weights = self._local.weights
        if self.method != "gradient" or self._trainer is not None or not weights:
            return
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        scale = _scale(getattr(kwargs.get("optimizer"), "scaler", None))
        add_penalty_gradient_(weights, self._anchor, self._importance, strength=self.strength, scale=scale)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Without a trainer: measure, now that the sum of both gradients is clipped."""
        weights = self._local.weights
        if self.method == "gradient" and self._trainer is None and weights and is_logged(args, state):
            self._measured = measure_penalty(
                weights, self._anchor, self._importance, strength=self.strength, gradient_scale=1.0
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With the proximal method: pull the weights, with the learning rates of the step just taken."""
        optimizer, weights = kwargs.get("optimizer"), self._local.weights
        if self.method != "proximal" or optimizer is None or getattr(optimizer, "step_was_skipped", False):
            return
        rate_of = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        rates = {name: float(rate_of[id(weight)]) for name, weight in weights.items() if id(weight) in rate_of}
        with self.timing():
            proximal_step_(weights, self._anchor, self._importance, strength=self.strength, learning_rates=rates)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the penalty's entries to the training log."""
        if logs is None or "loss" not in logs or not self._local.weights:
            return
        entry = self._entry or self._measure(logs.get("grad_norm"))
        self._entry = None
        logs.update(entry)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(entry)

    def _measure(self, total_norm: float | None) -> dict[str, float]:
        measured, self._measured = self._measured, None
        if measured is None:
            unread = measure_penalty(self._local.weights, self._anchor, self._importance, strength=self.strength)
            return self._log.entry(unread)
        norm = unclipped_task_norm(measured, total_norm)
        return self._log.entry(measured, self._log.ratio(measured, norm, counts=True))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the penalty was dead or dominated, and release the trainer's tensors."""
        self.ratio = self._log.mean
        self._log.judge(self.strength)
        self._detach()

    def _detach(self) -> None:
        if self._undo is not None:
            self._undo()
        self._reset()


def _scale(scaler: Any) -> float:
    return 1.0 if scaler is None else float(scaler.get_scale())


class MeasureImportance(TrainerCallback):
    r"""Measures importance while another task trains: see `EWCCallback.measure`.

    Attributes:
        importance: By parameter name $1 / (A_i + \mathrm{mean}(A))$ with $A_i$ the squared displacement by the last
            `train()`, normalized as `normalize_to_stage` does: what `ewc.source: relative` is. Empty before.
    """

    def __init__(self) -> None:
        self.importance: Mapping[str, Tensor] = {}
        self._start: Mapping[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights.

        Raises:
            ValueError: If training resumes: these are not the weights at its start.
            NotImplementedError: Where weights are sharded.
        """
        if state.global_step > 0:
            raise ValueError(
                f"`EWCCallback.measure` cannot measure a training that resumes, here at step {state.global_step}. "
                "Take `displacement` from a `snapshot(...)` of its start."
            )
        if (engine := engine_for(args).name) != "ddp":
            raise NotImplementedError(f"`EWCCallback.measure` does not work with {engine}. Use `HBATTrainer`.")
        self._start = snapshot(trainable_parameters(policy_of(kwargs["model"])))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure."""
        moved = displacement(trainable_parameters(policy_of(kwargs["model"])), self._start)
        self.importance, self._start = normalize_to_stage(relative_importance(moved), moved), {}
