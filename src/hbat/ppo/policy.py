"""Policy and critic as one module: one trainer, one optimizer and one wrapper for several processes train both."""

from typing import Any

from torch import Tensor, nn

from hbat.loaded_shards import is_loaded_in_shards
from hbat.ppo.critic import SeparateCritic, SharedCritic
from hbat.ppo.token_model import TokenModel


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
