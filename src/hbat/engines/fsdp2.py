"""FSDP2: a run's models are sharded once, by the host's own functions, and stay so from stage to stage.

Every trainer would shard the model that it is given. The second one fails on it (accelerate 1.10-1.15 looks for the
decoder layers by the names of their classes, which are others then), so from the first stage on trainers are given a
model that is sharded already, and take it as it is.
"""

import copy
import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainingArguments

from hbat.config.hbat import HBATConfig
from hbat.engines.environment import kept_environment
from hbat.engines.processes import is_launched_with, is_main_process, process_count
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import is_sharded, part_of


def is_loaded_in_shards(model: Any) -> bool:
    """Whether the host has sharded a model while it loaded it.

    Args:
        model: The model, with its adapter where there is one.

    Returns:
        True if it did so by FSDP2.
    """
    return bool(getattr(model, "is_distributed_loading_by_transformers", False)) and is_sharded(model)


def unsupported_ways(model: Any) -> list[str]:
    """List what a model's `distributed_config` asks for beside parts of all weights on all processes.

    Args:
        model: A model that was loaded in shards.

    Returns:
        Fields of the configuration with their values.
    """
    config = model.config.distributed_config
    sizes = [name for name in ("dp_replicate_size", "tp_size", "pp_size", "ep_size") if getattr(config, name, 1) != 1]
    switches = [name for name in ("fsdp_cpu_offload", "fsdp_mixed_precision") if getattr(config, name, False)]
    return [f"{name}={getattr(config, name)}" for name in (*sizes, *switches)]


def without_checkpoints(args: TrainingArguments) -> dict[str, Any]:
    """Say which options keep a trainer of such a model from writing what nobody can go on from.

    Args:
        args: The trainer's options.

    Returns:
        Changes of the options; none where snapshots of the weights alone were asked for.
    """
    return {} if args.save_only_model else {"save_strategy": "no"}


@torch.no_grad()
def _copy_of_parts(model: Any) -> nn.Module:
    # torch copies no sharded modules.
    config, mesh = copy.deepcopy(model.config), model._mesh_manager  # noqa: SLF001 - there is no public way
    own = dict(model.named_parameters())
    with torch.random.fork_rng(), torch.device("meta"):
        duplicate = type(model)(config)  # without FSDP2, which undoes its own subclass here
    for name, each in duplicate.named_parameters():
        each.data = each.data.to(own[name].dtype)
    duplicate.requires_grad_(False)
    duplicate = duplicate.maybe_distribute_model(duplicate, config.distributed_config, mesh)
    duplicate.to_empty(device=next(iter(own.values())).device)
    for name, each in duplicate.named_parameters():
        part_of(each).copy_(part_of(own[name]))
    for name, each in duplicate.named_buffers():
        each.copy_(model.get_buffer(name))
    frozen: nn.Module = duplicate.requires_grad_(False).eval()
    return frozen


def let_go(model: Any) -> None:
    """Take back how a trainer averages an adapter's gradients, which would hold it as long as the model lives.

    Args:
        model: A model that was loaded in shards, after a stage.
    """
    for each in model.parameters():
        if each.__dict__.pop("_replicated_grad_hook_registered", False):
            each._post_accumulate_grad_hooks.clear()  # noqa: SLF001 - the host throws the handles away


@contextmanager
def written_as_whole(model: Any) -> Iterator[None]:
    """Let the host write a model whose parts were put together already, from the main process alone.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    if not is_loaded_in_shards(model):
        yield
        return
    config = model.config
    kept, config.distributed_config = config.distributed_config, None
    try:
        yield
    finally:
        config.distributed_config = kept


def fsdp_version(args: Any = None) -> int | None:
    """Find out whether FSDP is asked for, and which.

    Args:
        args: The host's arguments, or None.

    Returns:
        1 or 2; None where it is not asked for.
    """
    if not getattr(args, "fsdp", None) and not is_launched_with("ACCELERATE_USE_FSDP"):
        return None
    if not hasattr(args, "fsdp") and "FSDP_VERSION" not in os.environ:
        return None  # not `accelerate launch`, but an earlier trainer of this process has left it
    of_args = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")  # transformers < 5 has none
    return int(of_args or os.environ.get("FSDP_VERSION", "1"))


logger = logging.getLogger(__name__)


Shard = Callable[[nn.Module], None]


#: Options of a section that say how its trainer would shard: one model has one sharding.
_SHARED_OPTIONS = ("fsdp", "fsdp_config", "bf16", "fp16")


def sharding(
    config: HBATConfig, objectives: Iterable[Any], sections: Mapping[str, TrainingArguments], model: Any = None
) -> Shard | None:
    """Find out how the trainers of a run would shard its model.

    Args:
        config: The run's configuration.
        objectives: Its objectives.
        sections: Configuration of each objective.
        model: The model, which can have been sharded when it was loaded.

    Returns:
        What shards a model in place as they would; None where they would not.

    Raises:
        NotImplementedError: If they would in a way in which no run can train.
        ValueError: If they would in different ways.
    """
    asked = [name for name, each in sections.items() if fsdp_version(each) is not None]
    loaded = is_loaded_in_shards(model)
    if not asked and not loaded:
        return None
    for each in objectives:
        _require_trainable(each, sections[each.name])
    if config.ewc is not None and config.ewc.anchor_device == "cpu":
        raise REFUSALS["anchor on the CPU"].error(engine="FSDP2")
    if config.ewc is not None and config.ewc.source == "fisher" and config.ewc.estimator == "empirical":
        raise REFUSALS["Fisher of samples under FSDP2"].error()
    if loaded:
        _require_trainable_as_loaded(sections)
        return None
    _require_agreement(sections)
    if process_count() == 1:
        raise REFUSALS["FSDP2 in one process"].error()
    with kept_environment(), tempfile.TemporaryDirectory() as folder:
        args = dataclasses.replace(sections[asked[0]], output_dir=folder, report_to="none")
        trainer = Trainer(nn.Linear(1, 1), args)  # for its accelerator alone, made as in every stage
    require_supported(trainer)
    return functools.partial(_shard, trainer.accelerator)


def _require_agreement(sections: Mapping[str, TrainingArguments]) -> None:
    for option in _SHARED_OPTIONS:
        values = {name: getattr(each, option, None) for name, each in sections.items()}
        if any(each != next(iter(values.values())) for each in values.values()):
            raise ValueError(
                f"`{option}` differs between the sections: {values}. The model is sharded once for all stages, so set "
                "it to the same in all of them."
            )


def _require_trainable(objective: Any, args: TrainingArguments) -> None:
    optimizer = str(getattr(args.optim, "value", args.optim))
    refused = {
        "objective under FSDP2": not objective.trains_shards,
        "precomputed reference under FSDP2": getattr(args, "precompute_ref_log_probs", False),
        "8-bit optimizers under FSDP2": "bit" in optimizer or "paged" in optimizer,
    }
    for what, asked in refused.items():
        if asked:
            raise REFUSALS[what].error(objective=objective.name, name=optimizer)


def _require_trainable_as_loaded(sections: Mapping[str, TrainingArguments]) -> None:
    if any(each.torch_compile for each in sections.values()):
        raise REFUSALS["FSDP2 with compilation"].error()
    if is_main_process():
        logger.warning(
            "A model that was loaded in shards (`distributed_config`) gets no checkpoints inside a stage: one that is "
            "cut off begins anew. With more rounds (`num_rounds`) stages are shorter."
        )


def require_supported(trainer: Trainer) -> None:
    """Check how a trainer shards.

    Args:
        trainer: A trainer that is asked to.

    Raises:
        NotImplementedError: If it does in a way that is not supported.
    """
    accelerator, args = trainer.accelerator, trainer.args
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise REFUSALS["FSDP2 left aside"].error(engine=str(accelerator.distributed_type))
    mesh = getattr(accelerator, "torch_device_mesh", None)
    in_one_file = "FULL" in str(plugin.state_dict_type)
    where = "accelerate's plug-in"
    refused = {
        "FSDP1": plugin.fsdp_version == 1,
        "FSDP with offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "FSDP2 with activation checkpointing": plugin.activation_checkpointing,
        "FSDP2 on a mesh": mesh is not None and mesh.ndim > 1,
        "FSDP2 with an optimizer without state": in_one_file and getattr(args.optim, "value", args.optim) == "sgd",
        "FSDP2 with compilation": args.torch_compile,
    }
    for what, asked in refused.items():
        if asked:
            raise REFUSALS[what].error(engine=what, where=where)


def _shard(accelerator: Any, model: nn.Module) -> None:
    if is_sharded(model):
        name = next(iter(dict(model.named_parameters())))
        raise REFUSALS["FSDP2 by the model"].error(name=name, where="its own code")
    fsdp2_prepare_model(accelerator, model)  # in place


def shard_with(trainer: Trainer, model: nn.Module) -> None:
    """Shard a model as a trainer would, unless it is.

    Args:
        trainer: The trainer.
        model: The model; changed in place.
    """
    if not is_sharded(model):
        _shard(trainer.accelerator, model)


def keep_sharded(trainer: Trainer) -> None:
    """Let a trainer take a model as it is that is sharded already, or that holds one.

    Args:
        trainer: The trainer; a `StageGuard` takes this back.

    Raises:
        NotImplementedError: If it would shard in a way that is not supported.
    """
    require_supported(trainer)
    accelerator: Any = trainer.accelerator
    prepare = accelerator.prepare

    def keeping(*objects: Any, **options: Any) -> Any:
        if not any(isinstance(each, nn.Module) and is_sharded(each) for each in objects):
            return prepare(*objects, **options)
        # An optimizer made of sharded parameters needs no others in their stead, as accelerate's own way gives it.
        kept = [each if isinstance(each, nn.Module) else accelerator.prepare_optimizer(each) for each in objects]
        return tuple(kept) if len(kept) > 1 else kept[0]

    accelerator.prepare = keeping
