"""What a run asks of DeepSpeed, as its arguments or `accelerate launch` say it: read, and refused where untested."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hbat.engines.processes import is_launched_with
from hbat.engines.refusals import REFUSALS

_OFFLOADS = ("offload_optimizer", "offload_param")


_VARIABLE = "ACCELERATE_USE_DEEPSPEED"


_HALVES = ("bf16", "fp16", "torch_autocast")


#: Where the weights that the optimizer steps are float32 ones, a piece on each process.
_IN_BFLOAT16 = {"DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2"}


_COARSE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")


#: Options of ZeRO-3 (ZeRO++, MiCS) with which the shares of a weight are no even split over all processes, and their
#: values where they do nothing.
_UNEVEN = {
    "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False, "mics_shard_size": -1,
}  # fmt: skip


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
    return f"DeepSpeed ZeRO-{stage}" if stage in {1, 2, 3} else "DeepSpeed without ZeRO"


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
        NotImplementedError: If they compute in half precision in a way that was not tested, or ask for shares of
            weights that are not even.
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
    zero = _section(config, "zero_optimization")
    for key, off in _UNEVEN.items():
        if zero.get(key, off) != off:
            raise REFUSALS["quantised or grouped shares under DeepSpeed"].error(name=key, value=zero[key])


def _halves(args: Any, config: Mapping[str, Any]) -> list[str]:
    asked = [key for key in _HALVES if getattr(args, key, False) or _section(config, key).get("enabled") is True]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return asked if launched in {"no", *asked} else [*asked, launched]


@contextmanager
def left_aside(args: Any, *, wanted: bool = True) -> Iterator[dict[str, Any]]:
    """Let a trainer that is built in the block do without DeepSpeed.

    Outside of stages every process holds the whole model, and the host evaluates with ZeRO-1 and -2 in training alone.

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


def drop_empty_groups(trainer: Any) -> None:
    """Let a trainer's optimizer have no group without parameters, where the trainer trains with DeepSpeed.

    transformers 4.57 makes one for an adapter, whose parameters all decay. ZeRO-3 (0.19) leaves it out of the groups
    that it steps, so that the schedule has one learning rate too many.

    Args:
        trainer: The trainer, before its optimizer is made.
    """
    if not trainer.is_deepspeed_enabled:
        return
    make = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        optimizer.param_groups[:] = [each for each in optimizer.param_groups if each["params"]]
        return optimizer

    trainer.create_optimizer = create_optimizer


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
