"""Learning-rate schedules that look beyond a stage."""

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hbat.engines.patches import at_scheduler


def extend_schedule(
    trainer: Trainer, kind: str, *, round_index: int, num_rounds: int, steps_before: int, ahead: float
) -> None:
    """Make a stage's trainer follow the objective's schedule.

    Args:
        trainer: The stage's trainer, before `train()`.
        kind: `stage` leaves the trainer's schedule as it is. `run` makes the stage a section of one schedule over all
            stages of the objective. `decay` multiplies the trainer's by `1 - n / N`.
        round_index: n, from 0.
        num_rounds: N.
        steps_before: Optimizer steps of the objective's earlier stages.
        ahead: Estimated steps of this stage and those to come, per step of this one.
    """
    if kind == "stage":
        return

    def make(inner: Callable[..., Any], num_training_steps: int, optimizer: Any = None) -> Any:
        total, shift, factor = num_training_steps, 0, 1.0 - round_index / num_rounds
        if kind == "run":
            total, shift, factor = steps_before + round(num_training_steps * ahead), steps_before, 1.0
        scheduler = inner(total) if optimizer is None else inner(total, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise TypeError(
                f"`lr_schedule: {kind}` needs a schedule of the step alone, but this trainer makes a "
                f"{type(scheduler).__name__}. Set `lr_schedule: stage`."
            )
        _transform(scheduler, shift, factor)
        return scheduler

    at_scheduler(trainer, make)


def _transform(scheduler: LambdaLR, shift: int, factor: float) -> None:
    def changed(inner: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor * inner(step + shift)

    scheduler.lr_lambdas = [changed(inner) for inner in scheduler.lr_lambdas]
    rates = [
        base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # noqa: SLF001 - `get_last_lr` before the first step has no other source
