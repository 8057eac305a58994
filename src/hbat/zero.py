"""What a run asks of DeepSpeed, as its arguments or `accelerate launch` say it: read, and refused where untested."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbat.processes import is_launched_with
from hbat.refusals import REFUSALS

_OFFLOADS = ("offload_optimizer", "offload_param")
_VARIABLE = "ACCELERATE_USE_DEEPSPEED"
_HALVES = ("bf16", "fp16", "torch_autocast")
#: Where the weights that the optimizer steps are float32 ones, a piece on each process.
_IN_BFLOAT16 = {"DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2"}
_COARSE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
#: Optimizers whose state is a tensor like the weights, or a number: what a stage hands to its objective's next one.
_OPTIMIZERS = {"adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"}


def zero_row(args: Any) -> str:
    """Find the row of the table for what is asked of DeepSpeed.

    Args:
        args: The host's arguments, or None for what `accelerate launch` was told alone.

    Returns:
        A key of `support.ENGINES`.
    """
    zero = _section(_config(args), "zero_optimization")
    devices = {_section(zero, each).get("device") for each in _OFFLOADS}
    if devices - {None, "none"} or zero.get("cpu_offload"):
        return "DeepSpeed with offload"
    stage = zero.get("stage", 0)
    return f"DeepSpeed ZeRO-{stage}" if stage in {1, 2} else "DeepSpeed ZeRO-3, or without ZeRO"


def is_asked(args: Any = None) -> bool:
    """Whether DeepSpeed is asked for.

    Args:
        args: The host's arguments, or None.

    Returns:
        True if they do, or the environment does.
    """
    return bool(getattr(args, "deepspeed", None)) or is_launched_with(_VARIABLE)


def refuse_zero(args: Any) -> None:
    """Refuse what nothing can do under DeepSpeed, where it is asked for.

    Args:
        args: The host's arguments, or None.

    Raises:
        NotImplementedError: If they compute in half precision in a way that was not tested.
    """
    if not is_asked(args):
        return
    config, row = _config(args), zero_row(args)
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


def _halves(args: Any, config: Mapping[str, Any]) -> list[str]:
    asked = [key for key in _HALVES if getattr(args, key, False) or _section(config, key).get("enabled") is True]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return asked if launched in {"no", *asked} else [*asked, launched]


@contextmanager
def left_aside(args: Any, *, wanted: bool = True) -> Iterator[dict[str, Any]]:
    """Let a trainer that is built in the block do without DeepSpeed.

    Every process holds the whole model under ZeRO-1 and -2, and the host evaluates with them in training alone.

    Args:
        args: The host's arguments as they were given.
        wanted: Whether it shall.

    Yields:
        Changes of the arguments.
    """
    if not (wanted and is_asked(args)):
        yield {}
        return
    launched = os.environ.pop(_VARIABLE, None)
    try:
        # Without DeepSpeed accelerate takes processes on a CPU for strangers, unless it is told of the CPU.
        yield {"deepspeed": None} | ({"use_cpu": True} if args.device.type == "cpu" else {})
    finally:
        if launched is not None:
            os.environ[_VARIABLE] = launched


def require_trainable(config: Any, objectives: Iterable[Any], sections: Mapping[str, Any]) -> None:
    """Refuse what a run cannot do under DeepSpeed.

    Args:
        config: The run's configuration.
        objectives: Its objectives.
        sections: Configuration of each objective.

    Raises:
        NotImplementedError: If it is asked to.
    """
    asked = {name: each for name, each in sections.items() if is_asked(each)}
    if not asked:
        return
    for each in objectives:
        if each.name in asked:
            _require_trainable(each, asked[each.name])
    if len(asked) < len(sections):
        raise REFUSALS["DeepSpeed for some objectives"].error(names=sorted(asked))
    if config.ewc is not None and config.ewc.method == "proximal":
        raise REFUSALS["proximal steps under DeepSpeed"].error()
    if config.ewc is not None and config.ewc.freeze:
        raise REFUSALS["frozen tensors under DeepSpeed"].error()
    if config.ewc is not None and config.ewc.anchor_device == "cpu":
        raise REFUSALS["anchor on the CPU"].error(engine="DeepSpeed")


def _require_trainable(objective: Any, args: Any) -> None:
    config = _config(args)
    optimizer = str(getattr(args.optim, "value", args.optim))
    owned = [key for key in ("optimizer", "scheduler") if config.get(key)]
    refused = {
        "objective under DeepSpeed": not objective.trains_zero,
        "optimizer by DeepSpeed": bool(owned),
        "optimizer under DeepSpeed": optimizer not in _OPTIMIZERS,
        "precomputed reference under DeepSpeed": bool(getattr(args, "precompute_ref_log_probs", False)),
        "compilation under DeepSpeed": bool(args.torch_compile),
    }
    for what, asked in refused.items():
        if asked:
            raise REFUSALS[what].error(objective=objective.name, name=optimizer, owned=owned)


def _config(args: Any) -> Mapping[str, Any]:
    plugin = getattr(args, "deepspeed_plugin", None)  # made by the host of all three that follow
    if plugin is not None:
        return dict(plugin.deepspeed_config)
    given = getattr(args, "deepspeed", None)
    if given is None:
        given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if isinstance(given, Mapping):
        return given
    if given and given != "none":
        return _read(given)
    launched = {each: {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_{each.upper()}_DEVICE")} for each in _OFFLOADS}
    return {"zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), **launched}}


def _read(file: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`deepspeed` is {file!r:.80}, which is no configuration of DeepSpeed's ({reason}). Give a mapping, or "
            "the path of a JSON file that holds one."
        ) from error


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}
