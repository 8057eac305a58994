"""What arguments or `accelerate launch` ask of DeepSpeed: read, and refused where it is untested."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbat.engines.processes import is_launched_with
from hbat.engines.refusals import REFUSALS

_OFFLOADS = ("offload_optimizer", "offload_param")
_VARIABLE = "ACCELERATE_USE_DEEPSPEED"
_HALVES = ("bf16", "fp16", "torch_autocast")
#: Where the optimizer steps float32 weights.
_IN_BFLOAT16 = {"DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2"}
_COARSE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
#: Options of ZeRO-3 (ZeRO++, MiCS) that split weights other than evenly over all ranks, with the values that do not.
_UNEVEN = {
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False, "mics_shard_size": -1,
}  # fmt: skip


def zero_row(args: Any) -> str:
    """Row of the support table (`docs/support.md`); `args` is None for what `accelerate launch` says alone."""
    zero = _section(deepspeed_config(args), "zero_optimization")
    devices = {_section(zero, name).get("device") for name in _OFFLOADS}
    if devices - {None, "none"} or zero.get("cpu_offload"):
        return "DeepSpeed with offload"
    stage = zero.get("stage", 0)
    return f"DeepSpeed ZeRO-{stage}" if stage in {1, 2, 3} else "DeepSpeed without ZeRO"


def is_asked(args: Any = None) -> bool:
    """Whether arguments or `accelerate launch` ask for DeepSpeed."""
    return bool(getattr(args, "deepspeed", None)) or is_launched_with(_VARIABLE)


def refuse_zero(args: Any) -> None:
    """Refuse options of DeepSpeed that no trainer can use: untested half precision, and uneven shares of weights."""
    if not is_asked(args):
        return
    config, row = deepspeed_config(args), zero_row(args)
    halves = _halves(args, config)
    for key in halves:
        if key != "bf16" or row not in _IN_BFLOAT16:
            raise REFUSALS["half precision under DeepSpeed"].error(where=f"`{key}`")
    owned = [key for key in _COARSE if _section(config, "bf16").get(key)]
    gradients = _section(config, "data_types").get("grad_accum_dtype") or "bf16"
    if row == "DeepSpeed ZeRO-1" and gradients not in {"bf16", "bfloat16"}:
        owned.append("grad_accum_dtype")  # with which DeepSpeed takes another optimizer at this stage
    if halves and owned:
        raise REFUSALS["bfloat16 options under DeepSpeed"].error(owned=owned)
    zero = _section(config, "zero_optimization")
    for key, off in _UNEVEN.items():
        if zero.get(key, off) != off:
            raise REFUSALS["quantised or grouped shares under DeepSpeed"].error(name=key, value=zero[key])


def _halves(args: Any, config: Mapping[str, Any]) -> list[str]:
    asked = [key for key in _HALVES if getattr(args, key, False) or _section(config, key).get("enabled") is True]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return asked if launched in {"no", *asked} else [*asked, launched]


@contextmanager
def left_aside(args: Any) -> Iterator[dict[str, Any]]:
    """Build a trainer without DeepSpeed in the block; yields changes of its arguments."""
    # Between stages every rank has the whole model, and transformers evaluates with ZeRO-1 and -2 only in training.
    launched = os.environ.pop(_VARIABLE, None)
    try:
        # accelerate starts no process group on CPU unless `use_cpu`.
        yield {"deepspeed": None} | ({"use_cpu": True} if args.device.type == "cpu" else {})
    finally:
        if launched is not None:
            os.environ[_VARIABLE] = launched


def deepspeed_config(args: Any) -> Mapping[str, Any]:
    """DeepSpeed's configuration: of a trainer's arguments, or as `accelerate launch` says it.

    Raises:
        ValueError: If `deepspeed` is no configuration and no file with one.
    """
    plugin = getattr(args, "deepspeed_plugin", None)  # made by transformers of all three that follow
    if plugin is not None:
        return dict(plugin.deepspeed_config)
    given = getattr(args, "deepspeed", None)
    if given is None:
        given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(given, Mapping):
        return given
    if given and given != "none":
        return _read(given)
    launched = {name: {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE")} for name in _OFFLOADS}
    return {"zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), **launched}}


def _read(file: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`deepspeed` is {file!r:.80}, which cannot be read as a DeepSpeed configuration ({reason}). Give a "
            "mapping, or the path of a JSON file."
        ) from error


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
