"""The guard around a stage: what trainers leave behind on a model is taken back, so that the next stage starts clean.

Each entry below was measured on transformers 4.57-5.24 with TRL 1.0-1.16. Without the guard a full model loses its
bf16 autocast from the second stage on (accelerate skips a model that it prepared before), forward wrappers nest one
deeper per stage, dropout stays off, gradient checkpointing stays on and leaves hooks behind, and the second DPO stage
with LoRA fails on the adapter `ref` of the first.
"""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Trainer

from hbat.engines.engine import Engine
from hbat.engines.patches import undo_all
from hbat.model.copies import is_dropout, wrapped_models

#: Instance attributes that trainers, accelerate and gradient checkpointing set on modules, beside new methods.
#: `forward` is not simply removed: a model placed by `device_map` carries accelerate's own.
_PATCHED = (
    "forward",
    "_is_accelerate_prepared",
    "_require_grads_hook",
    "_require_grads_hooks",
    "gradient_checkpointing",
    "training",
    "p",  # of dropout layers
    "model_tags",
    "_output_capturing_hooks_installed",  # with the hooks gone, `output_hidden_states` would give nothing
)
#: Fields of a model's configuration that trainers set.
_CONFIGURED = ("use_cache", "output_router_logits", "router_aux_loss_coef")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StageGuard:
    """Remembers models as they are before a trainer is built on them, and brings them back."""

    def __init__(self, *models: nn.Module, engine: Engine | None = None) -> None:
        self._records = [_ModelRecord(model) for model in models]
        self._engine = engine or Engine()

    def restore(self, trainer: Trainer | None = None, *, together: bool = True) -> None:
        """Undo what a stage left behind, and free what its trainer holds.

        Args:
            trainer: The stage's trainer; it cannot be used afterwards.
            together: Whether all processes do this. One that does so alone, after an error of its own, gathers
                nothing: the others would not take part.
        """
        for record in self._records:
            if together:
                self._engine.gather(record.model)
            record.restore()
        if trainer is not None:
            _dismantle(trainer)


class _ModelRecord:
    def __init__(self, model: Any) -> None:
        self.model = model
        for module in wrapped_models(model):
            # A trainer of the user's own may have left it: accelerate would skip the model, and autocast with it.
            module.__dict__.pop("_is_accelerate_prepared", None)
        self._attributes = {
            name: {key: value for key, value in module.__dict__.items() if key in _PATCHED or is_dropout(key, value)}
            for name, module in model.named_modules()
        }
        self._names = {name: set(module.__dict__) for name, module in model.named_modules()}
        self._hooks = {
            (name, kind): set(getattr(module, kind)) for name, module in model.named_modules() for kind in _HOOKS
        }
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._adapters = set(getattr(model, "peft_config", {}))
        self._configured = [
            (config, {name: vars(config)[name] for name in _CONFIGURED if name in vars(config)})
            for config in _configs(model)
        ]
        self._generation = [
            (module, copy.deepcopy(module.generation_config.__dict__))
            for module in wrapped_models(model)
            if module.__dict__.get("generation_config") is not None
        ]

    def restore(self) -> None:
        model = self.model
        for adapter in set(getattr(model, "peft_config", {})) - self._adapters:
            model.delete_adapter(adapter)
        for name, module in model.named_modules():
            self._restore_module(name, module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
            parameter.grad = None
        for config, values in self._configured:
            vars(config).update(values)
        for module, values in self._generation:
            module.generation_config.__dict__.clear()
            module.generation_config.__dict__.update(values)

    def _restore_module(self, name: str, module: nn.Module) -> None:
        before = self._names.get(name, set())
        methods = [key for key, value in vars(module).items() if key not in before and callable(value)]
        for key in (*_PATCHED, *methods):
            module.__dict__.pop(key, None)
        module.__dict__.update(self._attributes.get(name, {}))
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            for key in set(hooks) - self._hooks.get((name, kind), set()):
                del hooks[key]


@contextmanager
def cheap_garbage_collection() -> Iterator[None]:
    """Keep what lives already out of garbage collection inside the block.

    transformers collects at every stage's start, and the guard at its end. Each time Python would walk through the
    million objects of the imported libraries: 0.2 s, most of the cost of a short stage.
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


def _dismantle(trainer: Trainer) -> None:
    undo_all(trainer.accelerator)
    for name in ("model_wrapped", "optimizer", "lr_scheduler", "ref_model"):
        if hasattr(trainer, name):
            setattr(trainer, name, None)
    for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
        setattr(trainer.callback_handler, name, None)
    trainer.accelerator.free_memory()  # collects garbage too


def _configs(model: Any) -> list[Any]:
    whole = [module.config for module in wrapped_models(model) if hasattr(getattr(module, "config", None), "to_dict")]
    return list({id(part): part for config in whole for part in (config, config.get_text_config())}.values())
