"""Callbacks of every stage: they tell others where in the run it is, and work around what trainers do."""

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbat.engines.patches import let_epochs_grow
from hbat.state.plan import Stage


class TellPlace(TrainerCallback):
    """Tells other callbacks where in the run their stage is: `state.hbat`, in the words of the log.

    Args:
        stage: The stage.
        steps_before: Optimizer steps of the run before it.
    """

    def __init__(self, stage: Stage, steps_before: int) -> None:
        self._place = {"stage": stage.index, "round": stage.round, "objective": stage.objective, "step": steps_before}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        state.hbat = dict(self._place)  # type: ignore[attr-defined]  # a dataclass without slots


class LogLastStep(TrainerCallback):
    """Logs the last step of a stage too: one shorter than `logging_steps` would leave no loss."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for it."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class HookLimit(TrainerCallback):
    """Keeps the hooks on the embeddings at the number of the first step.

    With an adapter and gradient checkpointing every reference forward of TRL adds one more hook (TRL 1.0-1.16,
    transformers 4.57-5.24): all do the same, and each costs time in every forward pass.
    """

    def __init__(self) -> None:
        self._first: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks that were added since."""
        embeddings = getattr(kwargs.get("model"), "get_input_embeddings", lambda: None)()
        if embeddings is None:
            return
        hooks = embeddings._forward_hooks  # noqa: SLF001 - torch has no public list of them
        if self._first is None:
            self._first = len(hooks)
        for key in list(hooks)[self._first :]:
            del hooks[key]


class KeepEpoch(TrainerCallback):
    """Keeps the order of rows when a stage resumes in a later epoch: see `let_epochs_grow`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Patch the samplers that know epochs."""
        for sampler in set(_samplers(kwargs.get("train_dataloader"))):  # a loader and its batch sampler share one
            let_epochs_grow(sampler)


def _samplers(holder: Any) -> Iterator[Any]:
    # accelerate wraps the batch sampler, once to skip batches and once for each process to get its own.
    inner = [found for name in ("batch_sampler", "sampler") if (found := getattr(holder, name, None)) is not None]
    for sampler in inner:
        yield from _samplers(sampler)
    if not inner and hasattr(holder, "set_epoch"):
        yield holder
