"""FSDP2 by the host's loading: `from_pretrained(distributed_config=...)` gives each process its part of a model.

The host's trainers (transformers 5.23) take such a model as it is. They cannot write checkpoints that a stage could go
on from, and would take a reference policy that is whole on every process.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hbat.ewc.shards import is_sharded, part_of
from hbat.lifecycle import unpatched_copy


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


def frozen_copy(model: Any) -> nn.Module:
    """Copy a model as a reference policy, without what trainers patched onto it.

    Args:
        model: The model, without adapter; it is left as it was.

    Returns:
        A frozen copy in evaluation mode, sharded where the model was loaded so.
    """
    return _copy_of_parts(model) if is_loaded_in_shards(model) else unpatched_copy(model)


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
