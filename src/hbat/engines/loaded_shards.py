"""FSDP2 by transformers 5: models that `from_pretrained` loads in shards (`distributed_config`)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hbat.config.ewc import EWCConfig
from hbat.engines.engine import Trained
from hbat.engines.fsdp2 import FSDP2
from hbat.engines.sharded import is_sharded, part_of


class LoadedShards(FSDP2):
    """The model is sharded when it is loaded, and trainers take it as it is. An adapter stays whole on every rank."""

    shards = False
    resumes_inside_stage = False  # transformers writes no checkpoint of such a model that it could load

    def check(self, tracks: Sequence[Trained], ewc: EWCConfig | None) -> None:
        """See `Engine`."""
        self._refuse_untested(tracks, ewc)

    @contextmanager
    def stage(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """See `Engine`."""
        try:
            yield
        finally:
            for model in models:
                _remove_gradient_hooks(model)

    def place(self, model: nn.Module, reference: nn.Module | None) -> None:
        """Nothing to shard."""

    def adapt(self, trainer: Trainer) -> None:
        """Nothing to patch."""


def is_loaded_in_shards(model: Any) -> bool:
    """Whether transformers sharded a model when it loaded it."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False)) and is_sharded(model)


def unsupported_ways(model: Any) -> list[str]:
    """What a model's `distributed_config` asks for beside sharding over all ranks, as `field=value`."""
    config = model.config.distributed_config
    sizes = [name for name in ("dp_replicate_size", "tp_size", "pp_size", "ep_size") if getattr(config, name, 1) != 1]
    switches = [name for name in ("fsdp_cpu_offload", "fsdp_mixed_precision") if getattr(config, name, False)]
    return [f"{name}={getattr(config, name)}" for name in (*sizes, *switches)]


@torch.no_grad()
def copy_of_shards(model: Any) -> nn.Module:
    """Copy a model that was loaded in shards, frozen and in evaluation mode: torch copies no sharded modules."""
    config, mesh = copy.deepcopy(model.config), model._mesh_manager  # noqa: SLF001 - there is no public way
    own = dict(model.named_parameters())
    with torch.random.fork_rng(), torch.device("meta"):
        duplicate = type(model)(config)  # without FSDP2, which undoes its own subclass here
    for name, parameter in duplicate.named_parameters():
        parameter.data = parameter.data.to(own[name].dtype)
    duplicate.requires_grad_(False)
    duplicate = duplicate.maybe_distribute_model(duplicate, config.distributed_config, mesh)
    duplicate.to_empty(device=next(iter(own.values())).device)
    for name, parameter in duplicate.named_parameters():
        part_of(parameter).copy_(part_of(own[name]))
    for name, buffer in duplicate.named_buffers():
        buffer.copy_(model.get_buffer(name))
    frozen: nn.Module = duplicate.requires_grad_(False).eval()
    return frozen


@contextmanager
def written_as_whole(model: Any) -> Iterator[None]:
    """Let `save_pretrained` write gathered weights of a model, on rank 0 alone, as it writes those of a whole one."""
    if not is_loaded_in_shards(model):
        yield
        return
    config = model.config
    kept, config.distributed_config = config.distributed_config, None
    try:
        yield
    finally:
        config.distributed_config = kept


def _remove_gradient_hooks(model: nn.Module) -> None:
    # By which a trainer averages an adapter's gradients; they would hold the trainer as long as the model lives.
    for parameter in model.parameters():
        if parameter.__dict__.pop("_replicated_grad_hook_registered", False):
            parameter._post_accumulate_grad_hooks.clear()  # noqa: SLF001
