"""The critic: a value head on the policy's trunk, or a value model of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from hbat.engines.loaded_shards import is_loaded_in_shards
from hbat.model.copies import unpatched_copy
from hbat.model.load import load_pretrained
from hbat.ppo.networks.token_model import TokenModel


class SharedCritic(nn.Module):
    """A linear value head on the hidden states that the policy computes anyway. Starts at zero.

    Args:
        width: Size of a hidden state.
    """

    needs_own_states = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Estimate values.

        Args:
            hidden: The policy's hidden states, shape `[rows, tokens, width]`.

        Returns:
            Values in float32, shape `[rows, tokens]`.
        """
        return _values(self.head, hidden)


class SeparateCritic(nn.Module):
    """A value model with a trunk of its own.

    Args:
        trunk: Gives hidden states; a module whose output has `last_hidden_state`.
        head: From a hidden state to a value.
    """

    needs_own_states = True

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Estimate values.

        Args:
            hidden: Hidden states of the critic's own trunk, shape `[rows, tokens, width]`.

        Returns:
            Values in float32, shape `[rows, tokens]`.
        """
        return _values(self.head, hidden)


def _values(head: nn.Module, hidden: Tensor) -> Tensor:
    # Not in bfloat16, whose three digits are too few for the differences of values that advantages are.
    with torch.autocast(hidden.device.type, enabled=False):
        weight = next(head.parameters())
        values: Tensor = head(hidden.to(weight.dtype))
        return values.squeeze(-1).float()


def build_critic(kind: str, policy: Any, name_or_path: str | None) -> SharedCritic | SeparateCritic:
    """Build the critic of a policy.

    Args:
        kind: `shared` or `separate`.
        policy: The policy, with its adapter where there is one.
        name_or_path: Model that a separate critic starts from; the policy where left out. With an adapter only its
            copy of the adapter is trained.

    Returns:
        The critic, which is trained.

    Raises:
        ValueError: If the model does not fit the policy's tokens.
    """
    own = TokenModel(policy)
    if kind == "shared":
        return SharedCritic(own.width).to(policy.device)
    if name_or_path is None:
        trunk = unpatched_copy(own.trunk)
        wanted = {name: each.requires_grad for name, each in own.trunk.named_parameters()}
        for name, each in trunk.named_parameters():
            each.requires_grad_(wanted[name])
        return SeparateCritic(trunk, SharedCritic(own.width).head).to(policy.device)
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
            f"has {own.vocabulary} tokens. A critic reads the policy's tokens: take a model with the same tokenizer."
        )
    return SeparateCritic(model.base_model, model.score).to(policy.device)


class PolicyAndCritic(nn.Module):
    """What PPO trains.

    Args:
        policy: The policy, with its adapter where there is one.
        critic: Its critic.
    """

    def __init__(self, policy: Any, critic: SharedCritic | SeparateCritic) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.config = policy.config
        self.tokens = TokenModel(policy)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what the losses need to know about the last tokens of each row.

        Args:
            input_ids: Prompts padded on the left, completions on the right, shape `[rows, length]`.
            attention_mask: Of the same shape.
            tokens: Length of the completions.
            temperature: Divides the logits.
            with_entropy: Whether entropies are computed; zeros otherwise.

        Returns:
            Log-probabilities, entropies and values, float32, shape `[rows, tokens]`. A value stands before its token.
        """
        log_probs, entropies, hidden = self.tokens.statistics(
            input_ids, attention_mask, tokens, temperature=temperature, with_entropy=with_entropy
        )
        if isinstance(self.critic, SeparateCritic):
            hidden = self.tokens.hidden_states(input_ids, attention_mask, tokens, trunk=self.critic.trunk)
        return log_probs, entropies, self.critic(hidden)

    # What the host looks for on a model.

    @property
    def device(self) -> Any:
        """Device of the policy."""
        return self.policy.device

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """Whether the host sharded the policy when it loaded it, and has to keep its hands off."""
        return is_loaded_in_shards(self.policy)

    # Both names of the one thing: transformers 5.23 calls the new one, below it there is only the old one.

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Compute activations again in the backward pass.

        Args:
            **kwargs: As the host passes them.
        """
        for each in self._networks():
            each.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Compute activations again in the backward pass.

        Args:
            **kwargs: As the host passes them.
        """
        # transformers 4.57 takes the reentrant kind, which gives a frozen base with an adapter no gradient.
        options = {"use_reentrant": False} | (kwargs.pop("gradient_checkpointing_kwargs", None) or {})
        for each in self._networks():
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Say whether the next backward pass brings the gradients of all processes together, under FSDP2.

        Args:
            requires_gradient_sync: Whether it does.
        """
        parts: tuple[Any, Any] = (self.policy, self.critic)
        for each in parts:
            each.set_requires_gradient_sync(requires_gradient_sync)

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the policy.

        Returns:
            The module.
        """
        embeddings: nn.Module = self.policy.get_input_embeddings()
        return embeddings

    def _networks(self) -> list[Any]:
        return [self.policy, *([self.critic.trunk] if isinstance(self.critic, SeparateCritic) else [])]
