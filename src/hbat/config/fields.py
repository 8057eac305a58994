"""Builds configuration dataclasses from plain values (YAML, command line, dicts) and checks the values of fields."""

import dataclasses
import difflib
import enum
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hbat.config.foreign import hint
from hbat.config.section_fields import OBJECTIVES

T = TypeVar("T")

_SHOWN = 100  # characters of a value in a message
_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
}


def nearest(key: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean `name`?"` for the closest of the `valid` names, or an empty string if none is close."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def not_an_option(key: str, valid: Iterable[str], objectives: Sequence[str] = (), *, shown_as: str = "") -> str:
    """Say that a key is none of the `valid`, and where it belongs or what is near; `shown_as` has its section too."""
    return f"`{shown_as or key}` is not an option{hint(key, objectives) or f'.{nearest(key, valid)}'}"


def shown(value: object) -> str:
    """Return the `repr` of a value for a message, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def at_home(value: Any) -> Any:
    """Replace `~/` at the start of a string or path, also of those in lists and mappings, by the home folder."""
    if isinstance(value, str | Path):
        return type(value)(Path(value).expanduser()) if str(value).startswith("~/") else value
    if isinstance(value, dict):
        return {key: at_home(inner) for key, inner in value.items()}
    return [at_home(inner) for inner in value] if isinstance(value, list) else value


def build_section(
    section: str, config_class: type[T], values: Mapping[str, Any], *, owned: Mapping[str, str] | None = None
) -> T:
    """Build a configuration, ours or TRL's, from plain values.

    A string is converted where a field takes only a number (YAML reads `1e-5` as a string), and `~/` at the start of
    one is the home folder.

    Args:
        section: Name of the section, for error messages; empty at the top level.
        config_class: The dataclass.
        values: Its fields.
        owned: Fields that cannot be set in this section, each with what to do instead.

    Returns:
        An instance of `config_class`.

    Raises:
        ValueError: If a key is unknown or owned, or the class refuses the values.
        TypeError: If a value has the wrong type.
    """
    prefix = f"{section}." if section else ""
    valid = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    hints = _type_hints(config_class)
    named = [section] if section in OBJECTIVES else []
    wrong = [not_an_option(str(key), valid, named, shown_as=f"{prefix}{key}") for key in values if key not in valid]
    wrong += [f"`{prefix}{key}` cannot be set here: {owned[key]}" for key in values if owned and key in owned]
    if wrong:
        raise ValueError(" ".join(wrong))
    converted = {key: convert(at_home(value), hints.get(key, Any), f"{prefix}{key}") for key, value in values.items()}
    try:
        return config_class(**converted)
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        if problem.startswith(f"`{prefix}"):
            raise ValueError(problem) from error
        culprit = None if f"`{prefix}" in problem else _culprit(config_class, converted)
        place = f"{prefix}{culprit}" if culprit else section
        raise ValueError(f"`{place}`: {problem}" if place else problem) from error


def _type_hints(config_class: type) -> dict[str, Any]:
    try:
        hints = get_type_hints(config_class)
    except (NameError, TypeError):  # annotations that cannot be evaluated: accept anything
        return {}
    # transformers takes these as well, beside what it annotates.
    for key, more in {"fsdp": bool, "max_grad_norm": type(None)}.items():
        if key in hints:
            hints[key] |= more
    return hints


def _culprit(config_class: type, values: Mapping[str, Any]) -> str | None:
    """Find the one key without which the configuration can be built."""
    found = []
    for key in values:
        try:
            config_class(**{other: value for other, value in values.items() if other != key})
        except Exception:  # noqa: BLE001, S112 - configurations of TRL raise anything
            continue
        found.append(key)
    return found[0] if len(found) == 1 else None


def convert(value: object, hint: Any, name: str) -> Any:
    """Fit a plain value to a type hint, or raise a TypeError that names the field. Unknown hints accept all."""
    choices = _choices(hint)
    for choice in choices:
        if _fits(value, choice):
            return _as_float(value, name) if choice is float and isinstance(value, int) else value
    if isinstance(value, str):
        if list[str] in choices:  # as the parser of transformers, which makes a list of one word
            return [value]
        for choice in choices:
            if choice in {int, float}:
                try:
                    return choice(value)
                except ValueError:
                    continue
    kinds = " or ".join(_kind(choice) for choice in choices)
    raise TypeError(f"`{name}` is {shown(value)}; it must be {kinds}.")


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise TypeError(f"`{name}` is {shown(value)}, which is too large for a float.") from None


def _choices(hint: Any) -> Collection[Any]:
    if get_origin(hint) in {Union, types.UnionType}:
        return [choice for member in get_args(hint) for choice in _choices(member)]
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
        return isinstance(value, origin) or value in [member.value for member in origin]
    if origin in {list, tuple}:
        return isinstance(value, list | tuple) and _all_fit(value, get_args(hint))
    return isinstance(value, origin)


def _all_fit(values: Iterable[object], hints: tuple[Any, ...]) -> bool:
    return not hints or all(any(_fits(value, choice) for choice in _choices(hints[0])) for value in values)


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    origin = get_origin(hint) or hint
    return _TYPE_NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise a ValueError that names the field unless `value` is one of a `Literal` type's choices."""
    valid = get_args(choices)
    if value not in valid:
        raise ValueError(
            f"`{name}` is {shown(value)}, which is not one of {', '.join(map(repr, valid))}."
            f"{nearest(str(value), valid)}"
        )


def check_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError that names the field unless `value` is a finite number with `low <= value <= high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared with the largest float because `math.isinf` overflows on an integer of 400 digits.
    if not number or not max(low, -sys.float_info.max) <= value <= min(high, sys.float_info.max):  # type: ignore[operator]
        bound = f"of at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"`{name}` is {shown(value)}; it must be a number {bound}.")


def check_whole(name: str, value: object, low: int) -> None:
    """Raise a ValueError that names the field unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` is {shown(value)}; it must be an integer of at least {low}.")
