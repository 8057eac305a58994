"""Where code can act between a trainer's backward pass and its gradient clipping."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor


def after_backward(accelerator: Any, action: Callable[[Tensor], None]) -> Callable[[], None]:
    """Run `action` after each `accelerator.backward`, until undone.

    The host has no hook at this place: `on_step_begin` comes before the backward pass and `on_pre_optimizer_step`
    after clipping. Every trainer on `transformers.Trainer` goes through this one method.

    Args:
        accelerator: The trainer's accelerator.
        action: Called with the micro-step's loss, detached. Whether gradients are complete (the last micro-step of an
            optimizer step) is `accelerator.sync_gradients`.

    Returns:
        A function that takes the action out again; calling it twice does no harm.
    """
    link = _Link(cast("Callable[..., None]", accelerator.backward), action)
    accelerator.backward = link

    def undo() -> None:
        link.active = False  # other links may lie on top of this one: it goes when they have gone
        top = accelerator.__dict__.get("backward")
        while isinstance(top, _Link) and not top.active:
            top = top.inner
            accelerator.backward = top
        if getattr(top, "__self__", None) is accelerator:
            accelerator.__dict__.pop("backward", None)

    return undo


class _Link:
    """One action laid over the method as it was."""

    def __init__(self, inner: Callable[..., None], action: Callable[[Tensor], None]) -> None:
        self.inner = inner
        self.action = action
        self.active = True

    def __call__(self, loss: Tensor, **kwargs: Any) -> None:
        self.inner(loss, **kwargs)
        if self.active:
            self.action(loss.detach())
