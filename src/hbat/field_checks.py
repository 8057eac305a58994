"""Checks of single configuration fields, for dataclasses that were built by hand."""

import math
from typing import Any, get_args

from hbat.sections import nearest


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
            f"`{name}` is {value!r}, which is not one of {', '.join(map(repr, valid))}.{nearest(str(value), valid)}"
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        bound = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"`{name}` is {value!r}; it must be a number {bound}.")


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
        raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {low}.")
