"""The critic: a value head on the policy's trunk, or a value model of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from hbat.lifecycle import unpatched_copy
from hbat.model_loading import load_pretrained
from hbat.ppo.token_model import TokenModel


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
