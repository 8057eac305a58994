"""Refuses at construction what `support` says is not supported."""

import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hbat.support import REFUSALS

#: Engine, field of the arguments, variable with which `accelerate launch` names it, and the refusal.
_ENGINES = (
    ("DeepSpeed", "deepspeed", "ACCELERATE_USE_DEEPSPEED", "sharding"),
    ("FSDP", "fsdp", "ACCELERATE_USE_FSDP", "sharding"),
    ("parallelism_config", "parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism"),
    ("Megatron-LM", None, "ACCELERATE_USE_MEGATRON_LM", "parallelism"),
)
_OFFLOADED = {"cpu", "disk"}
_INSIDE_BACKWARD = {"lomo", "adalomo"}
_QUANTISATION = "bitsandbytes"


def refuse_launch() -> None:
    """Refuse an engine that `accelerate launch` was told of, before the host asks for its packages.

    Raises:
        NotImplementedError: Under DeepSpeed, FSDP and parallelism within layers.
    """
    for engine, _, variable, refusal in _ENGINES:
        if os.environ.get(variable, "").lower() in {"1", "true", "yes", "on", "y", "t"}:
            raise REFUSALS[refusal].error(engine=engine, where=f"{variable}={os.environ[variable]}")


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse engines that hide or shard gradients, and optimizers that use gradients up before anyone sees them.

    Args:
        args: The host's arguments.

    Raises:
        NotImplementedError: Under DeepSpeed, FSDP and parallelism within layers.
        ValueError: For several GPUs in one process, and for an optimizer that acts inside the backward pass.
    """
    refuse_launch()
    for engine, name, _, refusal in _ENGINES:
        if name is not None and getattr(args, name, None):
            raise REFUSALS[refusal].error(engine=engine, where=f"`{name}` is set")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer in _INSIDE_BACKWARD or optimizer.endswith("_layerwise"):
        raise REFUSALS["optimizer"].error(name=optimizer)
    if args.n_gpu > 1:
        raise REFUSALS["several GPUs in one process"].error(count=args.n_gpu)


def refuse_placement(model: Any) -> None:
    """Refuse a model that does not lie on one device as a whole.

    Args:
        model: The model, with or without adapter.

    Raises:
        NotImplementedError: If it is cut, spread or offloaded.
    """
    for name, each in model.named_parameters():
        if hasattr(each, "placements"):
            raise REFUSALS["sharded weight"].error(name=name)
    devices = {str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}
    shown = ", ".join(sorted(devices))
    if "disk" in devices or (len(devices) > 1 and devices & _OFFLOADED):
        raise REFUSALS["offload"].error(devices=shown)
    if len(devices) > 1:
        raise REFUSALS["several devices"].error(devices=shown)


def refuse_quantised(model: Any, *, gets_adapter: bool = False) -> None:
    """Refuse quantised weights that would be trained, and those of methods that are not tested.

    Args:
        model: The model, with or without adapter.
        gets_adapter: Whether it is about to get one.

    Raises:
        ValueError: If it is quantised by another method than bitsandbytes', or has no adapter.
    """
    if not getattr(model, "is_quantized", False):
        return
    method = getattr(model, "quantization_method", None)
    if (method := str(getattr(method, "value", method))) != _QUANTISATION:
        raise REFUSALS["quantisation method"].error(method=method)
    if not gets_adapter and not hasattr(model, "peft_config"):
        raise REFUSALS["quantised base"].error(bits=4 if getattr(model, "is_loaded_in_4bit", False) else 8)


def refuse_adapters(model: Any, name: str, reference: str) -> None:
    """Refuse adapters that are not a single PEFT one of the host's name.

    Args:
        model: The model.
        name: The adapter's name.
        reference: Name of its copy as reference policy, which may be there too.

    Raises:
        ValueError: If there are others.
    """
    if not (adapters := getattr(model, "peft_config", {})):
        return
    from peft import PeftModel  # noqa: PLC0415 - an optional extra, without which there is no adapter

    if not isinstance(getattr(model, "_orig_mod", model), PeftModel):
        raise REFUSALS["adapter inside"].error(model=type(model).__name__)
    if set(adapters) - {reference} != {name}:
        raise REFUSALS["several adapters"].error(adapters=list(adapters))


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse an adapter that puts virtual tokens before each text.

    Args:
        model: The model.

    Raises:
        ValueError: If it has one.
    """
    for each in getattr(model, "peft_config", {}).values():
        if getattr(each, "is_prompt_learning", False):
            raise REFUSALS["virtual tokens"].error(adapter=type(each).__name__)


def refuse_trainer(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse what a trainer of anyone's was given, where its gradients are to be changed.

    Args:
        args: Its arguments.
        model: Its model.

    Raises:
        NotImplementedError: If the model is sharded, cut, spread or offloaded.
        ValueError: For anything else that is not supported.
    """
    refuse_arguments(args)
    for each in _unwrapped(model):
        refuse_placement(each)
        refuse_quantised(each)


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    # A module that holds policy and critic says nothing of the policy's quantisation and placement.
    policy = getattr(model, "policy", None)
    yield policy if isinstance(policy, nn.Module) else model
