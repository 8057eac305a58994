"""One reward function: the arguments it takes, and validation of what it returns."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Arguments of every reward function beside the columns of the data set, as TRL (1.16) has them.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_BY_KEYWORD = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
_TELLING = 8  # completions at least, before equal rewards say anything
_SHOWN = 80  # characters of a completion in a message


class RewardError(RuntimeError):
    """A reward function or model failed, or returned anything but rewards."""


class RewardWarning(UserWarning):
    """A reward gives everything the same, or a reward model sees only the end of some texts."""


class Interrupt(Exception):  # noqa: N818 - it carries an exception and is none
    """Carries KeyboardInterrupt or SystemExit out of an event loop, which they would end."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__()
        self.cause = cause


class CallableReward:
    """A callable with TRL's signature `f(prompts, completions, completion_ids, **columns)`, also an async one.

    It is called by keyword, without `**kwargs` with the arguments that its signature names.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        self._function = function
        self._takes: set[str] | None = None  # None: everything
        self._needs: set[str] = set()
        self._warned = False
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # some builtins have no signature
            return
        self._needs = _required(parameters, name)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            self._takes = {parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD}
            if not self._takes & {"prompts", "completions"}:
                raise ValueError(
                    f"The reward {name!r} takes {sorted(self._takes)}, which names neither `prompts` nor "
                    "`completions`. Its signature should be `f(prompts, completions, **kwargs)`."
                )

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Select the arguments that the function takes; RewardError if one is missing."""
        missing = sorted(self._needs - inputs.keys())
        if missing:
            columns = [name for name in inputs if name not in GIVEN]
            raise RewardError(
                f"The reward {self.name!r} needs {missing}, but the columns of the data set are {columns}. "
                "Rename the column or the parameter, or give the parameter a default."
            )
        return {key: value for key, value in inputs.items() if self._takes is None or key in self._takes}

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function; RewardError if it raises."""
        try:
            return self._function(**arguments)
        except Exception as error:
            raise self._failure(error) from error

    async def finish(self, awaitable: Any) -> Any:
        """Await the result of an async function; RewardError if it raises."""
        try:
            return await awaitable
        except Exception as error:
            raise self._failure(error) from error
        except (KeyboardInterrupt, SystemExit) as error:
            raise Interrupt(error) from None

    def for_trl(self) -> Callable[..., list[float]]:
        """The function as TRL calls it: with the arguments that it takes, and with its result checked."""

        def checked(completions: Sequence[Any], **others: Any) -> list[float]:
            arguments = self.arguments({"completions": completions, **others})
            return list(self.values(self.call(arguments), completions).tolist())

        async def awaited(completions: Sequence[Any], **others: Any) -> list[float]:
            arguments = self.arguments({"completions": completions, **others})
            return list(self.values(await self.finish(self.call(arguments)), completions).tolist())

        function: Any = self._function
        is_async = any(map(inspect.iscoroutinefunction, (function, function.__call__)))
        chosen: Callable[..., Any] = awaited if is_async else checked
        chosen.__name__ = self.name
        return chosen

    def values(self, result: Any, completions: Sequence[Any]) -> Tensor:
        """One float32 value per completion on the CPU, NaN for None; RewardError if the result is anything else."""
        if hasattr(result, "tolist") and hasattr(result, "shape"):  # tensors, arrays
            if len(result.shape) != 1:
                raise RewardError(
                    f"The reward {self.name!r} returned an array of shape {tuple(result.shape)} for "
                    f"{len(completions)} completions. Return one number per completion, shape ({len(completions)},)."
                )
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise RewardError(
                f"The reward {self.name!r} returned {result!r:.60} of type {type(result).__name__}. Return a list of "
                "numbers, one per completion."
            )
        if len(result) != len(completions):
            raise RewardError(
                f"The reward {self.name!r} returned {len(result)} values for {len(completions)} completions. Return "
                "one for each, or None for those to which it does not apply."
            )
        values = [self._value(value, row, completions[row]) for row, value in enumerate(result)]
        # Not where it applies to none of them, which another reward may do.
        if len(values) >= _TELLING and len(set(values)) == 1 and not math.isnan(values[0]) and not self._warned:
            self._warn_of(values[0], completions)
        return torch.tensor(values, dtype=torch.float32)

    def _warn_of(self, value: float, completions: Sequence[Any]) -> None:
        if len(set(map(shortened, completions))) == 1:
            return
        self._warned = True
        warnings.warn(
            f"The reward {self.name!r} is {value:g} for all of {len(completions)} different completions, the first "
            f"{shortened(completions[0])}: nothing can be learned from it. A completion of a conversation is a list "
            "of messages, whose text is `completion[-1]['content']`. This warning is shown once.",
            RewardWarning,
            stacklevel=2,
        )

    def _value(self, value: Any, row: int, completion: Any) -> float:
        if value is None:
            return math.nan
        number = _as_float32(value)
        if number is None or not math.isfinite(number):
            raise RewardError(
                f"The reward {self.name!r} returned {value!r:.60} of type {type(value).__name__} for row {row}, the "
                f"completion {shortened(completion)}. Return a finite number in float32's range, or None where it "
                "does not apply."
            )
        return number

    def _failure(self, error: Exception) -> RewardError:
        return RewardError(f"The reward {self.name!r} raised {type(error).__name__}: {error}")


def function_name(function: Any) -> str:
    """A callable's name, that of the function inside a `functools.partial`, or that of its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def shortened(completion: Any) -> str:
    """At most a line of a completion, quoted: a text, or the last of several messages."""
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], Mapping):
        completion = completion[-1].get("content")
    text = completion if isinstance(completion, str) else str(completion)
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _as_float32(value: Any) -> float | None:
    if isinstance(value, str | bytes):  # `float` would parse them
        return None
    try:
        return float(torch.tensor(float(value.detach() if isinstance(value, Tensor) else value), dtype=torch.float32))
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _required(parameters: Iterable[inspect.Parameter], name: str) -> set[str]:
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    by_position = [item.name for item in required if item.kind is inspect.Parameter.POSITIONAL_ONLY]
    if by_position:
        raise ValueError(
            f"The reward {name!r} takes {by_position} by position only, but rewards are called by keyword. Its "
            "signature should be `f(prompts, completions, **kwargs)`, without `/`."
        )
    return {parameter.name for parameter in required if parameter.kind in _BY_KEYWORD}
