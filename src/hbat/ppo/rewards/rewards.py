"""The rewards of a run: functions and models, called together, weighted and summed."""

import asyncio
import inspect
import math
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from torch import Tensor
from transformers import TrainerState

from hbat.ppo.rewards.function import GIVEN, CallableReward, Interrupt, RewardError, function_name, shortened
from hbat.ppo.rewards.model import RewardModel, is_reward_model, load_reward_model, load_reward_tokenizer
from hbat.ppo.rollouts.prompts import TOKENS, as_completions, completion_texts, reward_columns

_MODEL_BATCH = 32  # texts per forward pass of a model


def _leave(*_: Any, **__: Any) -> None:
    """Log nothing: there is no table of completions for `log_extra`."""


class Rewards:
    """Scores completions with any number of rewards.

    Args:
        reward_funcs: One or a list of: functions with TRL's signature `f(prompts, completions, completion_ids,
            **columns)`, also async ones; sequence classification models, or their names or paths.
        weights: One per reward; None for 1 each.
        processing_classes: Tokenizers of the models, at their positions; None for the model's own.

    Attributes:
        names: Unique names of the rewards, for logs.
        for_trl: The rewards as TRL's trainers take them.

    Raises:
        TypeError: If a reward is neither callable nor a model.
        ValueError: If a reward, its tokenizer or its weight cannot be used.
    """

    def __init__(
        self,
        reward_funcs: Any,
        *,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
    ) -> None:
        rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not rewards:
            raise ValueError("`reward_funcs` is empty. Pass at least one function or model.")
        self._weights = _weights(weights, len(rewards))
        tokenizers = _tokenizers(processing_classes, len(rewards))
        self.names: list[str] = []
        for reward in rewards:
            self.names.append(_unique(_name(reward), self.names))
        self._models: list[RewardModel] = []
        self._functions: list[CallableReward] = []
        self.for_trl: list[Any] = []
        for name, function, tokenizer in zip(self.names, rewards, tokenizers, strict=True):
            reward = function
            if isinstance(function, str | Path) or is_reward_model(function):
                reward = _model(function, tokenizer, name)
                self._models.append(reward)
            self._functions.append(CallableReward(reward, name))
            self.for_trl.append(reward.base if isinstance(reward, RewardModel) else self._functions[-1].for_trl())
        self._portal: BlockingPortal | None = None  # to the event loop of async functions

    def to(self, device: torch.device | str) -> None:
        """Move the reward models."""
        for model in self._models:
            model.to(device)

    def require(self, *datasets: Any) -> None:
        """Refuse rows that cannot be scored, of data sets, mappings of them, or None.

        Raises:
            RewardError: If a reward needs a column that they lack.
            ValueError: If their prompts are conversations and a reward model's tokenizer has no chat template.
        """
        for rows in datasets:
            if isinstance(rows, Mapping):
                self.require(*rows.values())
            elif rows:
                for function in self._functions:
                    function.arguments(dict.fromkeys(GIVEN) | reward_columns([rows[0]]))
                for model in () if isinstance(rows[0]["prompt"], str) else self._models:
                    model.require_template()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, list[Any]],  # the other columns of the data set
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] = _leave,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions: texts, or lists of messages.

        Returns:
            The weighted sums, and the values of each reward by its name, NaN where it returned None; float32 on the
            CPU.

        Raises:
            RewardError: If a reward fails or returns anything but rewards, or none applies to a row.
        """
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        values = self._values({**columns, **own, "trainer_state": trainer_state, "log_metric": log_metric})
        unscored = values.isnan().all(0).nonzero().flatten().tolist()
        if unscored:
            raise self.unscored(unscored, completions)
        total = values.double().mul(self._weights.unsqueeze(1)).nansum(0).float()
        return total, dict(zip(self.names, values, strict=True))

    def score(
        self, rows: Sequence[Mapping[str, Any]], ids: Sequence[Sequence[int]], tokenizer: Any, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions, as token ids, of tokenized rows; `options`, results and errors are those of a call."""
        texts = completion_texts(tokenizer, [row[TOKENS] for row in rows], ids)
        completions, columns = as_completions(texts, rows), reward_columns(rows)
        prompts = [row["prompt"] for row in rows]
        return self(prompts, completions, completion_ids=ids, columns=columns, **options)

    def rehearse(self, row: Mapping[str, Any], tokenizer: Any) -> None:
        """Score a made-up completion of one row, as a rollout's will be.

        Raises:
            RewardError: If a reward fails, or returns anything but rewards.
        """
        text = " yes"
        ids = getattr(tokenizer, "tokenizer", tokenizer)(text, add_special_tokens=False)["input_ids"]
        own = {
            "prompts": [row["prompt"]],
            "completions": as_completions([text], [row]),
            "completion_ids": [ids],
            "trainer_state": TrainerState(),
            "log_metric": _leave,
        }
        self._values({**reward_columns([row]), **own})

    def _values(self, inputs: Mapping[str, Any]) -> Tensor:
        """Call all rewards; float32 of shape (rewards, completions)."""
        arguments = [function.arguments({**inputs, "log_extra": _leave}) for function in self._functions]
        pairs = zip(self._functions, self._results(arguments), strict=True)
        return torch.stack([function.values(result, inputs["completions"]) for function, result in pairs])

    def unscored(self, rows: Sequence[int], completions: Sequence[Any]) -> RewardError:
        """The error for rows to which no reward applies."""
        return RewardError(
            f"Every reward ({', '.join(self.names)}) returned None or NaN for {len(rows)} of {len(completions)} rows, "
            f"first row {rows[0]}, the completion {shortened(completions[rows[0]])}. At least one must apply."
        )

    def _results(self, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        results: list[Any] = []
        try:
            for function, keywords in zip(self._functions, arguments, strict=True):
                results.append(function.call(keywords))
        except BaseException:
            for result in results:
                if inspect.iscoroutine(result):
                    result.close()  # or Python warns that it was never awaited
            raise
        pending = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
        if pending:
            finished = self._awaited([self._functions[index].finish(results[index]) for index in pending])
            for index, result in zip(pending, finished, strict=True):
                results[index] = result
        return results

    def _awaited(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        # In another thread's event loop, as this one may run a loop itself (a notebook). One loop for all calls: what
        # functions keep between calls, such as an HTTP client, belongs to the loop that it was first used in.
        if self._portal is None:
            context = start_blocking_portal("asyncio")
            self._portal = context.__enter__()
            weakref.finalize(self, context.__exit__, None, None, None)
        future = self._portal.start_task_soon(_gather, awaitables)
        try:
            results: list[Any] = future.result()
        except Interrupt as interrupt:
            raise interrupt.cause from None
        except BaseException:
            future.cancel()  # if this thread was interrupted
            raise
        return results


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _model(reward: Any, tokenizer: Any, name: str) -> RewardModel:
    by_name = isinstance(reward, str | Path)
    model = load_reward_model(reward) if by_name else reward
    if tokenizer is None:
        tokenizer = load_reward_tokenizer(model, reward if by_name else _origin(model))
    return RewardModel(model, tokenizer, name=name, max_batch_size=_MODEL_BATCH)


def _origin(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or "")


def _name(reward: Any) -> str:
    if isinstance(reward, str | Path):
        return Path(reward).name or Path(reward).resolve().name
    if is_reward_model(reward):
        return Path(_origin(reward)).name or type(reward).__name__
    if isinstance(reward, type) or not callable(reward):
        given = f"the class {reward.__name__}" if isinstance(reward, type) else f"a {type(reward).__name__}"
        raise TypeError(
            f"`reward_funcs` holds {given}; pass a function or another callable, or a sequence classification "
            "model or its name or path."
        )
    return function_name(reward)


def _unique(name: str, taken: Sequence[str]) -> str:
    candidates = (name if count == 1 else f"{name}_{count}" for count in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _weights(weights: Sequence[float] | None, count: int) -> Tensor:
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"`weights` has {len(weights)} entries for {count} rewards. Pass one for each.")
    for index, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise ValueError(f"`weights[{index}]` is {weight}; a weight must be a finite number.")
    return torch.tensor(weights, dtype=torch.float64)


def _tokenizers(processing_classes: Any, count: int) -> list[Any]:
    if processing_classes is None:
        return [None] * count
    given = list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes]
    if len(given) != count:
        raise ValueError(
            f"`processing_classes` has {len(given)} entries for {count} rewards. Pass one for each (None for a "
            "function)."
        )
    return given
