"""What `EWCCallback` logs during one `train()`, and its verdict at the end."""

import math
import warnings

from transformers import TrainerState, TrainingArguments

from hbat.ewc.penalty import PenaltyStatistics

#: Number of evenly spaced steps of a `train()` at which the penalty is measured, whatever is logged.
_SAMPLES = 16
#: The penalty is dead if its gradient norm is below this share of the task's, on average over these steps: it then
#: holds back about 2 % of the drift (docs/ewc.md has the measurement).
_DEAD_RATIO = 0.02
#: It dominates above this: it then holds back about 99 %.
_DOMINATING_RATIO = 3.0
#: Measured steps that a verdict needs; at the first step of a stage the penalty is zero by definition.
_MEASURED_STEPS = 3


class EWCWarning(UserWarning):
    """The penalty had no effect on training, or dominated the task. Silence it with `warnings.filterwarnings`."""


class PenaltyLog:
    """Collects the statistics of the measured steps of one `train()`."""

    def __init__(self) -> None:
        self._ratios: list[float] = []

    def entry(self, measured: PenaltyStatistics, ratio: float | None = None) -> dict[str, float]:
        """Log entries for one step, with the ratio of the norms if gradients were read."""
        entry = {"ewc/penalty": float(measured.penalty), "ewc/drift": float(measured.drift)}
        return entry if ratio is None else entry | {"ewc/grad_norm_ratio": ratio}

    def ratio(self, measured: PenaltyStatistics, task_norm: float, *, counts: bool) -> float:
        """Norm of the penalty's gradient over that of the task's before clipping; `counts` for the verdict."""
        ratio = float(measured.gradient_norm) / task_norm if task_norm > 0 else 0.0
        if counts:
            self._ratios.append(ratio)
        return ratio

    @property
    def mean(self) -> float | None:
        """Mean of the ratios that count; None without one."""
        return sum(self._ratios) / len(self._ratios) if self._ratios else None

    def judge(self, strength: float) -> None:
        """Warn with `EWCWarning` if the penalty of this strength was dead or dominated."""
        if len(self._ratios) < _MEASURED_STEPS:
            return
        mean = self.mean or 0.0
        if mean < _DEAD_RATIO:
            verdict = f"did nothing: its gradient norm was {mean:.1e} of the task's on average"
            advice = f"Raise `strength` (now {strength:g}), or set `ewc=None`."
        elif mean > _DOMINATING_RATIO:
            verdict = f"dominated: its gradient norm was {mean:.1f} times the task's on average"
            advice = f"Lower `strength` (now {strength:g})."
        else:
            return
        warnings.warn(f"The EWC penalty {verdict}. {advice}", EWCWarning, stacklevel=3)


def unclipped_task_norm(measured: PenaltyStatistics, total_norm: float | None) -> float:
    r"""Norm $\lVert g \rVert$ of the task's gradient, from the clipped sum $s (g + p)$ that was measured.

    Args:
        measured: Statistics measured on the clipped sum, where $p$ is the penalty's gradient.
        total_norm: $\lVert g + p \rVert$ before clipping; None if nothing was clipped.

    Returns:
        $\lVert g \rVert$.
    """
    clipped = float(measured.task_gradient_norm)
    total = clipped if total_norm is None else float(total_norm)
    if clipped == 0.0:
        return 0.0
    inner = float(measured.inner_product) * total / clipped
    return math.sqrt(max(total**2 - 2.0 * inner + float(measured.gradient_norm) ** 2, 0.0))


def is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the trainer will log the current step."""
    step = state.global_step + 1
    if step == state.max_steps or (step == 1 and args.logging_first_step):
        return args.logging_strategy != "no"
    return args.logging_strategy == "steps" and state.logging_steps > 0 and step % state.logging_steps == 0


def counts(state: TrainerState) -> bool:
    """Whether the current step counts for the verdict."""
    step, steps = state.global_step + 1, max(state.max_steps, 1)
    return step * _SAMPLES // steps > (step - 1) * _SAMPLES // steps
