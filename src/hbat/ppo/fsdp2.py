"""PPO under FSDP2: policy, reference and critic are sharded each by itself, as each is called by itself."""

from typing import Any

from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hbat.engines.fsdp2 import keep_sharded, require_supported, shard_with
from hbat.engines.loaded_shards import is_loaded_in_shards
from hbat.engines.refusals import REFUSALS
from hbat.ppo.networks.policy_and_critic import SeparateCritic
from hbat.ppo.networks.reference import Reference


def refuse_critic(kind: str, policy: Any) -> None:
    """Refuse a critic that cannot be built beside a policy.

    Args:
        kind: `shared` or `separate`.
        policy: The policy.

    Raises:
        NotImplementedError: If it would be a copy of a policy that was loaded in shards.
    """
    if kind == "separate" and is_loaded_in_shards(policy):
        raise REFUSALS["separate critic under FSDP2"].error()


def shard_critic(policy: Any, critic: Any) -> None:
    """Shard a critic like its policy, if that was loaded in shards.

    Beside an adapter, which is whole on every process, it stays whole as well: an optimizer takes one or the other.

    Args:
        policy: The policy.
        critic: Its shared critic.
    """
    if not is_loaded_in_shards(policy):
        return
    register_fsdp_forward_method(policy, "generate")
    if not hasattr(policy, "peft_config"):
        fully_shard(critic, mesh=next(policy.parameters()).device_mesh)


def shard_policy_and_critic(trainer: Any, reference: Reference | None) -> None:
    """Shard all that a PPO trainer computes with, unless it is.

    Args:
        trainer: The trainer, under FSDP.
        reference: The reference policy.

    Raises:
        NotImplementedError: If options do not go with sharding.
    """
    require_supported(trainer)
    policy, critic = trainer.model.policy, trainer.model.critic
    if isinstance(critic, SeparateCritic):
        raise REFUSALS["separate critic under FSDP2"].error()
    for model in (policy, None if reference is None else reference.model):
        if model is not None:
            shard_with(trainer, model)
    fully_shard(critic)
    register_fsdp_forward_method(policy, "generate")
    keep_sharded(trainer)
