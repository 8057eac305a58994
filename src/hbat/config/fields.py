"""From a section of plain values (YAML, command line, a dict) to a dataclass: its names and types are checked here."""

import dataclasses
import difflib
import enum
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


#: Fields that take more than their type says: transformers 5 documents `fsdp=True` and annotates a text.
_WIDER = {"fsdp": bool}


_SHOWN = 100  # characters of a value in a message


def nearest(key: str, valid: Iterable[str]) -> str:
    """Say which of the `valid` names is closest to an unknown one, as the tail of an error message.

    Args:
        key: The unknown name.
        valid: The names that are known.

    Returns:
        `" Did you mean `name`?"`, or an empty text where nothing is close.
    """
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def build_section(
    section: str, config_class: type[T], values: Mapping[str, Any], *, owned: Mapping[str, str] | None = None
) -> T:
    """Build a configuration, ours or the host's, from plain values.

    Numbers may come as text (YAML reads `1e-5` as one); they are converted where the field takes a number.

    Args:
        section: Name of the section, for messages; empty at the top level.
        config_class: The dataclass.
        values: Its fields.
        owned: Fields that may not stand here, and what to set instead.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: If a key is unknown, or the class refuses the values.
        TypeError: If a value has the wrong type.
    """
    prefix = f"{section}." if section else ""
    valid = [each.name for each in dataclasses.fields(config_class) if each.init]  # type: ignore[arg-type]
    hints = _type_hints(config_class)
    converted = {}
    for key, value in values.items():
        if key not in valid:
            raise ValueError(f"`{prefix}{key}` is not an option.{nearest(str(key), valid)}")
        if owned and key in owned:
            raise ValueError(f"`{prefix}{key}` cannot be set here: {owned[key]}")
        converted[key] = convert(value, _hint(key, hints), f"{prefix}{key}")
    try:
        return config_class(**converted)
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        if problem.startswith(f"`{prefix}"):
            raise ValueError(problem) from error
        culprit = None if f"`{prefix}" in problem else _culprit(config_class, converted)
        raise ValueError(f"`{prefix}{culprit}`: {problem}" if culprit else f"`{section}`: {problem}") from error


def _culprit(config_class: type, values: Mapping[str, Any]) -> str | None:
    # The one key without which the configuration can be built.
    found = []
    for key in values:
        try:
            config_class(**{other: value for other, value in values.items() if other != key})
        except Exception:  # noqa: BLE001, S112 - the host raises anything
            continue
        found.append(key)
    return found[0] if len(found) == 1 else None


def shown(value: object) -> str:
    """Write a value for a message.

    Args:
        value: What was given.

    Returns:
        Its `repr`, cut where it is long.
    """
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def convert(value: object, hint: Any, name: str) -> Any:
    """Fit a plain value to the type of a field.

    Args:
        value: What was given.
        hint: The field's type; parts that are not understood accept anything.
        name: The field, for the message.

    Returns:
        The value, with text turned into the number that it spells where only a number fits.

    Raises:
        TypeError: If it does not fit.
    """
    choices = _choices(hint)
    for choice in choices:
        if _fits(value, choice):
            return _as_float(value, name) if choice is float and isinstance(value, int) else value
    if isinstance(value, str):
        for choice in choices:
            number = _number(value, choice)
            if number is not None:
                return number
    kinds = " or ".join(_kind(choice) for choice in choices)
    raise TypeError(f"`{name}` is {shown(value)}; it must be {kinds}.")


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise TypeError(f"`{name}` is {shown(value)}, which is too large for a number with a fraction.") from None


def _hint(key: str, hints: Mapping[str, Any]) -> Any:
    hint = hints.get(key, Any)
    return Union[hint, _WIDER[key]] if key in _WIDER else hint  # noqa: UP007 - of two values


def _type_hints(config_class: type) -> dict[str, Any]:
    try:
        return get_type_hints(config_class)
    except (NameError, TypeError):  # a host class with annotations that cannot be evaluated: accept anything
        return {}


def _choices(hint: Any) -> Collection[Any]:
    if get_origin(hint) in {Union, types.UnionType}:
        return [inner for each in get_args(hint) for inner in _choices(each)]
    return [hint]


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return value in get_args(hint)
    if origin is Any or not isinstance(origin, type):  # `Any` is a class since Python 3.11
        return True
    if origin in {int, float}:
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if issubclass(origin, enum.Enum):
        return isinstance(value, origin) or value in [each.value for each in origin]
    if origin in {list, tuple}:
        return isinstance(value, list | tuple) and _all_fit(value, get_args(hint))
    return isinstance(value, origin)


def _all_fit(values: Iterable[object], hints: tuple[Any, ...]) -> bool:
    return not hints or all(any(_fits(value, choice) for choice in _choices(hints[0])) for value in values)


def _number(text: str, hint: Any) -> float | int | None:
    if hint not in {int, float}:
        return None
    try:
        return int(text) if hint is int else float(text)
    except ValueError:
        return None


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(each.value) for each in hint)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    origin = get_origin(hint) or hint
    return names.get(origin, {list: "a list", dict: "a mapping"}.get(origin, getattr(origin, "__name__", str(origin))))


def check_choice(name: str, value: object, choices: Any) -> None:
    """Check that a value is one of a few.

    Args:
        name: The field, for the message.
        value: Its value.
        choices: A `Literal` type.

    Raises:
        ValueError: If it is not.
    """
    valid = get_args(choices)
    if value not in valid:
        raise ValueError(
            f"`{name}` is {shown(value)}, which is not one of {', '.join(map(repr, valid))}."
            f"{nearest(str(value), valid)}"
        )


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    """Check that a value is a finite number in a range.

    Args:
        name: The field, for the message.
        value: Its value.
        low: Smallest that is allowed.
        high: Largest that is allowed.

    Raises:
        ValueError: If it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The largest float instead of `math.isinf`, which a whole number of 400 digits does not fit into.
    if not number or not max(low, -sys.float_info.max) <= value <= min(high, sys.float_info.max):  # type: ignore[operator]
        bound = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"`{name}` is {shown(value)}; it must be a number {bound}.")


def check_whole(name: str, value: object, low: int) -> None:
    """Check that a value is a whole number.

    Args:
        name: The field, for the message.
        value: Its value.
        low: Smallest that is allowed.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` is {shown(value)}; it must be a whole number of at least {low}.")
