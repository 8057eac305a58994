"""The order of a stage's rows after a resume."""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HookLimit(TrainerCallback):
    """Keeps the hooks on the embeddings at the number of the first step.

    With an adapter and gradient checkpointing every reference forward of TRL adds one more hook (TRL 1.0-1.16,
    transformers 4.57-5.23): all do the same, and each costs time in every forward pass.
    """

    def __init__(self) -> None:
        self._first: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what came on top."""
        model = kwargs.get("model")
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            return
        hooks = embeddings._forward_hooks  # noqa: SLF001 - torch has no public list of them
        if self._first is None:
            self._first = len(hooks)
        for key in list(hooks)[self._first :]:
            del hooks[key]


class KeepEpoch(TrainerCallback):
    """Lets the sampler's epoch only grow.

    A stage that goes on in the middle of a later epoch skips the batches that it has seen, on a loader that accelerate
    makes for that. Its iterator sets the epoch back to 0, so the rest of the epoch would come in the first one's order
    (transformers 4.57 with accelerate 1.10; transformers 5.23 sets it right again itself).
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the samplers that know epochs."""
        for sampler in _samplers(kwargs.get("train_dataloader")):
            sampler.set_epoch = _growing(sampler.set_epoch)


def _samplers(loader: Any) -> Iterator[Any]:
    # accelerate wraps the batch sampler, once to skip batches and once for each process to get its own.
    seen: set[int] = set()
    waiting = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        inner = [getattr(each, name, None) for name in ("batch_sampler", "sampler")]
        waiting += inner
        if hasattr(each, "set_epoch") and not any(inner):
            yield each


def _growing(set_epoch: Callable[[int], None]) -> Callable[[int], None]:
    highest = 0

    def growing(epoch: int) -> None:
        nonlocal highest
        highest = max(highest, epoch)
        set_epoch(highest)

    return growing
