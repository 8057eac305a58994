"""Refuses at construction what `support` says is not supported."""

import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from hbat.engines.deepspeed.request import is_asked, refuse_zero, zero_row
from hbat.engines.fsdp2 import fsdp_version, is_loaded_in_shards, unsupported_ways
from hbat.engines.processes import is_launched_with
from hbat.engines.refusals import REFUSALS, Refusal

_PARALLELISM = "tensor, context or sequence parallelism (`parallelism_config`), Megatron-LM"


_OFFLOADED = {"cpu", "disk"}


_INSIDE_BACKWARD = {"lomo", "adalomo"}


_QUANTISATION = "bitsandbytes"


#: What is trained: the columns of docs/support.md.
COLUMNS = ("full", "LoRA", "QLoRA, 4-bit", "QLoRA, 8-bit")


#: Refusal by engine, whatever is trained.
_REFUSED = {
    "FSDP2 by the user's own code (`fully_shard`)": "FSDP2 by the model",
    "FSDP1": "FSDP1",
    "FSDP with offload to the CPU": "FSDP with offload",
    "DeepSpeed without ZeRO": "DeepSpeed",
    "DeepSpeed with offload": "DeepSpeed",
    _PARALLELISM: "parallelism",
    "tensor parallelism by the model (`tp_plan`)": "tensor parallelism by the model",
}


#: Refusal by engine, for a base in 4 or 8 bits alone.
_REFUSED_QUANTISED = {
    "FSDP2": "FSDP2",
    "FSDP2 by the model (`distributed_config`)": "FSDP2",
    "DeepSpeed ZeRO-1": "DeepSpeed",
    "DeepSpeed ZeRO-2": "DeepSpeed",
    "DeepSpeed ZeRO-3": "DeepSpeed",
}


def refusal(engine: str, column: str | None = None) -> Refusal | None:
    """Refusal of an engine; None where it is supported, or where that depends on an unknown `column`."""
    key = _REFUSED.get(engine)
    if key is None and column in COLUMNS[2:]:
        key = _REFUSED_QUANTISED.get(engine)
    return None if key is None else REFUSALS[key]


def refuse_arguments(args: Any = None, column: str | None = None) -> None:
    """Refuse engines that hide or cut gradients, and optimizers that use gradients up before anyone sees them.

    Args:
        args: The host's arguments, or some of their fields; None for what `accelerate launch` was told alone.
        column: What is trained, as `support` calls it; None where that is not known yet.

    Raises:
        NotImplementedError: Under an engine that is not supported.
        ValueError: For several GPUs in one process, and for an optimizer that acts inside the backward pass.
    """
    for row, engine, where in _engines(args):
        if (refused := refusal(row, column)) is not None:
            raise refused.error(engine=engine, where=where)
    refuse_zero(args)
    optimizer = getattr(args, "optim", "")
    optimizer = str(getattr(optimizer, "value", optimizer))
    if optimizer in _INSIDE_BACKWARD or optimizer.endswith("_layerwise"):
        raise REFUSALS["optimizer"].error(name=optimizer)
    if (count := getattr(args, "n_gpu", 1)) > 1:
        raise REFUSALS["several GPUs in one process"].error(count=count)


def refuse_model(model: Any, *, gets_adapter: bool = False, shards: bool = False) -> None:
    """Refuse a model that does not lie on one device as a whole, or whose weights are quantised and would be trained.

    Args:
        model: The model, with or without adapter.
        gets_adapter: Whether it is about to get one.
        shards: Whether a trainer was asked to shard it.

    Raises:
        NotImplementedError: If it is cut, spread or offloaded.
        ValueError: If it is quantised by another method than bitsandbytes', or has no adapter.
    """
    _refuse_cut(model, gets_adapter=gets_adapter, shards=shards)
    _refuse_placement(model)
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        if (method := str(getattr(method, "value", method))) != _QUANTISATION:
            raise REFUSALS["quantisation method"].error(method=method)
        if not gets_adapter and not hasattr(model, "peft_config"):
            raise REFUSALS["quantised base"].error(bits=_bits(model))


def refuse_trainer(args: Any, model: Any) -> None:
    """Refuse what a trainer was given, now that its model is known.

    Args:
        args: Its arguments.
        model: Its model, which may hold the policy beside a critic.

    Raises:
        NotImplementedError: If an engine or the model's placement is not supported.
        ValueError: For anything else that is not.
    """
    policy = policy_of(model)  # what holds it says nothing of quantisation and placement
    refuse_arguments(args, _column(policy))
    if is_asked(args) and is_loaded_in_shards(policy):
        raise REFUSALS["FSDP2 twice"].error(field="deepspeed")
    refuse_model(policy, shards=fsdp_version(args) is not None)


def _engines(args: Any) -> Iterator[tuple[str, str, str]]:
    # Row of the table, name of the engine, and where it was asked for.
    if where := _asked(args, "deepspeed"):
        yield (row := zero_row(args)), row, where
    for engine, name, row in (
        ("parallelism_config", "parallelism_config", _PARALLELISM),
        ("Megatron-LM", "megatron_lm", _PARALLELISM),
    ):
        if where := _asked(args, name):
            yield row, engine, where
    if (version := fsdp_version(args)) is not None:
        where = _asked(args, "fsdp")
        if _offloads(args):
            yield "FSDP with offload to the CPU", f"FSDP{version} with offload", where
        yield f"FSDP{version}", f"FSDP{version}", where


def _asked(args: Any, name: str) -> str:
    if getattr(args, name, None):
        return f"`{name}` is set"
    variable = f"ACCELERATE_USE_{name.upper()}"  # `accelerate launch` leaves the arguments empty and says it here
    return f"{variable}={os.environ[variable]}" if is_launched_with(variable) else ""


def _offloads(args: Any) -> bool:
    asked = getattr(args, "fsdp", None) or ""
    named = asked.split() if isinstance(asked, str) else asked if isinstance(asked, list) else []
    of_args = bool((getattr(args, "fsdp_plugin_args", None) or {}).get("cpu_offload"))
    return (
        of_args
        or "offload" in {str(getattr(each, "value", each)) for each in named}
        or is_launched_with("FSDP_OFFLOAD_PARAMS")
    )


def _refuse_cut(model: Any, *, gets_adapter: bool, shards: bool) -> None:
    cut = next(((name, each) for name, each in model.named_parameters() if hasattr(each, "placements")), None)
    if cut is None:
        return
    name, weight = cut
    where, row = "its own code", "FSDP2" if shards else "FSDP2 by the user's own code (`fully_shard`)"
    if is_loaded_in_shards(model):
        where, row = "`distributed_config`", "FSDP2 by the model (`distributed_config`)"
        _refuse_loading(model, gets_adapter=gets_adapter, shards=shards)
    # FSDP2 names no dimension of a mesh that it makes by itself.
    elif "tp" in (weight.device_mesh.mesh_dim_names or (() if shards else ("tp",))):
        where, row = "`tp_plan`", "tensor parallelism by the model (`tp_plan`)"
    if (refused := refusal(row, _column(model))) is not None:
        raise refused.error(name=name, where=where, engine=row)


def _refuse_loading(model: Any, *, gets_adapter: bool, shards: bool) -> None:
    if shards:
        raise REFUSALS["FSDP2 twice"].error(field="fsdp")
    if ways := unsupported_ways(model):
        raise REFUSALS["FSDP2 by the model in other ways"].error(ways=", ".join(ways))
    if not gets_adapter and not hasattr(model, "peft_config") and model.all_tied_weights_keys:
        raise REFUSALS["tied weights by the model"].error(names=dict(model.all_tied_weights_keys))


def _refuse_placement(model: Any) -> None:
    devices = {str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}
    shown = ", ".join(sorted(devices))
    if "disk" in devices or (len(devices) > 1 and devices & _OFFLOADED):
        raise REFUSALS["offload"].error(devices=shown)
    if len(devices) > 1:
        raise REFUSALS["several devices"].error(devices=shown)


def _column(model: Any) -> str:
    full, lora, four_bits, eight_bits = COLUMNS
    if getattr(model, "is_quantized", False):
        return four_bits if _bits(model) == 4 else eight_bits  # noqa: PLR2004
    return lora if hasattr(model, "peft_config") else full


def _bits(model: Any) -> int:
    return 4 if getattr(model, "is_loaded_in_4bit", False) else 8


def policy_of(model: nn.Module) -> nn.Module:
    """Find the model that consolidation is about in what a trainer trains.

    Args:
        model: The model, or a module that holds it as `policy` beside its critic (`critic`, in TRL `value_model`),
            wrapped for several processes or not. What a critic learns is never held back.

    Returns:
        The policy, or the model itself.
    """
    inner = getattr(model, "module", model)
    beside = any(isinstance(getattr(inner, name, None), nn.Module) for name in ("critic", "value_model"))
    policy = getattr(inner, "policy", None)
    return policy if beside and isinstance(policy, nn.Module) else model
