"""EWCCallback: when the penalty acts in a `transformers.Trainer`, and what it logs. The formulas are in `penalty`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.config.ewc import AnchorDevice, Method
from hbat.engines.backward import after_backward
from hbat.engines.checks import policy_of, refuse_arguments, refuse_trainer
from hbat.engines.deepspeed.request import is_asked
from hbat.engines.deepspeed.zero3 import Partitions, shares
from hbat.engines.deepspeed.zero12 import Fragments, before_step, engine_of
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import is_shared
from hbat.ewc.log import PenaltyLog, is_logged, unclipped_task_norm
from hbat.ewc.parameters import on_device, require_counterparts, snapshot, trainable_parameters
from hbat.ewc.penalty import PenaltyStatistics, add_penalty_gradient_, measure_penalty, proximal_step_


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
        anchor_device: Where anchor and importance lie during training. `model`: on the model's device. `cpu`: in the
            main memory, from where a GPU fetches them piece by piece at each step; what lies on the GPU already stays
            there. Changes no result.
    """

    def __init__(
        self,
        importance: Mapping[str, Tensor | float],
        anchor: Mapping[str, Tensor] | None = None,
        *,
        f_max: float = 1.0,
        method: Method = "gradient",
        anchor_device: AnchorDevice = "model",
    ) -> None:
        if not f_max >= 0:  # NaN is not
            raise ValueError(f"`f_max` is {f_max}; it must be at least 0.")
        if method not in {"gradient", "proximal"}:
            raise ValueError(f"`method` is {method!r}; it must be 'gradient' or 'proximal'.")
        if anchor_device not in {"model", "cpu"}:
            raise ValueError(f"`anchor_device` is {anchor_device!r}; it must be 'model' or 'cpu'.")
        self.importance = importance
        self.anchor = anchor
        self.f_max = f_max
        self.method = method
        self.anchor_device = anchor_device
        self._trainer: Trainer | None = None
        self._reset()

    def _reset(self) -> None:
        self._parameters: Mapping[str, Tensor] = {}
        self._shares: Fragments | Partitions | None = None
        self._anchor: Mapping[str, Any] = {}
        self._importance: Mapping[str, Tensor | float] = {}
        self._undo: Callable[[], None] | None = None
        self._measured: PenaltyStatistics | None = None
        self._log = PenaltyLog()

    def bind(self, trainer: Trainer) -> "EWCCallback":
        """Attach to a trainer, as its first callback, so that every reporter sees the added log entries.

        Args:
            trainer: The trainer, before `train()`.

        Returns:
            The callback itself.
        """
        refuse_trainer(trainer.args, trainer.model)
        if is_asked(trainer.args):
            self._refuse_under_deepspeed()
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._trainer = trainer
        return self

    def _refuse_under_deepspeed(self) -> None:
        if self.method == "proximal":
            raise REFUSALS["proximal steps under DeepSpeed"].error()
        if self.anchor_device == "cpu":
            raise REFUSALS["anchor on the CPU"].error(engine="DeepSpeed")

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
        parameters = trainable_parameters(policy_of(model))
        self._require_usable(parameters, state.global_step)
        engine = None if self._trainer is None else engine_of(self._trainer.accelerator)
        if engine is not None:
            self._take_shares(parameters)
            self._undo = before_step(engine, self._before_step)
            return
        self._take(parameters)
        if self.method == "gradient" and self._trainer is not None:
            self._undo = after_backward(self._trainer.accelerator, self._after_backward)

    def _require_usable(self, parameters: Mapping[str, Tensor], step: int) -> None:
        if self.anchor is None and step > 0:
            raise ValueError(
                f"`EWCCallback` has no `anchor` and training resumes at step {step}: the weights are no longer those "
                "of the start. Save `snapshot(...)` of the start and pass it as `anchor`."
            )
        if self.anchor_device == "cpu" and any(map(is_shared, parameters.values())):
            raise REFUSALS["anchor on the CPU"].error(engine="FSDP2")
        if self.anchor is not None:
            require_counterparts(parameters, self.anchor, "anchor")
        require_counterparts(parameters, self.importance, "importance")

    def _take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._anchor = on_device(snapshot(parameters) if self.anchor is None else self.anchor, parameters)
        self._importance = on_device(self.importance, parameters)

    def _take_shares(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._shares = own = shares(parameters)
        self._parameters = own.weights
        # In half precision these weights may be more precise than the model's own.
        anchor = snapshot(own.weights) if self.anchor is None else own.of(self.anchor)
        self._anchor = on_device(anchor, own.weights)
        self._importance = on_device(own.of(self.importance), own.weights)

    def _before_step(self) -> None:
        if self._shares is not None:
            self._shares.take_gradients()
            self._add_pull()
            self._shares.let_go()

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
            measure=is_logged(trainer.args, trainer.state),
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
        if self.method == "gradient" and self._trainer is None and self._parameters and is_logged(args, state):
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
            unread = measure_penalty(self._parameters, self._anchor, self._importance, strength=self.f_max)
            return self._log.entry(unread)
        alone = self._trainer is None
        task = unclipped_task_norm(measured, total_norm) if alone else float(measured.task_gradient_norm)
        return self._log.entry(measured, task)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say if the penalty was dead or dominated, and let go of the trainer's tensors."""
        self._log.judge(self.f_max)
        self._detach()

    def _detach(self) -> None:
        if self._undo is not None:
            self._undo()
        self._reset()
