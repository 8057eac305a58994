"""The reference policy of PPO: a frozen model, or a copy of the adapter beside the one that is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from hbat.model.adapters import add_reference_adapter, using_reference_adapter
from hbat.model.copies import frozen_copy, switch_off_dropout
from hbat.ppo.networks.token_model import TokenModel
from hbat.ppo.rollouts.rollout import Sequences


class Reference:
    """What the KL penalty pulls to: the policy as it is now.

    Args:
        policy: The policy; one with an adapter gets a second one, `ref`, with the same weights.
        model: A frozen model as reference, for a policy without adapter; a copy of the policy where left out.
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
        self._tokens = TokenModel(policy if self.model is None else self.model)

    def verify(self) -> None:
        """See `TokenModel.verify`."""
        self._tokens.verify()

    @torch.no_grad()
    def log_probs(self, sequences: Sequences, temperature: float) -> Tensor:
        """Log-probabilities of the completions under the reference policy.

        Args:
            sequences: Prompts with their completions.
            temperature: Divides the logits.

        Returns:
            Float32, shape `[rows, completion length]`.
        """
        if self._has_adapter:
            with using_reference_adapter(self._policy):
                return self._compute(sequences, temperature)
        return self._compute(sequences, temperature)

    def _compute(self, sequences: Sequences, temperature: float) -> Tensor:
        tokens = sequences.completion_ids.shape[1]
        log_probs, _, _ = self._tokens.statistics(
            sequences.input_ids, sequences.attention_mask, tokens, temperature=temperature, with_entropy=False
        )
        return log_probs
