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
    inner = cast("Callable[..., None]", accelerator.backward)

    def backward(loss: Tensor, **kwargs: Any) -> None:
        inner(loss, **kwargs)
        if active:
            action(loss.detach())

    active = [True]
    accelerator.backward = backward

    def undo() -> None:
        active.clear()  # another wrapper may lie on top, so the link stays and does nothing
        if accelerator.__dict__.get("backward") is backward:
            if getattr(inner, "__self__", None) is accelerator:
                accelerator.__dict__.pop("backward")
            else:
                accelerator.backward = inner

    return undo
