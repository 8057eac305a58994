"""What PPO asks of the engine (one process, DDP or sharding): the only file of this wing that calls `hbat.engines`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hbat.engines import checks
from hbat.engines.deepspeed.request import is_asked
from hbat.engines.fsdp2 import keep_sharded, require_supported, shard_with
from hbat.engines.loaded_shards import is_loaded_in_shards, written_as_whole
from hbat.engines.refusals import REFUSALS
from hbat.engines.sharded import give_back, is_sharded, shared_as, whole_state, whole_tensors

__all__ = [
    "give_back", "is_loaded_in_shards", "is_sharded", "refuse_arguments", "refuse_base", "refuse_policy", "shard",
    "shared_as", "whole_weights", "written_as_whole",
]  # fmt: skip


def refuse_arguments(args: Any) -> None:
    """Refuse engines that PPO does not support, before a model is loaded."""
    checks.refuse_arguments(args)
    if is_asked(args):
        raise REFUSALS["PPOTrainer under DeepSpeed"].error()


def refuse_base(model: Any) -> None:
    """Refuse a model that cannot get an adapter."""
    checks.refuse_model(model, gets_adapter=True)


def refuse_policy(args: Any, policy: Any) -> None:
    """Refuse a policy that the engine does not support, or whose separate critic would copy shards."""
    checks.refuse_trainer(args, policy)
    if args.critic == "separate" and is_loaded_in_shards(policy):
        raise REFUSALS["separate critic under FSDP2"].error()


def shard(trainer: Any, reference: Any) -> None:
    """Shard policy, reference model and critic if the trainer shards, and the critic if its policy was loaded sharded.

    Each is sharded by itself, as each is called by itself. In one process and under DDP, nothing happens.
    """
    policy, critic = trainer.model.policy, trainer.model.critic
    if trainer.is_fsdp_enabled:
        require_supported(trainer)
        if critic.trunk is not None:
            raise REFUSALS["separate critic under FSDP2"].error()
        for model in (policy, reference):
            if model is not None:
                shard_with(trainer, model)
        fully_shard(critic)
        register_fsdp_forward_method(policy, "generate")
        keep_sharded(trainer)
    elif is_loaded_in_shards(policy):
        register_fsdp_forward_method(policy, "generate")
        # An adapter is whole on every process, and an optimizer takes either sharded tensors or whole ones.
        if not hasattr(policy, "peft_config"):
            fully_shard(critic, mesh=next(policy.parameters()).device_mesh)


def whole_weights(
    policy: Any, critic: Mapping[str, Tensor], gathered: Mapping[str, Tensor] | None, *, keep: bool
) -> tuple[dict[str, Tensor] | None, Mapping[str, Tensor] | None]:
    """The policy's state dict and the critic's tensors to write; collective if the policy was loaded sharded.

    `gathered` is the state dict of both, which transformers gathered from its shards; `keep`: this process writes.

    Returns:
        None for a policy that writes its own, and for a critic that transformers saves.
    """
    if is_loaded_in_shards(policy):
        return whole_state(policy, keep=keep), whole_tensors(critic, keep=keep)
    if is_sharded(policy):
        own = {name: tensor for name, tensor in (gathered or {}).items() if name.startswith("policy.")}
        return {name.removeprefix("policy."): tensor for name, tensor in own.items()}, None
    return None, critic
