"""Log-probabilities, entropies and hidden states per token of a causal language model."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hbat.ppo.engine import is_sharded

#: Logits in memory at once, in elements: 64 MiB in float32. Beyond it they are computed in chunks, and recomputed in
#: the backward pass.
MAX_LOGITS = 2**24


def token_statistics(
    hidden: Tensor,  # before each token, [rows, tokens, width]
    tokens: Tensor,  # ids, [rows, tokens]
    head: Callable[[Tensor], Tensor],  # from [n, width] to [n, vocabulary]
    *,
    vocabulary: int,
    temperature: float = 1.0,
    with_entropy: bool = True,  # zeros otherwise
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (in nats) of tokens, float32, computed in chunks of at most `max_logits`."""
    shape, flat, ids = tokens.shape, hidden.flatten(0, 1), tokens.flatten()

    def chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        return _statistics(logits if temperature == 1.0 else logits / temperature, targets, with_entropy=with_entropy)

    size = max(max_logits // vocabulary, 1)
    if flat.shape[0] <= size:
        log_probs, entropies = chunk(flat, ids)
        return log_probs.view(shape), entropies.view(shape)
    compute = functools.partial(checkpoint, chunk, use_reentrant=False) if torch.is_grad_enabled() else chunk
    chunks = [compute(*part) for part in zip(flat.split(size), ids.split(size), strict=True)]
    log_probs, entropies = (torch.cat(values).view(shape) for values in zip(*chunks, strict=True))
    return log_probs, entropies


def _statistics(logits: Tensor, targets: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    norm = torch.logsumexp(logits, dim=-1)
    if not with_entropy:
        return chosen - norm, torch.zeros_like(norm)
    probabilities = torch.exp(logits - norm.unsqueeze(-1))
    # H = log Z - sum p z. A logit of -inf has probability 0 and must not enter the product: its gradient would be NaN.
    expected = (probabilities * torch.where(probabilities > 0, logits, 0.0)).sum(-1)
    return chosen - norm, norm - expected


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute in evaluation mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class TokenModel:
    """A view of a causal language model, with its adapter if it has one. Owns no weights.

    The logits of a whole batch take more memory than anything else in a step. So hidden states and head are called
    apart, the head in chunks, if that gives the model's own logits (`verify`); other models are called whole.

    Raises:
        ValueError: If it is not a decoder with a language modeling head.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self._head: Any = getattr(self._causal, "get_output_embeddings", lambda: None)()
        self._config = getattr(self._causal, "config", None)
        if self._head is None or getattr(self._config, "is_encoder_decoder", False):
            raise ValueError(
                f"The policy is a {type(self._causal).__name__}; PPO needs a causal language model "
                "(`AutoModelForCausalLM`)."
            )
        self.trunk: nn.Module = self._causal.base_model
        self.vocabulary: int = self._head.weight.shape[0]
        self.width: int = self._head.weight.shape[1]
        self._takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        # The base of an adapter that learns a prompt knows nothing of the prompt.
        adapters = getattr(model, "peft_config", {}).values()
        self._learns_prompt = any(adapter.is_prompt_learning for adapter in adapters)
        self._splits = self.trunk is not self._causal and not self._learns_prompt

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, tokens: int, trunk: Any = None) -> Tensor:
        """Hidden states before each of the last `tokens`, shape `[rows, tokens, width]`, or of another `trunk`."""
        output = (trunk or self.trunk)(**self._arguments(input_ids, attention_mask))
        hidden: Tensor = output.last_hidden_state[:, -tokens - 1 : -1]
        return hidden

    def statistics(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: int,
        *,
        temperature: float,
        with_entropy: bool = True,
        scored: Tensor | None = None,  # the tokens that count, of the mask's shape; by default all in it
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what PPO needs of the last `tokens` of each row: of completions, padded on the right.

        Returns:
            Log-probabilities of the tokens and entropies in nats, float32, shape `[rows, tokens]`, 0 on padding and
            on what does not count; and the hidden states before the tokens, shape `[rows, tokens, width]`.
        """
        if self._splits:
            states = hidden = self.hidden_states(input_ids, attention_mask, tokens)
            head: Any = self._logits
        else:
            output = self.model(**self._arguments(input_ids, attention_mask), output_hidden_states=True)
            hidden, states = output.hidden_states[-1][:, -tokens - 1 : -1], output.logits[:, -tokens - 1 : -1]
            head = nn.Identity()
        mask = (attention_mask if scored is None else scored)[:, -tokens:].bool()
        found = token_statistics(
            states[mask].unsqueeze(0),  # the head is not called on padding
            input_ids[:, -tokens:][mask].unsqueeze(0),
            head,
            vocabulary=self.vocabulary,
            temperature=temperature,
            with_entropy=with_entropy,
        )
        empty = torch.zeros(mask.shape, device=mask.device)
        log_probs, entropies = (empty.masked_scatter(mask, values) for values in found)
        return log_probs, entropies, hidden

    @torch.no_grad()
    def verify(self) -> None:
        """Call the model whole if trunk and head apart give other logits, or if its parameters are sharded."""
        if is_sharded(self.model):  # parameters are only gathered when the model is called as a whole
            self._splits = False
        if not self._splits:
            return
        device = self._head.weight.device
        input_ids = torch.arange(4, device=device).unsqueeze(0) % self.vocabulary
        arguments = self._arguments(input_ids, torch.ones_like(input_ids))
        with evaluating(self._causal):
            own = self._causal(**arguments).logits.float()
            apart = self._logits(self.trunk(**arguments).last_hidden_state).float()
        self._splits = own.shape == apart.shape and torch.allclose(own, apart, rtol=1e-3, atol=1e-3)

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._takes_positions and not self._learns_prompt:  # PEFT counts them itself
            arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return arguments

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        if scale := getattr(self._config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(self._config, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(self._config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits
