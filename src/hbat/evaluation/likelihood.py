"""Log-likelihoods of given texts: of preference pairs, and of plain text."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hbat.evaluation.metrics import estimate
from hbat.evaluation.rows import asked
from hbat.ppo.networks.token_model import TokenModel, evaluating
from hbat.ppo.rollouts.prompts import context_length, padded, prompt_tokens


class Sequences(NamedTuple):
    """Token ids of a beginning, and of what is scored after it."""

    prompt: list[int]
    target: list[int]


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, sequences: Sequence[Sequences], batch_size: int) -> list[float]:
    r"""Compute $\sum_t \log p(y_t \mid x, y_{<t})$ in nats for every sequence.

    Args:
        model: A causal language model, which is called in evaluation mode.
        tokenizer: Its tokenizer.
        sequences: Beginnings x of one token or more, and targets y.
        batch_size: Sequences of a forward pass.
    """
    view, pad = TokenModel(model), tokenizer.pad_token_id
    view.verify()
    order = sorted(range(len(sequences)), key=lambda number: -sum(map(len, sequences[number])))
    found = [0.0] * len(sequences)
    for start in tqdm(range(0, len(order), batch_size), desc="Scoring texts", unit="batch", disable=None, leave=False):
        numbers = order[start : start + batch_size]
        own = [sequences[number] for number in numbers]
        ids, mask = padded([[*prompt, *target] for prompt, target in own], pad, model.device, side="right")
        targets = [[0] * len(prompt) + [1] * len(target) for prompt, target in own]
        scored, _ = padded(targets, 0, model.device, side="right")
        with evaluating(model):
            log_probs, _, _ = view.statistics(
                ids, mask, ids.shape[1] - 1, temperature=1.0, with_entropy=False, scored=scored
            )
        for number, value in zip(numbers, log_probs.double().sum(1).tolist(), strict=True):
            found[number] = value
    return found


def of_pairs(
    model: Any, tokenizer: Any, pairs: Sequence[Mapping[str, Any]], *, batch_size: int, max_length: int, seed: int
) -> dict[str, float]:
    """How often a model finds the chosen answer likelier than the rejected one, and by how many nats.

    Tokenized as by TRL's `DPOTrainer`, but for a second end token after one that the tokenizer adds. The likelihood
    is the model's own, of whole answers, without a reference policy: unlike the accuracy of a DPO stage it compares
    models of any origin, and favors short answers.

    Returns:
        `accuracy` with the ends of its interval and `margin` (mean difference); and both of the means per token.
    """
    sequences = pair_sequences(pairs, tokenizer, room(model, max_length))
    values = log_likelihoods(model, tokenizer, sequences, batch_size)
    counts = [max(len(sequence.target), 1) for sequence in sequences]
    margins = [chosen - rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]
    hits = [float(margin > 0) for margin in margins]
    means = [value / count for value, count in zip(values, counts, strict=True)]
    return estimate("accuracy", hits, range(len(hits)), seed) | {
        "margin": fmean(margins),
        "accuracy_per_token": fmean(left > right for left, right in zip(means[::2], means[1::2], strict=True)),
        "margin_per_token": fmean(means[::2]) - fmean(means[1::2]),
    }


def room(model: Any, max_length: int) -> int:
    """Tokens that a sequence may have: no more than the model's context."""
    context = context_length(model.config)
    return max_length if context is None else min(max_length, context)


def pair_sequences(pairs: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int) -> list[Sequences]:
    """Tokenize pairs: the chosen and the rejected answer of each, in turn.

    Raises:
        ValueError: If one cannot be tokenized, as without a chat template.
    """
    found = []
    for number, pair in enumerate(pairs):
        try:
            found += _answers(pair, tokenizer, max_length)
        except Exception as error:  # chat templates raise anything
            raise ValueError(f"`pairs`, row {number}: {error}") from error
    return found


def _answers(pair: Mapping[str, Any], tokenizer: Any, max_length: int) -> list[Sequences]:
    ask = asked(pair)
    begun, sides = prompt_tokens(ask.prompt, tokenizer, ask.options), [pair["chosen"], pair["rejected"]]
    if isinstance(ask.prompt, str):
        wholes = [_ended(tokenizer(ask.prompt + side)["input_ids"], tokenizer) for side in sides]
    else:
        rendered = [
            tokenizer.apply_chat_template([*ask.prompt, *side], tokenize=False, **ask.options) for side in sides
        ]
        wholes = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    # An answer begins where the tokens part, which is before the prompt's end where they merge across it.
    start = max(min(_shared(begun, whole) for whole in wholes), 1)
    targets = [whole[start:][: max_length - 1] for whole in wholes]
    return [
        Sequences(whole[:start][len(target) - max_length :], target)
        for whole, target in zip(wholes, targets, strict=True)
    ]


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def of_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int, max_length: int, seed: int
) -> dict[str, float]:
    """Cross-entropy of plain texts in nats per token, each after the beginning token or else its first token.

    Returns:
        `loss` over all tokens with the ends of its interval, and `perplexity`.

    Raises:
        ValueError: If no text has two tokens.
    """
    sequences = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        ids = ids[: room(model, max_length)]
        if len(ids) > 1:
            sequences.append(Sequences(ids[:1], ids[1:]))
    if not sequences:
        raise ValueError("`texts` has no text of two tokens or more.")
    values = log_likelihoods(model, tokenizer, sequences, batch_size)
    counts = [len(sequence.target) for sequence in sequences]
    scores = estimate("loss", [-value for value in values], range(len(values)), seed, counts)
    return scores | {"perplexity": math.exp(min(scores["loss"], 700.0))}
