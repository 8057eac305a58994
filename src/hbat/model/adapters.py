"""PEFT adapters: the reference policy as a frozen copy of the adapter, and what loading and TRL do to an adapter."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hbat.engines.patches import at_add_adapter, at_checkpoint
from hbat.engines.processes import weights_come_later
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import give_back, is_sharded, part_of
from hbat.ewc.parameters import canonical_name, snapshot, trainable_parameters
from hbat.model.copies import has_dropout
from hbat.state.fingerprint import frozen_digest, given_fields

#: PEFT's name of the adapter that is trained, and TRL's of the copy that is the reference policy.
ADAPTER = "default"
REFERENCE_ADAPTER = "ref"

_DEFAULT = re.compile(r"\.default(?=\.|$)")  # `lora_A.default.weight`, but also `lora_embedding_A.default`
_CONFIG = "adapter_config.json"
#: What the reference adapter must not do again: be trained, of which AdaLoRA allows one, take its weights out of the
#: base (PiSSA and its like), and repeat layers.
_COPIED = {"inference_mode": True, "init_lora_weights": True, "layer_replication": None}
#: Initialisations that take a part out of the base which PEFT (0.18 to 0.21) does not find again when it loads the
#: adapter: a random one, or one of data that are gone. It does for `pissa`, `olora` and `loftq`.
_NOT_REPEATED = re.compile("pissa_niter_.*|corda|lora_ga")


def refuse_adapters(model: Any, *, takes_reference: bool) -> None:
    """Refuse adapters that are not a single PEFT one named `default`, and ones that cannot be saved or copied.

    Raises:
        ValueError: If the adapters are not supported.
    """
    if not (adapters := getattr(model, "peft_config", {})):
        return
    from peft import PeftModel  # noqa: PLC0415 - an optional extra, without which there is no adapter

    if not isinstance(getattr(model, "_orig_mod", model), PeftModel):
        raise REFUSALS["adapter inside"].error(model=type(model).__name__)
    if set(adapters) - {REFERENCE_ADAPTER} != {ADAPTER}:
        raise REFUSALS["several adapters"].error(adapters=list(adapters))
    if _NOT_REPEATED.fullmatch(init := str(getattr(adapters[ADAPTER], "init_lora_weights", ""))):
        raise REFUSALS["adapter that cannot be loaded"].error(init=init)
    if takes_reference and getattr(adapters[ADAPTER], "is_prompt_learning", False):
        raise REFUSALS["virtual tokens"].error(adapter=type(adapters[ADAPTER]).__name__)


@torch.no_grad()
def refuse_inexact_copy(model: Any) -> None:
    """Refuse a PeftModel's adapter whose copy would compute something else, or whose making would change the model.

    Tried on one short row, before anything is sharded and without a copy of the base. The adapter is moved for it: a
    new one seldom does anything, and nor would its copy.

    Raises:
        ValueError: If there is no exact copy.
    """
    if REFERENCE_ADAPTER in model.peft_config or weights_come_later():
        return
    trained = trainable_parameters(model)
    start, modes = snapshot(trained), [(module, module.training) for module in model.modules()]
    try:
        for parameter in trained.values():
            parameter.mul_(1.1).add_(0.01)
        with _kept_random_state(model):
            _try_copy(model, trained, start)
    except Exception as error:  # PEFT's adapters raise anything
        from peft import PeftConfig  # noqa: PLC0415 - an optional extra

        config = model.peft_config[ADAPTER]
        options = [name for name in given_fields(config) if not hasattr(PeftConfig, name)]
        kind = f"{type(config).__name__} ({', '.join(options)})"
        raise REFUSALS["adapter without a copy"].error(adapter=kind, fault=error) from error
    finally:
        _set(trained, start)
        for module, training in modes:
            module.training = training


def _try_copy(model: Any, trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    moved, base = _short_logits(model), frozen_digest(model)
    # Some kernels of GPUs do not repeat themselves to the last bit.
    tolerance = 0.0 if torch.equal(_short_logits(model), moved) else 0.01 * float(moved.abs().max())
    faults = {"it samples in training": _short_logits(model, training=True)}
    add_reference_adapter(model)
    faults["adding a copy changes what the model computes"] = _short_logits(model)
    _set(trained, start)
    with using_reference_adapter(model):
        faults["a copy computes something else"] = _short_logits(model)
    with _kept_gradient_flags(model):
        model.delete_adapter(REFERENCE_ADAPTER)
    for fault, logits in faults.items():
        if float((logits - moved).abs().max()) > tolerance:
            raise RuntimeError(fault)
    if frozen_digest(model) != base:
        raise RuntimeError("adding a copy changes the base")


def _short_logits(model: Any, *, training: bool = False) -> Tensor:
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - an optional extra

    model.eval()
    layer: nn.Module
    for layer in model.modules() if training else ():
        if isinstance(layer, BaseTunerLayer):
            base = set(layer.get_base_layer().modules())  # in 8 bits it rounds otherwise in training
            for module in layer.modules():
                # Beside a reference policy, trainers switch dropout off.
                module.training = module not in base and not has_dropout(module)
    logits: Tensor = model(input_ids=torch.arange(1, 5, device=model.device)[None], use_cache=False).logits
    give_back(model)
    return logits.float()


def _set(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


# --- the reference adapter -------------------------------------------------------------------------------------------


def reference_parameters(model: Any, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Detached parameters of the reference adapter, by the canonical names of their counterparts; others have none."""
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    # Not the trainable ones alone: some may be frozen for this stage.
    own = filter(_DEFAULT.search, parameters if names is None else names)
    return {name: parameters[_DEFAULT.sub(f".{REFERENCE_ADAPTER}", name)].detach() for name in own}


@torch.no_grad()
def add_reference_adapter(model: Any) -> None:
    """Make the reference policy of a PeftModel what its adapter is now; add the reference adapter if there is none."""
    if REFERENCE_ADAPTER not in model.peft_config:
        config = copy.deepcopy(model.peft_config[ADAPTER])
        for option, value in _COPIED.items():
            if hasattr(config, option):
                setattr(config, option, value)
        with _kept_gradient_flags(model):
            with _kept_random_state(model):
                type(model).add_adapter(model, REFERENCE_ADAPTER, config)  # see `complete_reference_adapter`
            model.set_adapter(ADAPTER)
    match_reference_adapter(model)


@torch.no_grad()
def match_reference_adapter(model: Any) -> None:
    """Copy the adapter of a PeftModel to its reference adapter, in the same dtype."""
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in parameters.items():
        if not _DEFAULT.search(name):
            continue
        reference = parameters[_DEFAULT.sub(f".{REFERENCE_ADAPTER}", name)]
        if reference.dtype != parameter.dtype:
            reference.data = reference.data.to(parameter.dtype)
        if not torch.equal(part_of(reference), part_of(parameter)):
            reference.copy_(parameter)


@contextmanager
def complete_reference_adapter(model: Any) -> Iterator[None]:
    """Give a trainer that is constructed in the block a reference adapter that is complete when it asks for one.

    TRL (1.0 to 1.16) calls `model.add_adapter("ref", ...)` and copies the parameters with `.default.` in their name,
    but not those whose name ends in it (LoRA on embeddings, LoHa, IA3, VeRA). The constructor computes with it already
    if `precompute_ref_log_probs` is set.
    """
    if not hasattr(model, "peft_config"):
        yield
        return

    def add(inner: Callable[..., None], adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if adapter_name == REFERENCE_ADAPTER:
            add_reference_adapter(model)
        else:
            inner(adapter_name, *args, **kwargs)

    undo = at_add_adapter(model, add)
    try:
        yield
    finally:
        undo()


@contextmanager
def using_reference_adapter(model: Any) -> Iterator[None]:
    """Compute with the reference adapter of a PeftModel inside the block."""
    with _kept_gradient_flags(model):
        model.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            model.set_adapter(ADAPTER)


def _kept_random_state(model: nn.Module) -> AbstractContextManager[None]:
    return torch.random.fork_rng(list({param.device for param in model.parameters() if param.device.type == "cuda"}))


@contextmanager
def _kept_gradient_flags(model: Any) -> Iterator[None]:
    # PEFT sets `requires_grad` on the whole adapter that becomes active, also where it was frozen, and leaves it set.
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))


# --- the dtype of an adapter -----------------------------------------------------------------------------------------


@contextmanager
def keep_adapter_dtype(model: nn.Module) -> Iterator[None]:
    """Keep the dtype of trained parameters while a trainer is constructed in the block.

    On a base in 4 or 8 bits, TRL's constructors (1.0 to 1.16) cast them to bfloat16, whose 8 bits round away most
    updates of a small learning rate: at 1e-5 hardly an element moves. The optimizer is made later, so that it sees the
    parameters as they were.
    """
    before = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before and parameter.dtype != before[name].dtype:
                parameter.data = before[name].to(parameter.device)


@contextmanager
def kept_form(model: nn.Module) -> Iterator[None]:
    """Keep the dtype, memory and `requires_grad` of a model's parameters while weights are loaded in the block.

    PEFT (0.18 to 0.21) casts an adapter that it loads to float32, and sets `requires_grad` on all of it: parameters
    in bfloat16 or frozen for a stage would no longer fit the checkpoint's optimizer state.
    """
    before = {name: (parameter.data, parameter.requires_grad) for name, parameter in model.named_parameters()}
    yield
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in before:
                continue
            own, trained = before[name]
            if own.dtype != parameter.dtype and own.shape == parameter.shape:
                parameter.data = own.copy_(parameter)
            parameter.requires_grad_(trained)


def load_adapter_as_it_was(trainer: Trainer) -> None:
    """Let a trainer resume from a checkpoint with the adapter that wrote it, in its form (see `kept_form`).

    Beside a reference adapter, transformers 4.57 loads that one alone, from its subfolder, and leaves the trained
    adapter as it was at the stage's start.
    """
    model: Any = trainer.model
    if not hasattr(model, "peft_config"):
        return

    def load(inner: Callable[..., None], checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with kept_form(model):
            inner(checkpoint, *args, **kwargs)
            # The checkpoint of a sharded model has the trained adapter in its shards.
            if not is_sharded(model) and len(model.peft_config) > 1 and (Path(checkpoint) / _CONFIG).is_file():
                model.load_adapter(checkpoint, ADAPTER, is_trainable=True)
                model.set_adapter(ADAPTER)

    at_checkpoint(trainer, load)
