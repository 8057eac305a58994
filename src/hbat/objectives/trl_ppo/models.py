"""Reward model, value model and data as TRL's PPOTrainer takes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hbat.model.adapters import ADAPTER
from hbat.model.copies import switch_off_dropout
from hbat.ppo.networks.policy_and_critic import build_critic
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.prompts import TOKENS, padded

_PADDING = -1  # no token id


class RewardsAsModel(nn.Module):
    """Rewards as a reward model: TRL's loop calls a backbone on token ids and scores its last hidden states."""

    base_model_prefix = "backbone"

    def __init__(self, rewards: Rewards, tokenizer: Any, state: Callable[[], Any]) -> None:
        super().__init__()
        self._rewards, self._tokenizer, self._state = rewards, tokenizer, state
        self._rows: list[Mapping[str, Any]] = []
        self._prompt_length = 0

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Take the batch whose completions are scored next, in order, in one call of `score` or several."""
        self._rows, self._prompt_length = list(batch["rows"]), batch["input_ids"].shape[1]

    @staticmethod
    def backbone(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Pass the tokens through in place of hidden states."""
        return SimpleNamespace(hidden_states=[input_ids.masked_fill(~attention_mask.bool(), _PADDING)])

    def score(self, tokens: Tensor) -> Tensor:
        """Score the completions of the next rows: each row's score at each of its tokens, `[rows, length, 1]`."""
        rows, self._rows = self._rows[: len(tokens)], self._rows[len(tokens) :]
        completions = [_before_padding(ids) for ids in tokens[:, self._prompt_length :].tolist()]
        return self.rewards_of(rows, completions).to(tokens.device)[:, None, None].expand(*tokens.shape, 1)

    def rewards_of(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of completions, given as token ids, of rows: float32 on the CPU."""
        return self._rewards.score(rows, completions, self._tokenizer, trainer_state=self._state())[0]


def _before_padding(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(_PADDING)] if _PADDING in tokens else tokens


class ValueModel(nn.Module):
    """A copy of the policy's trunk with a new value head; with an adapter, only its copy and the head are trained."""

    base_model_prefix = "trunk"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        critic: Any = build_critic("separate", policy, None)
        self.trunk, self.head = critic.trunk, critic.head
        has_adapter = hasattr(policy, "peft_config")
        for name, parameter in self.trunk.named_parameters():  # the policy's own may be frozen for this stage
            parameter.requires_grad_(not has_adapter or ADAPTER in name.split("."))
        switch_off_dropout(self)

    def score(self, hidden: Tensor) -> Tensor:
        """Values, shape `[rows, length, 1]`."""
        values: Tensor = self.head(hidden)
        return values

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `trained` gave of another one."""
        for name, parameter in self.trained().items():
            parameter.copy_(tensors[name])


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """Tokenized rows as a batch padded on the left: token ids, attention mask, and the rows themselves."""
    ids, mask = padded([row[TOKENS] for row in rows], pad, "cpu", side="left")
    return {"input_ids": ids, "attention_mask": mask, "rows": list(rows)}


class AnnouncedBatches:
    """A loader that shows each batch right before it is used; a loader itself works ahead."""

    def __init__(self, loader: Any, show: Callable[[Mapping[str, Any]], None]) -> None:
        self._loader, self._show = loader, show

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._loader:
            self._show(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)
