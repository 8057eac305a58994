"""The rewards of a run: functions and models, called together, weighted and summed."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbat.ppo.rewards.event_loop import EventLoop
from hbat.ppo.rewards.function import CallableReward, RewardError, function_name, shortened
from hbat.ppo.rewards.model import RewardModel, is_reward_model, load_reward_model, load_reward_tokenizer


class Rewards:
    """Scores completions with any number of rewards.

    Args:
        reward_funcs: One or a list of: functions with TRL's signature `f(prompts, completions, completion_ids,
            **columns)`, synchronous or not; names or paths of sequence classification models; such models.
        weights: One factor a reward; None is 1 for each.
        processing_classes: Tokenizers of the models, at their positions; None is the model's own.
        max_batch_size: Texts in one forward pass of a model.

    Attributes:
        names: One for each reward, for logs, all different.
    """

    def __init__(
        self,
        reward_funcs: Any,
        *,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
        max_batch_size: int = 32,
    ) -> None:
        rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not rewards:
            raise ValueError("`reward_funcs` is empty. Give at least one function or model.")
        if max_batch_size < 1:
            raise ValueError(f"`max_batch_size` is {max_batch_size}; it must be at least 1.")
        self._weights = _weights(weights, len(rewards))
        tokenizers = _tokenizers(processing_classes, len(rewards))
        self.names: list[str] = []
        for reward in rewards:
            self.names.append(_unique(_name(reward), self.names))
        self._models: list[RewardModel] = []
        self._functions: list[CallableReward] = []
        for name, reward, tokenizer in zip(self.names, rewards, tokenizers, strict=True):
            function = reward
            if isinstance(reward, str | Path) or is_reward_model(reward):
                function = _model(reward, tokenizer, name, max_batch_size)
                self._models.append(function)
            self._functions.append(CallableReward(function, name))
        self._loop: EventLoop | None = None  # only where a function is asynchronous

    def to(self, device: torch.device | str) -> None:
        """Move the reward models.

        Args:
            device: Where to.
        """
        for each in self._models:
            each.to(device)

    def require_template(self) -> None:
        """Refuse conversational prompts where a reward model cannot read them.

        Raises:
            ValueError: If a reward model's tokenizer has no chat template.
        """
        for each in self._models:
            each.require_template()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, list[Any]],
        trainer_state: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions.

        Args:
            prompts: One prompt a completion: texts, or lists of messages.
            completions: Of the same form.
            completion_ids: Their tokens.
            columns: The other columns of the data, one entry a completion.
            trainer_state: The trainer's state.

        Returns:
            The weighted sums, and the values of each reward by its name, NaN where it returned None; float32 on the
            CPU.

        Raises:
            RewardError: If a reward fails or returns what is no reward, or none applies to a row.
        """
        inputs = {
            **columns,
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer_state,
        }
        results = self._results([each.arguments(inputs) for each in self._functions])
        pairs = zip(self._functions, results, strict=True)
        values = torch.stack([each.values(result, completions) for each, result in pairs])
        self._require_values(values, completions)
        total = values.double().mul(self._weights.unsqueeze(1)).nansum(0).float()
        return total, dict(zip(self.names, values, strict=True))

    def _results(self, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        results: list[Any] = []
        try:
            for function, each in zip(self._functions, arguments, strict=True):
                results.append(function.call(each))
        except BaseException:
            for each in results:
                if inspect.iscoroutine(each):
                    each.close()  # or Python complains that nobody awaited it
            raise
        pending = [at for at, result in enumerate(results) if inspect.isawaitable(result)]
        if pending:
            self._loop = self._loop or EventLoop()
            finished = self._loop.gather([self._functions[at].finish(results[at]) for at in pending])
            for at, result in zip(pending, finished, strict=True):
                results[at] = result
        return results

    def _require_values(self, values: Tensor, completions: Sequence[Any]) -> None:
        unscored = values.isnan().all(0).nonzero().flatten().tolist()
        if unscored:
            row = unscored[0]
            raise RewardError(
                f"Every reward ({', '.join(self.names)}) returned None for {len(unscored)} of {len(completions)} "
                f"rows, first row {row}, the completion {shortened(completions[row])}. At least one must apply."
            )


def _model(reward: Any, tokenizer: Any, name: str, max_batch_size: int) -> RewardModel:
    origin = reward
    if isinstance(reward, str | Path):
        reward = load_reward_model(reward)
    else:
        origin = _origin(reward)
    if tokenizer is None:
        tokenizer = load_reward_tokenizer(reward, origin)
    return RewardModel(reward, tokenizer, name=name, max_batch_size=max_batch_size)


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
            f"`reward_funcs` holds {given}; give a function, an object that can be called, or a sequence "
            "classification model or its name."
        )
    return function_name(reward)


def _unique(name: str, taken: Sequence[str]) -> str:
    candidates = (name if count == 1 else f"{name}_{count}" for count in range(1, len(taken) + 2))
    return next(each for each in candidates if each not in taken)


def _weights(weights: Sequence[float] | None, count: int) -> Tensor:
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"`weights` has {len(weights)} entries for {count} rewards. Give one for each.")
    for at, each in enumerate(weights):
        if not math.isfinite(each):
            raise ValueError(f"`weights[{at}]` is {each}; a weight must be a finite number.")
    return torch.tensor(weights, dtype=torch.float64)


def _tokenizers(processing_classes: Any, count: int) -> list[Any]:
    if processing_classes is None:
        return [None] * count
    given = list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes]
    if len(given) != count:
        raise ValueError(
            f"`processing_classes` has {len(given)} entries for {count} rewards. Give one for each, None where the "
            "reward is a function."
        )
    return given
