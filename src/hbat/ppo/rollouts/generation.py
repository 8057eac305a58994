"""Sampling completions in batches, with any option of `transformers.GenerationConfig`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from hbat.model.copies import wrapped_models
from hbat.ppo.engine import is_sharded
from hbat.ppo.networks.token_model import evaluating
from hbat.ppo.rollouts.prompts import completion_texts, padded


@dataclass(frozen=True)
class Completions:
    """Completions of a batch of prompts, in order."""

    tokens: list[list[int]]  # with the EOS token if there is one
    ended: list[bool]  # by an EOS token or a stop string


class _Ends(StoppingCriteria):
    """Stops rows at EOS tokens and stop strings and records where: pad and EOS token can be the same."""

    def __init__(self, criteria: Sequence[StoppingCriteria], rows: int) -> None:
        self._criteria = criteria
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            done |= criterion(input_ids, scores, **kwargs)
        self.lengths = self.lengths.to(done.device)
        self.lengths = torch.where((self.lengths == 0) & done, input_ids.shape[1], self.lengths)
        return self.lengths > 0


class CompletionSampler:
    """Samples completions from a policy, of whose own generation configuration only the EOS tokens are used."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        sampling: Mapping[str, Any],  # fields of `transformers.GenerationConfig`
        batch_size: int | None = None,  # prompts per call of `generate`; None for all
    ) -> None:
        self._policy, self._tokenizer, self._batch_size = policy, tokenizer, batch_size
        options = dict(sampling)
        self._stop_strings = options.pop("stop_strings", None)
        self.end_tokens = _end_tokens(options.pop("eos_token_id", None), policy, tokenizer)
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, use_cache=True, **options
        )

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int | None) -> Completions:
        """Complete prompts of token ids; a seed leaves the global random state alone, None decodes greedily."""
        size = self._batch_size or len(prompts)
        tokens: list[list[int]] = []
        ended: list[bool] = []
        with _sampling_state(self._policy, seed):
            for start in range(0, len(prompts), size):
                batch = self._sample_batch(prompts[start : start + size], greedy=seed is None)
                tokens += batch.tokens
                ended += batch.ended
        return Completions(tokens, ended)

    def complete(self, prompts: Sequence[Sequence[int]], *, seed: int | None) -> list[dict[str, Any]]:
        """As `sample`: a row for each prompt, with `text`, `tokens` (how many) and `ended`."""
        found = self.sample(prompts, seed=seed)
        texts = completion_texts(self._tokenizer, prompts, found.tokens)
        return [
            {"text": text, "tokens": len(tokens), "ended": ended}
            for text, tokens, ended in zip(texts, found.tokens, found.ended, strict=True)
        ]

    @torch.no_grad()
    def _sample_batch(self, prompts: Sequence[Sequence[int]], *, greedy: bool) -> Completions:
        device = self._policy.device
        ids, mask = padded(prompts, self._tokenizer.pad_token_id, device, side="left")
        criteria: list[StoppingCriteria] = []
        if self.end_tokens:
            criteria.append(EosTokenCriteria(torch.tensor(self.end_tokens, device=device)))
        if self._stop_strings:
            criteria.append(StopStringCriteria(self._tokenizer, self._stop_strings))
        ends, config = _Ends(criteria, len(prompts)), copy.deepcopy(self._config)
        config.eos_token_id = self.end_tokens or None  # without one, transformers does not pad finished rows
        if greedy:
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        whole = self._policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([ends]),
            synced_gpus=is_sharded(self._policy),
        )
        prompt_length = ids.shape[1]
        lengths = ends.lengths.tolist()
        rows = whole[:, prompt_length:].tolist()
        tokens = [row[: length - prompt_length] if length else row for row, length in zip(rows, lengths, strict=True)]
        return Completions(tokens, [length > 0 for length in lengths])


@contextmanager
def _sampling_state(policy: Any, seed: int | None) -> Iterator[None]:
    devices = [policy.device] if policy.device.type == "cuda" else []
    own = [(model, model.generation_config) for model in wrapped_models(policy) if "generation_config" in vars(model)]
    config = policy.config.get_text_config()
    routed = getattr(config, "output_router_logits", None)
    try:
        # transformers fills unset options from the model's own configuration, and many models ship with some.
        for model, _ in own:
            model.generation_config = GenerationConfig()
        if routed:  # the loss of the router cannot be computed of one token (transformers 4.57-5.24)
            config.output_router_logits = False
        # In training mode, gradient checkpointing turns the key-value cache off.
        with evaluating(policy), torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        for model, options in own:
            model.generation_config = options
        if routed:
            config.output_router_logits = routed


def _end_tokens(given: Any, policy: Any, tokenizer: Any) -> list[int]:
    if given is None:
        of_model = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
        given = [*_as_list(of_model), *_as_list(tokenizer.eos_token_id)]
    return sorted(set(_as_list(given)))


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]
