"""What TRL's PPOTrainer takes for reward model, value model and data, made of rewards, a policy and prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hbat.model.adapters import ADAPTER
from hbat.model.copies import switch_off_dropout
from hbat.ppo.networks.policy_and_critic import build_critic
from hbat.ppo.rewards.rewards import Rewards
from hbat.ppo.rollouts.prompts import TOKENS, pad_left

_PADDING = -1  # marks what is no token


_OWN_COLUMNS = {"prompt", TOKENS}


class RewardsAsModel(nn.Module):
    """Rewards as a reward model: TRL's loop calls a backbone on token ids and scores its last hidden states.

    Args:
        rewards: The rewards.
        tokenizer: The policy's tokenizer.
        state: Gives the trainer's state, for the reward functions.
    """

    base_model_prefix = "backbone"

    def __init__(self, rewards: Rewards, tokenizer: Any, state: Callable[[], Any]) -> None:
        super().__init__()
        self._rewards, self._tokenizer, self._state = rewards, tokenizer, state
        self._rows: list[Mapping[str, Any]] = []
        self._prompt_length = 0

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Take the batch whose completions are scored next, in order, in one part or several.

        Args:
            batch: A batch of `collate`.
        """
        self._rows, self._prompt_length = list(batch["rows"]), batch["input_ids"].shape[1]

    @staticmethod
    def backbone(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Hand the tokens through.

        Args:
            input_ids: Prompts with completions.
            attention_mask: False for padding.

        Returns:
            The tokens in the place of hidden states.
        """
        return SimpleNamespace(hidden_states=[input_ids.masked_fill(~attention_mask.bool(), _PADDING)])

    def score(self, tokens: Tensor) -> Tensor:
        """Score completions.

        Args:
            tokens: From `backbone`, of the next rows of the batch.

        Returns:
            Each row's score at each of its tokens, shape `[rows, length, 1]`.
        """
        rows, self._rows = self._rows[: len(tokens)], self._rows[len(tokens) :]
        completions = [_before_padding(each) for each in tokens[:, self._prompt_length :].tolist()]
        return self.rewards_of(rows, completions).to(tokens.device)[:, None, None].expand(*tokens.shape, 1)

    def rewards_of(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Score completions of rows.

        Args:
            rows: Rows with `prompt` and other columns.
            completions: Token ids of each one's completion.

        Returns:
            Float32 on the CPU.
        """
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        if not isinstance(rows[0]["prompt"], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        scores, _ = self._rewards(
            [row["prompt"] for row in rows],
            texts,
            completion_ids=completions,
            columns={key: [row[key] for row in rows] for key in rows[0] if key not in _OWN_COLUMNS},
            trainer_state=self._state(),
        )
        return scores


def _before_padding(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(_PADDING)] if _PADDING in tokens else tokens


class ValueModel(nn.Module):
    """A value model: a copy of the policy's trunk with a head that starts at zero.

    Args:
        policy: The policy; with an adapter, only the copy of the adapter is trained, without one everything.
    """

    base_model_prefix = "trunk"

    def __init__(self, policy: Any) -> None:
        super().__init__()
        critic: Any = build_critic("separate", policy, None)
        self.trunk, self.head = critic.trunk, critic.head
        has_adapter = hasattr(policy, "peft_config")
        for name, each in self.trunk.named_parameters():  # the policy's own may be frozen for this stage
            each.requires_grad_(not has_adapter or ADAPTER in name.split("."))
        switch_off_dropout(self)

    def score(self, hidden: Tensor) -> Tensor:
        """Estimate values.

        Args:
            hidden: Hidden states, shape `[rows, length, width]`.

        Returns:
            Shape `[rows, length, 1]`.
        """
        values: Tensor = self.head(hidden)
        return values

    def trained(self) -> dict[str, Tensor]:
        """List what training changes.

        Returns:
            Parameters by name.
        """
        return {name: each for name, each in self.named_parameters() if each.requires_grad}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what another one has learnt.

        Args:
            tensors: What `trained` lists.
        """
        for name, each in self.trained().items():
            each.copy_(tensors[name])


def collate(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """Put tokenised rows into a batch, padded on the left.

    Args:
        rows: The rows.
        pad: Id of the padding token.

    Returns:
        Token ids, attention mask, and the rows.
    """
    ids, mask = pad_left([row[TOKENS] for row in rows], pad, "cpu")
    return {"input_ids": ids, "attention_mask": mask, "rows": list(rows)}


class AnnouncedBatches:
    """Batches of a loader, each shown to somebody right before it is used. A loader itself works ahead.

    Args:
        loader: The loader.
        show: Called with each batch.
    """

    def __init__(self, loader: Any, show: Callable[[Mapping[str, Any]], None]) -> None:
        self._loader, self._show = loader, show

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._loader:
            self._show(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)
