"""What the penalty's callback says of one `train()`: entries of the log, and a verdict at the end."""

import math
import warnings

from transformers import TrainerState, TrainingArguments

from hbat.ewc.penalty import PenaltyStatistics

#: Largest ratio of the penalty's gradient norm to the task's in a stage, below which the penalty is called dead.
_DEAD_RATIO = 1e-4


#: Mean ratio above which the penalty is said to dominate the task.
_DOMINATING_RATIO = 10.0


#: A verdict needs this many measured steps; at the first step of a stage the penalty is zero by definition.
_MEASURED_STEPS = 3


class EWCWarning(UserWarning):
    """The penalty does nothing, or nothing but the penalty does. Silence it with `warnings.filterwarnings`."""


class PenaltyLog:
    """Collects what is measured at the logged steps of one `train()`."""

    def __init__(self) -> None:
        self._ratios: list[float] = []

    def entry(self, measured: PenaltyStatistics, task_norm: float | None = None) -> dict[str, float]:
        """Word what was measured at a step.

        Args:
            measured: The penalty's numbers.
            task_norm: 2-norm of the task's gradient before clipping; None where no gradients were read.

        Returns:
            What joins the log's entry.
        """
        entry = {"ewc/penalty": float(measured.penalty), "ewc/drift": float(measured.drift)}
        if task_norm is None:
            return entry
        ratio = float(measured.gradient_norm) / task_norm if task_norm > 0 else 0.0
        self._ratios.append(ratio)
        return entry | {"ewc/grad_norm_ratio": ratio}

    def judge(self, f_max: float) -> None:
        """Warn with `EWCWarning` if the penalty was dead or dominated.

        Args:
            f_max: Strength that the penalty had.
        """
        if len(self._ratios) < _MEASURED_STEPS:
            return
        largest, mean = max(self._ratios), sum(self._ratios) / len(self._ratios)
        if largest < _DEAD_RATIO:
            warnings.warn(
                f"The EWC penalty did nothing: its gradient reached at most {largest:.1e} of the task's. "
                f"Raise `f_max` (now {f_max:g}), or set `ewc=None`.",
                EWCWarning,
                stacklevel=3,
            )
        elif mean > _DOMINATING_RATIO:
            warnings.warn(
                f"The EWC penalty dominated: its gradient was {mean:.1f} times the task's on average. "
                f"Lower `f_max` (now {f_max:g}).",
                EWCWarning,
                stacklevel=3,
            )


def unclipped_task_norm(measured: PenaltyStatistics, total_norm: float | None) -> float:
    r"""Work out the norm of the task's gradient from the clipped sum of both.

    The measured gradient is $s (g + p)$ with $s$ the clipping factor, $p$ the penalty's gradient and $g$ the task's.

    Args:
        measured: What was read where the clipped sum lay.
        total_norm: $\lVert g + p \rVert$; None where nothing was clipped.

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
    """Whether the host will log the step under way.

    Args:
        args: The host's arguments.
        state: The host's state.

    Returns:
        True if so.
    """
    step = state.global_step + 1  # the step under way
    if step == 1 and args.logging_first_step:
        return True
    return args.logging_strategy == "steps" and state.logging_steps > 0 and step % state.logging_steps == 0
