"""The guard around a stage: what trainers leave behind on a model is taken back, so that the next stage starts clean.

Each entry below was measured on transformers 4.57-5.23 with TRL 1.0-1.16. Without the guard a full model loses its
bf16 autocast from the second stage on (accelerate skips a model that it prepared before), forward wrappers nest one
deeper a stage, dropout stays off, gradient checkpointing stays on and leaves hooks behind, and the second DPO stage
with LoRA fails on the adapter `ref` of the first.
"""

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hbat.ewc.fragments import release
from hbat.ewc.partitions import gather
from hbat.ewc.shards import give_back

#: Instance attributes that trainers, accelerate and the checkpointing switch set on modules. `forward` is not simply
#: removed: a model placed by `device_map` carries accelerate's own.
_PATCHED = (
    "forward",
    "_original_forward",
    "_is_accelerate_prepared",
    "_require_grads_hook",
    "_require_grads_hooks",
    "_gradient_checkpointing_func",
    "gradient_checkpointing",
    "training",
    "p",  # of dropout layers
    "model_tags",
    "_output_capturing_hooks_installed",  # with the hooks gone, `output_hidden_states` would give nothing
    "generate",  # under FSDP2
    "add_adapter",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ENVIRONMENT = ("ACCELERATE_", "FSDP_")  # transformers < 5 leaks precision and engine of any configuration here


class StageGuard:
    """Remembers a model as it is before a trainer is built on it, and brings it back.

    Args:
        models: The model and, where there is one, the reference model.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._models = [_ModelRecord(each) for each in models]
        self._environment = _environment()

    def restore(self, trainer: Trainer | None = None, *, together: bool = True) -> None:
        """Undo what a stage left behind, and free what its trainer holds.

        Args:
            trainer: The stage's trainer; it cannot be used afterwards.
            together: Whether all processes do this. One that does so alone, after an error of its own, leaves what
                ZeRO-3 took apart in parts: the others would not come to put it together.
        """
        for record in self._models:
            if together:
                gather(record.model)
            record.restore()
        _restore_environment(self._environment)
        forget_deepspeed()
        if trainer is not None:
            _dismantle(trainer)
        for record in self._models:
            release(record.model)


def forget_deepspeed() -> None:
    """Let the host forget the configuration of DeepSpeed that it saw last, until it sees the next one.

    With one of ZeRO-3 it would make every model that it loads partitioned, and take every model for such a one.
    """
    unset_hf_deepspeed_config()


@contextmanager
def kept_environment() -> Iterator[None]:
    """Take back what building a configuration sets in the environment, where a later one would find it.

    Yields:
        Nothing.
    """
    before = _environment()
    try:
        yield
    finally:
        _restore_environment(before)


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith(_ENVIRONMENT)}


def _restore_environment(before: dict[str, str]) -> None:
    for key in _environment().keys() - before.keys():
        del os.environ[key]
    os.environ.update(before)


class _ModelRecord:
    def __init__(self, model: Any) -> None:
        self.model = model
        for module in _wrapped(model):
            # A trainer of the user's own may have left it: accelerate would skip the model, and autocast with it.
            module.__dict__.pop("_is_accelerate_prepared", None)
        self._attributes = {
            name: {key: value for key, value in module.__dict__.items() if key in _PATCHED or _is_dropout(key, value)}
            for name, module in model.named_modules()
        }
        self._hooks = {
            (name, kind): set(getattr(module, kind)) for name, module in model.named_modules() for kind in _HOOKS
        }
        self._requires_grad = {name: each.requires_grad for name, each in model.named_parameters()}
        self._adapters = set(getattr(model, "peft_config", {}))
        self._use_cache = [(config, config.use_cache) for config in _configs(model)]
        self._generation = [
            (each, copy.deepcopy(each.generation_config.__dict__))
            for each in _wrapped(model)
            if each.__dict__.get("generation_config") is not None
        ]

    def restore(self) -> None:
        model = self.model
        give_back(model)
        for adapter in set(getattr(model, "peft_config", {})) - self._adapters:
            model.delete_adapter(adapter)
        for name, module in model.named_modules():
            self._restore_module(name, module)
        for name, each in model.named_parameters():
            each.requires_grad_(self._requires_grad.get(name, each.requires_grad))
            each.grad = None
        for config, use_cache in self._use_cache:
            config.use_cache = use_cache
        for each, values in self._generation:
            each.generation_config.__dict__.clear()
            each.generation_config.__dict__.update(values)

    def _restore_module(self, name: str, module: nn.Module) -> None:
        for key in _PATCHED:
            module.__dict__.pop(key, None)
        module.__dict__.update(self._attributes.get(name, {}))
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            for key in set(hooks) - self._hooks.get((name, kind), set()):
                del hooks[key]


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, also those that attention keeps as a number and not as a layer.

    Args:
        model: The model; a `StageGuard` brings the probabilities back.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in list(module.__dict__.items()):
            if _is_dropout(key, value):
                setattr(module, key, 0.0)


def _is_dropout(key: str, value: object) -> bool:
    return key.endswith("dropout") and isinstance(value, float)


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


@contextmanager
def cheap_garbage_collection() -> Iterator[None]:
    """Keep what lives already out of garbage collection inside the block.

    The host collects at every stage's start, and the guard at its end. Each time Python would walk through the million
    objects of the imported libraries: 0.2 s, most of the cost of a short stage.

    Yields:
        Nothing.
    """
    frozen_by_others = gc.get_freeze_count() > 0
    if not frozen_by_others:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if not frozen_by_others:
            gc.unfreeze()


def unpatched_copy(model: nn.Module) -> nn.Module:
    """Deep-copy a model without what trainers patched onto it.

    A plain `copy.deepcopy` of a model that a TRL trainer has touched is a trap: the copied `forward` is bound to the
    original, so the copy computes with the original's weights.

    Args:
        model: The model; it is left as it was.

    Returns:
        A frozen copy in evaluation mode.
    """
    kept = {}
    for module in _wrapped(model):
        kept[module] = {
            key: module.__dict__.pop(key)
            for key in ("forward", "_original_forward", "_is_accelerate_prepared")
            if key in module.__dict__
        }
    try:
        duplicate = copy.deepcopy(model)
    finally:
        for module, attributes in kept.items():
            module.__dict__.update(attributes)
    duplicate.requires_grad_(False)
    return duplicate.eval()


def _dismantle(trainer: Trainer) -> None:
    for name in ("backward", "clip_grad_norm_", "prepare"):
        trainer.accelerator.__dict__.pop(name, None)
    for name in ("model_wrapped", "deepspeed", "optimizer", "lr_scheduler", "ref_model"):
        if hasattr(trainer, name):
            setattr(trainer, name, None)
    for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
        setattr(trainer.callback_handler, name, None)
    trainer.accelerator.free_memory()  # collects garbage too


def _wrapped(model: Any) -> Iterator[Any]:
    yield model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        yield model.get_base_model()


def _configs(model: Any) -> list[Any]:
    configs = [each.config for each in _wrapped(model) if hasattr(getattr(each, "config", None), "use_cache")]
    return list({id(each): each for each in configs}.values())
