"""PPO under FSDP2: policy, reference and critic are sharded each by itself, as each is called by itself."""

from typing import Any

from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from hbat.ppo.critic import SeparateCritic
from hbat.ppo.reference import Reference
from hbat.refusals import REFUSALS
from hbat.sharding import keep_sharded, require_supported, shard_with


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
