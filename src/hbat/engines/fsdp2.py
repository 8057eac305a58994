"""FSDP2: a run's model and reference policy are sharded once, by accelerate's own function, and stay so.

Every trainer would shard the model that it is given, and the second would fail on it (accelerate 1.10-1.15 looks for
the decoder layers by the names of their classes, which FSDP2 changes). So trainers are given models that are sharded.
A model that was loaded in shards is `loaded_shards`; PPO's models are sharded in `hbat.ppo.engine`.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from hbat.config.ewc import EWCConfig
from hbat.engines.engine import Engine, Trained
from hbat.engines.environment import kept_environment
from hbat.engines.patches import keep_models
from hbat.engines.processes import is_launched_with, process_count
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import give_back, is_sharded

#: Arguments that say how a trainer shards, and in which precision: one model has one sharding.
_SHARING = ("fsdp", "fsdp_config", "bf16", "fp16")


class FSDP2(Engine):
    """FSDP2 over all ranks, in the way that the arguments or `accelerate launch` ask for."""

    name = "fsdp2"
    computes_at_once = False
    shards = True

    def __init__(self) -> None:
        self._accelerator: Any = None

    def check(self, tracks: Sequence[Trained], ewc: EWCConfig | None) -> None:
        """See `Engine`."""
        self._refuse_untested(tracks, ewc)
        _require_agreement(tracks)
        if process_count() == 1:
            raise REFUSALS["FSDP2 in one process"].error()
        args = next(track.args for track in tracks if fsdp_version(track.args) is not None)
        with kept_environment(), tempfile.TemporaryDirectory() as folder:
            args = dataclasses.replace(args, output_dir=folder, report_to="none")
            trainer = Trainer(nn.Linear(1, 1), args)  # for its accelerator, made as in every stage
        require_supported(trainer)
        self._accelerator = trainer.accelerator

    def _refuse_untested(self, tracks: Sequence[Trained], ewc: EWCConfig | None) -> None:
        for track in tracks:
            self.refuse_untested(track, optimizer_is_tested=lambda name: "bit" not in name)  # nor paged
        if ewc is not None and ewc.source == "fisher" and ewc.estimator == "empirical":
            raise REFUSALS["Fisher of samples under FSDP2"].error()

    def place(self, model: nn.Module, reference: nn.Module | None) -> None:
        """See `Engine`."""
        for whole in (model, reference):
            if whole is not None:
                _shard(self._accelerator, whole)

    def adapt(self, trainer: Trainer) -> None:
        """See `Engine`."""
        keep_sharded(trainer)

    def gather(self, model: nn.Module) -> None:
        """Reshard what a forward pass left unsharded; the model stays sharded between stages."""
        give_back(model)


def fsdp_version(args: Any = None) -> int | None:
    """1 or 2 if arguments or `accelerate launch` ask for FSDP, otherwise None."""
    if not getattr(args, "fsdp", None) and not is_launched_with("ACCELERATE_USE_FSDP"):
        return None
    if not hasattr(args, "fsdp") and "FSDP_VERSION" not in os.environ:
        return None  # set by an earlier trainer of this process, not by `accelerate launch`
    of_args = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")  # transformers < 5 has none
    return int(of_args or os.environ.get("FSDP_VERSION", "1"))


def _require_agreement(tracks: Sequence[Trained]) -> None:
    for option in _SHARING:
        values = {track.name: getattr(track.args, option, None) for track in tracks}
        if any(value != next(iter(values.values())) for value in values.values()):
            raise ValueError(
                f"`{option}` differs between the objectives: {values}. The model is sharded once for all stages; set "
                "the same value for all objectives."
            )


def require_supported(trainer: Trainer) -> None:
    """Refuse a trainer that is asked to shard and would in an unsupported way, or not at all.

    Raises:
        NotImplementedError: With what is not supported.
    """
    accelerator, args = trainer.accelerator, trainer.args
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        raise REFUSALS["FSDP2 left aside"].error(engine=str(accelerator.distributed_type))
    mesh = getattr(accelerator, "torch_device_mesh", None)
    in_one_file = "FULL" in str(plugin.state_dict_type)
    refused = {
        "FSDP1": plugin.fsdp_version == 1,
        "FSDP with offload": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "FSDP2 with activation checkpointing": plugin.activation_checkpointing,
        "FSDP2 on a mesh": mesh is not None and mesh.ndim > 1,
        "FSDP2 with an optimizer without state": in_one_file and getattr(args.optim, "value", args.optim) == "sgd",
    }
    for what, asked in refused.items():
        if asked:
            raise REFUSALS[what].error(engine=what, where="accelerate's plug-in")
    if args.torch_compile:
        raise REFUSALS["compilation"].error(engine=FSDP2.name)


def shard_with(trainer: Trainer, model: nn.Module) -> None:
    """Shard a model in place as a trainer would, unless it is sharded."""
    if not is_sharded(model):
        _shard(trainer.accelerator, model)


def _shard(accelerator: Any, model: nn.Module) -> None:
    if is_sharded(model):
        name = next(name for name, _ in model.named_parameters())
        raise REFUSALS["FSDP2 by the model"].error(name=name, where="its own code")
    fsdp2_prepare_model(accelerator, model)


def keep_sharded(trainer: Trainer) -> None:
    """Let a trainer (see `require_supported`) take models that are sharded, or hold a sharded one, as they are."""
    require_supported(trainer)
    keep_models(trainer.accelerator, is_sharded)
