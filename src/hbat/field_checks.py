"""Checks of single configuration fields, for dataclasses that were built by hand."""

import sys
from typing import Any, get_args

from hbat.sections import nearest, shown


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
