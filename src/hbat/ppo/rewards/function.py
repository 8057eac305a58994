"""One reward function: which arguments it takes, and whether what it returns is one number a completion."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: What every reward function can ask for beside the columns of the data.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")


_BY_KEYWORD = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


_SHOWN = 80  # characters of a completion in a message


class RewardError(RuntimeError):
    """A reward function or model failed, or returned what is no reward."""


class CallableReward:
    """A callable with TRL's signature `f(prompts, completions, completion_ids, **columns)`, called by keyword.

    Without `**kwargs` it gets what its signature names.

    Args:
        function: The callable; it may return an awaitable.
        name: For messages and logs.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        self._function = function
        self._takes: set[str] | None = None  # None: everything
        self._needs: set[str] = set()
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # some builtins do not tell
            return
        self._needs = _required(parameters, name)
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            self._takes = {each.name for each in parameters if each.kind in _BY_KEYWORD}
            if not self._takes & {"prompts", "completions"}:
                raise ValueError(
                    f"The reward {name!r} takes {sorted(self._takes)}, which holds neither `prompts` nor "
                    "`completions`. Its signature should be `f(prompts, completions, **kwargs)`."
                )

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Select what the function takes.

        Args:
            inputs: All there is, by name.

        Returns:
            Keyword arguments.

        Raises:
            RewardError: If it needs what there is not.
        """
        missing = sorted(self._needs - inputs.keys())
        if missing:
            columns = [each for each in inputs if each not in GIVEN]
            raise RewardError(
                f"The reward {self.name!r} needs {missing}, which the data do not have: their columns are {columns}. "
                "Rename the column or the parameter, or give the parameter a default."
            )
        return {key: value for key, value in inputs.items() if self._takes is None or key in self._takes}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function.

        Args:
            arguments: From `arguments`.

        Returns:
            Whatever it returns.

        Raises:
            RewardError: If it raises.
        """
        try:
            return self._function(**arguments)
        except Exception as error:
            raise self._failure(error) from error

    async def finish(self, awaitable: Any) -> Any:
        """Wait for the result of an asynchronous function.

        Args:
            awaitable: What `call` returned.

        Returns:
            Whatever comes out.

        Raises:
            RewardError: If it raises.
        """
        try:
            return await awaitable
        except Exception as error:
            raise self._failure(error) from error

    def values(self, result: Any, completions: Sequence[Any]) -> Tensor:
        """Check a result.

        Args:
            result: What the function returned.
            completions: The completions that it was given.

        Returns:
            One float32 value a completion, on the CPU; NaN where the function returned None.

        Raises:
            RewardError: If the result is not one finite number or None for each completion.
        """
        if hasattr(result, "tolist") and hasattr(result, "shape"):  # tensors, arrays
            if len(result.shape) != 1:
                raise RewardError(
                    f"The reward {self.name!r} returned an array of shape {tuple(result.shape)} for "
                    f"{len(completions)} completions. Return one number for each, shape ({len(completions)},)."
                )
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise RewardError(
                f"The reward {self.name!r} returned {result!r:.60} of type {type(result).__name__}. Return a list of "
                "numbers, one a completion."
            )
        if len(result) != len(completions):
            raise RewardError(
                f"The reward {self.name!r} returned {len(result)} values for {len(completions)} completions. Return "
                "one for each, or None for those to which it does not apply."
            )
        values = [self._value(each, row, completions[row]) for row, each in enumerate(result)]
        return torch.tensor(values, dtype=torch.float32)

    def _value(self, value: Any, row: int, completion: Any) -> float:
        if value is None:
            return math.nan
        number = _as_float32(value)
        if number is None:
            raise RewardError(
                f"The reward {self.name!r} returned {value!r:.60} of type {type(value).__name__} for row {row}, the "
                f"completion {shortened(completion)}. Return a number, or None where it does not apply."
            )
        if not math.isfinite(number):
            raise RewardError(
                f"The reward {self.name!r} returned {value!s:.60} for row {row}, the completion "
                f"{shortened(completion)}. Return a finite number of float32's range, or None where it does not apply."
            )
        return number

    def _failure(self, error: Exception) -> RewardError:
        return RewardError(f"The reward {self.name!r} raised {type(error).__name__}: {error}")


def function_name(function: Any) -> str:
    """Name a callable for logs.

    Args:
        function: The callable.

    Returns:
        Its own name, that of the function inside a `functools.partial`, or that of its class.
    """
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def shortened(completion: Any) -> str:
    """Show a completion in a message.

    Args:
        completion: Text, or a list of messages, of which the last one's text is shown.

    Returns:
        At most a line of it, quoted.
    """
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], Mapping):
        completion = completion[-1].get("content")
    text = completion if isinstance(completion, str) else str(completion)
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _as_float32(value: Any) -> float | None:
    if isinstance(value, str | bytes):  # `float` would read them
        return None
    try:
        return float(torch.tensor(float(value.detach() if isinstance(value, Tensor) else value), dtype=torch.float32))
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _required(parameters: Iterable[inspect.Parameter], name: str) -> set[str]:
    required = [each for each in parameters if each.default is inspect.Parameter.empty]
    by_position = [each.name for each in required if each.kind is inspect.Parameter.POSITIONAL_ONLY]
    if by_position:
        raise ValueError(
            f"The reward {name!r} takes {by_position} by position only, but rewards are called by keyword. Its "
            "signature should be `f(prompts, completions, **kwargs)`, without `/`."
        )
    return {each.name for each in required if each.kind in _BY_KEYWORD}
