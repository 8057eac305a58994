"""The reference policy, to which the KL penalty is taken."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from hbat.model.adapters import add_reference_adapter, using_reference_adapter
from hbat.model.copies import frozen_copy, switch_off_dropout
from hbat.ppo.networks.token_model import TokenModel


class Reference:
    """The policy as it is now: a frozen copy, or with an adapter a second adapter `ref` on the same base.

    Args:
        policy: The policy.
        model: A frozen model that is the reference policy instead.
    """

    def __init__(self, policy: Any, model: Any = None) -> None:
        self._policy = policy
        self._has_adapter = hasattr(policy, "peft_config") and model is None
        if self._has_adapter:
            add_reference_adapter(policy)
        self.model: nn.Module | None = None if self._has_adapter else (model or frozen_copy(policy))
        if self.model is not None:
            self.model.eval()
            self.model.to(policy.device)
            switch_off_dropout(self.model)
        self.tokens = TokenModel(policy if self.model is None else self.model)

    @torch.no_grad()
    def log_probs(self, input_ids: Tensor, attention_mask: Tensor, tokens: int, temperature: float) -> Tensor:
        """Log-probabilities of the last `tokens` of each row, float32; arguments as in `TokenModel.statistics`."""
        with using_reference_adapter(self._policy) if self._has_adapter else contextlib.nullcontext():
            log_probs, _, _ = self.tokens.statistics(
                input_ids, attention_mask, tokens, temperature=temperature, with_entropy=False
            )
        return log_probs
