"""Every patch on a trainer of TRL or transformers, with its version, its undo, and when it can go.

Each function shadows one method of one object and returns what takes the shadow away again; `given_reference` shadows
a function within a block. They can be undone in any order. Tested with TRL 1.0-1.16, transformers 4.57-5.24,
accelerate 1.10-1.15, PEFT 0.18-0.21 and DeepSpeed 0.19.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Undo = Callable[[], None]
_LOADER = "create_model_from_path"  # with which GRPO and RLOO load their reference policy


class _Shadow:
    """One layer over a method as it was."""

    def __init__(self, inner: Callable[..., Any], around: Callable[..., Any]) -> None:
        self.inner = inner
        self.around = around
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.inner, *args, **kwargs) if self.active else self.inner(*args, **kwargs)


def _shadow(owner: Any, name: str, around: Callable[..., Any], *, below: bool = False) -> Undo:
    # `around` is called with the method as it was, and the call's arguments; `below` lays it under other layers.
    lowest = owner.__dict__.get(name) if below else None
    while isinstance(lowest, _Shadow) and isinstance(lowest.inner, _Shadow):
        lowest = lowest.inner
    if isinstance(lowest, _Shadow):
        shadow = lowest.inner = _Shadow(lowest.inner, around)
    else:
        shadow = _Shadow(getattr(owner, name), around)
        setattr(owner, name, shadow)

    def undo() -> None:
        shadow.active = False  # other layers may lie on top of this one: it goes when they have gone
        top = owner.__dict__.get(name)
        while isinstance(top, _Shadow) and not top.active:
            top = top.inner
            setattr(owner, name, top)
        if getattr(top, "__self__", None) is owner:
            owner.__dict__.pop(name, None)

    return undo


def after_backward(accelerator: Any, action: Callable[[Tensor], None]) -> Undo:
    """Run `action` with the micro-step's detached loss after each `accelerator.backward`.

    Every `transformers.Trainer` goes through this method: `on_step_begin` comes before the backward pass and
    `on_pre_optimizer_step` after clipping. Can go when transformers has a callback between the two.
    """

    def backward(inner: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        inner(loss, **kwargs)
        action(loss.detach())

    return _shadow(accelerator, "backward", backward)


def before_engine_step(engine: Any, action: Callable[[], None]) -> Undo:
    """Run `action` before each optimizer step of a DeepSpeed engine, on complete gradients that are not clipped yet.

    `accelerator.backward` takes the step inside. Actions run in the order in which they were laid, as after a backward
    pass. Can go with a hook of DeepSpeed's.
    """

    def step(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            action()
        return inner(*args, **kwargs)

    return _shadow(engine, "step", step, below=True)


def at_clipping(accelerator: Any, clip: Callable[..., Tensor]) -> Undo:
    """Let `clip(parameters, max_norm, norm_type)` clip gradients. Can go with `after_backward`."""

    def clip_grad_norm_(_: Any, *args: Any, **kwargs: Any) -> Tensor:
        return clip(*args, **kwargs)

    return _shadow(accelerator, "clip_grad_norm_", clip_grad_norm_)


def keep_models(accelerator: Any, is_kept: Callable[[nn.Module], bool]) -> Undo:
    """Let `accelerator.prepare` return models as they are where one of them is a kept one: it is sharded already.

    accelerate 1.10-1.15 fails to shard a sharded model: it looks for decoder layers by the names of their classes.
    Can go when it takes one.
    """

    def prepare(inner: Callable[..., Any], *objects: Any, **options: Any) -> Any:
        if not any(isinstance(thing, nn.Module) and is_kept(thing) for thing in objects):
            return inner(*objects, **options)
        # An optimizer made of sharded parameters needs no others in their stead, as accelerate's own way gives it.
        kept = [thing if isinstance(thing, nn.Module) else accelerator.prepare_optimizer(thing) for thing in objects]
        return tuple(kept) if len(kept) > 1 else kept[0]

    return _shadow(accelerator, "prepare", prepare)


def after_prepare(accelerator: Any, action: Callable[[], None]) -> Undo:
    """Run `action` after each `accelerator.prepare`. Can go when DeepSpeed starts from float32 weights."""

    def prepare(inner: Callable[..., Any], *objects: Any, **options: Any) -> Any:
        prepared = inner(*objects, **options)
        action()
        return prepared

    return _shadow(accelerator, "prepare", prepare)


def without_empty_groups(trainer: Any) -> Undo:
    """Make an optimizer without empty parameter groups.

    transformers 4.57 makes one for an adapter, whose parameters all decay; DeepSpeed 0.19 leaves it out of the groups
    that it steps, so that the schedule has one learning rate too many. Can go with transformers < 5.
    """

    def create_optimizer(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        optimizer = inner(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    return _shadow(trainer, "create_optimizer", create_optimizer)


def at_scheduler(trainer: Any, make: Callable[..., Any]) -> Undo:
    """Make the scheduler by `make(inner, num_training_steps, optimizer)`; transformers has no hook for it."""
    return _shadow(trainer, "create_scheduler", make)


def at_checkpoint(trainer: Any, load: Callable[..., None]) -> Undo:
    """Load a checkpoint's model by `load(inner, checkpoint, *args)`; transformers has no public hook for it."""
    return _shadow(trainer, "_load_from_checkpoint", load)


def at_add_adapter(model: Any, add: Callable[..., None]) -> Undo:
    """Let TRL (1.0-1.16) add its reference adapter by `add(inner, adapter_name, *args)`.

    Can go when TRL takes a reference adapter that exists, and copies all of its parameters.
    """
    return _shadow(model, "add_adapter", add)


def let_epochs_grow(sampler: Any) -> Undo:
    """Let a sampler's epoch only grow.

    A stage that resumes in the middle of a later epoch skips the batches that it has seen, on a loader that accelerate
    makes for that. Its iterator sets the epoch back to 0 (transformers 4.57 with accelerate 1.10; transformers 5.23
    sets it right again). Can go with transformers < 5.
    """
    highest = 0

    def set_epoch(inner: Callable[[int], None], epoch: int) -> None:
        nonlocal highest
        highest = max(highest, epoch)
        inner(highest)

    return _shadow(sampler, "set_epoch", set_epoch)


@contextmanager
def given_reference(trainer_class: type, reference: Any) -> Iterator[None]:
    """Within the block TRL's GRPO and RLOO get `reference` where they would load one from disk by the model's name.

    They take no `ref_model` (TRL 1.0-1.16). Can go when they do. None leaves them as they are.
    """
    modules = (sys.modules[base.__module__] for base in trainer_class.__mro__)
    module = next((found for found in modules if found.__name__.startswith("trl.") and hasattr(found, _LOADER)), None)
    if reference is None or module is None:
        yield
        return
    before = getattr(module, _LOADER)
    setattr(module, _LOADER, lambda *_, **__: reference)
    try:
        yield
    finally:
        setattr(module, _LOADER, before)


def undo_all(accelerator: Any) -> None:
    """Undo all patches of an accelerator, whatever laid them: its trainer is gone."""
    for name in ("backward", "clip_grad_norm_", "prepare"):
        accelerator.__dict__.pop(name, None)
