"""Refuses engines, models and optimizers that no trainer of ours can use. What is tested: `docs/support.md`."""

import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from hbat.engines.deepspeed.request import is_asked, refuse_zero, zero_row
from hbat.engines.fsdp2 import fsdp_version
from hbat.engines.loaded_shards import is_loaded_in_shards, unsupported_ways
from hbat.engines.processes import is_launched_with
from hbat.engines.refusals import REFUSALS, Refusal

_PARALLELISM = "tensor, context or sequence parallelism (`parallelism_config`), Megatron-LM"
_OFFLOADED = {"cpu", "disk"}
_INSIDE_BACKWARD = {"lomo", "adalomo"}
_QUANTISATION = "bitsandbytes"
#: Refusals by engine, as the support table names it.
_REFUSED = {
    "FSDP2 by the user's own code (`fully_shard`)": "FSDP2 by the model",
    "FSDP1": "FSDP1",
    "FSDP with offload to the CPU": "FSDP with offload",
    "DeepSpeed without ZeRO": "DeepSpeed",
    "DeepSpeed with offload": "DeepSpeed",
    _PARALLELISM: "parallelism",
    "tensor parallelism by the model (`tp_plan`)": "tensor parallelism by the model",
}
#: The same for a base in 4 or 8 bits alone.
_REFUSED_QUANTISED = {
    "FSDP2": "FSDP2",
    "FSDP2 by the model (`distributed_config`)": "FSDP2",
    "DeepSpeed ZeRO-1": "DeepSpeed",
    "DeepSpeed ZeRO-2": "DeepSpeed",
    "DeepSpeed ZeRO-3": "DeepSpeed",
}


def refusal(engine: str, *, quantised: bool) -> Refusal | None:
    """Refusal of an engine, as the support table names it; None where it is supported."""
    key = _REFUSED.get(engine) or (_REFUSED_QUANTISED.get(engine) if quantised else None)
    return None if key is None else REFUSALS[key]


def refuse_arguments(args: Any = None, *, quantised: bool = False) -> None:
    """Refuse engines that hide or cut gradients, and optimizers that use them up inside the backward pass.

    Args:
        args: A trainer's arguments, or None for what `accelerate launch` says alone.
        quantised: Whether the base is known to be quantised.

    Raises:
        NotImplementedError: If an engine is not supported.
        ValueError: If one process sees several GPUs, or the optimizer acts inside the backward pass.
    """
    for row, engine, where in _engines(args):
        if (refused := refusal(row, quantised=quantised)) is not None:
            raise refused.error(engine=engine, where=where)
    refuse_zero(args)
    optimizer = getattr(args, "optim", "")
    optimizer = str(getattr(optimizer, "value", optimizer))
    if optimizer in _INSIDE_BACKWARD or optimizer.endswith("_layerwise"):
        raise REFUSALS["optimizer"].error(name=optimizer)
    if (count := getattr(args, "n_gpu", 1)) > 1:
        raise REFUSALS["several GPUs in one process"].error(count=count)


def refuse_model(model: Any, *, gets_adapter: bool = False, shards: bool = False) -> None:
    """Refuse a model that is not whole on one device, or that is quantised and has no adapter to train.

    `shards` says whether a trainer is asked to shard it.

    Raises:
        NotImplementedError: If it is sharded, spread over devices or offloaded.
        ValueError: If it is quantised by another method than bitsandbytes', or without adapter.
    """
    _refuse_sharded(model, gets_adapter=gets_adapter, shards=shards)
    _refuse_placement(model)
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        if (method := str(getattr(method, "value", method))) != _QUANTISATION:
            raise REFUSALS["quantisation method"].error(method=method)
        if not gets_adapter and not hasattr(model, "peft_config"):
            raise REFUSALS["quantised base"].error(bits=4 if getattr(model, "is_loaded_in_4bit", False) else 8)


def refuse_trainer(args: Any, model: Any) -> None:
    """Refuse a trainer's arguments and model, which may hold the policy beside a critic, once both are known.

    Raises:
        NotImplementedError: If an engine or the model's placement is not supported.
        ValueError: If anything else is not.
    """
    policy = policy_of(model)  # what holds it says nothing of quantisation and placement
    refuse_arguments(args, quantised=_is_quantised(policy))
    if is_asked(args) and is_loaded_in_shards(policy):
        raise REFUSALS["FSDP2 twice"].error(field="deepspeed")
    refuse_model(policy, shards=fsdp_version(args) is not None)


def policy_of(model: nn.Module) -> nn.Module:
    """Find what consolidation holds back in a trainer's model, wrapped or not: the policy beside a critic, or all."""
    inner = getattr(model, "module", model)
    beside = any(isinstance(getattr(inner, name, None), nn.Module) for name in ("critic", "value_model"))
    policy = getattr(inner, "policy", None)
    return policy if beside and isinstance(policy, nn.Module) else model


def _engines(args: Any) -> Iterator[tuple[str, str, str]]:
    # Row of the support table, name of the engine, and where it was asked for.
    if where := _asked(args, "deepspeed"):
        yield (row := zero_row(args)), row, where
    for engine, name in (("parallelism_config", "parallelism_config"), ("Megatron-LM", "megatron_lm")):
        if where := _asked(args, name):
            yield _PARALLELISM, engine, where
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
    options = asked.split() if isinstance(asked, str) else asked if isinstance(asked, list) else []
    return (
        bool((getattr(args, "fsdp_plugin_args", None) or {}).get("cpu_offload"))
        or "offload" in {str(getattr(option, "value", option)) for option in options}
        or is_launched_with("FSDP_OFFLOAD_PARAMS")
    )


def _refuse_sharded(model: Any, *, gets_adapter: bool, shards: bool) -> None:
    parameters = model.named_parameters()
    name, weight = next(((name, weight) for name, weight in parameters if hasattr(weight, "placements")), ("", None))
    if weight is None:
        return
    where, row = "its own code", "FSDP2" if shards else "FSDP2 by the user's own code (`fully_shard`)"
    if is_loaded_in_shards(model):
        where, row = "`distributed_config`", "FSDP2 by the model (`distributed_config`)"
        _refuse_loading(model, gets_adapter=gets_adapter, shards=shards)
    # FSDP2 names no dimension of a mesh that it makes by itself.
    elif "tp" in (weight.device_mesh.mesh_dim_names or (() if shards else ("tp",))):
        where, row = "`tp_plan`", "tensor parallelism by the model (`tp_plan`)"
    if (refused := refusal(row, quantised=_is_quantised(model))) is not None:
        raise refused.error(name=name, where=where, engine=row)


def _refuse_loading(model: Any, *, gets_adapter: bool, shards: bool) -> None:
    if shards:
        raise REFUSALS["FSDP2 twice"].error(field="fsdp")
    if ways := unsupported_ways(model):
        raise REFUSALS["FSDP2 by the model in other ways"].error(ways=", ".join(ways))
    if not gets_adapter and not hasattr(model, "peft_config") and model.all_tied_weights_keys:
        raise REFUSALS["tied weights by the model"].error(names=dict(model.all_tied_weights_keys))


def _refuse_placement(model: Any) -> None:
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    shown = ", ".join(sorted(devices))
    if "disk" in devices or (len(devices) > 1 and devices & _OFFLOADED):
        raise REFUSALS["offload"].error(devices=shown)
    if len(devices) > 1:
        raise REFUSALS["several devices"].error(devices=shown)


def _is_quantised(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))
