"""Policy and critic, which PPO trains as one module."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from hbat.model.copies import unpatched_copy
from hbat.model.load import load_pretrained
from hbat.ppo.engine import is_loaded_in_shards
from hbat.ppo.networks.token_model import TokenModel


class Critic(nn.Module):
    """A value head on hidden states: the policy's, or those of a trunk of its own.

    Args:
        head: From hidden states to values.
        trunk: A module whose output has `last_hidden_state`; None for a head on the policy's trunk.
    """

    def __init__(self, head: nn.Module, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Values in float32, shape `[rows, tokens]`, of hidden states `[rows, tokens, width]`."""
        # Not in bfloat16: advantages are differences of values, for which its three digits are too few.
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.to(next(self.head.parameters()).dtype))
            return values.squeeze(-1).float()


def build_critic(kind: str, policy: Any, name_or_path: str | None) -> Critic:
    """A critic that is trained as the policy is, a `separate` one from a model or by default a copy of the policy."""
    own = TokenModel(policy)
    if kind == "shared":
        return Critic(_new_head(own.width)).to(policy.device)
    if name_or_path is None:
        trunk = unpatched_copy(own.trunk)
        trained = {name for name, parameter in own.trunk.named_parameters() if parameter.requires_grad}
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(name in trained)
        return Critic(_new_head(own.width), trunk).to(policy.device)
    model = load_pretrained(
        AutoModelForSequenceClassification,
        name_or_path,
        called="critic_model_name_or_path",
        num_labels=1,
        dtype=torch.float32,
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < own.vocabulary:
        raise ValueError(
            f"`critic_model_name_or_path` {name_or_path!r} has {rows} token embeddings, but the policy's vocabulary "
            f"has {own.vocabulary} tokens. The critic reads the policy's tokens: use a model with the same tokenizer."
        )
    return Critic(model.score, model.base_model).to(policy.device)


def _new_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class PolicyAndCritic(nn.Module):
    """The module that PPO trains."""

    def __init__(self, policy: Any, critic: Critic) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.config = policy.config
        self.tokens = TokenModel(policy)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values (before each token) of the last `tokens` of each row, float32."""
        log_probs, entropies, hidden = self.tokens.statistics(
            input_ids, attention_mask, tokens, temperature=temperature, with_entropy=with_entropy
        )
        if self.critic.trunk is not None:
            hidden = self.tokens.hidden_states(input_ids, attention_mask, tokens, trunk=self.critic.trunk)
        return log_probs, entropies, self.critic(hidden)

    # What transformers and accelerate read and call on a model.

    @property
    def device(self) -> Any:
        """Device of the policy."""
        return self.policy.device

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """Whether transformers sharded the policy when it loaded it, so that no trainer may wrap it."""
        return is_loaded_in_shards(self.policy)

    # transformers 5.23 renamed gradient checkpointing to activation checkpointing; older ones have the old name alone.

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass."""
        for network in self._networks():
            network.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass."""
        # transformers 4.57 defaults to reentrant checkpointing, which gives an adapter on a frozen base no gradient.
        options = {"use_reentrant": False} | (kwargs.pop("gradient_checkpointing_kwargs", None) or {})
        for network in self._networks():
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Whether the next backward pass reduces gradients; accelerate calls this on a sharded model."""
        parts: tuple[Any, Any] = (self.policy, self.critic)
        for module in parts:
            module.set_requires_gradient_sync(requires_gradient_sync)

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the policy."""
        embeddings: nn.Module = self.policy.get_input_embeddings()
        return embeddings

    def _networks(self) -> list[Any]:
        return [self.policy] if self.critic.trunk is None else [self.policy, self.critic.trunk]
