"""Checks values that callers pass, in one place for the pipeline, the command, the evaluation and recipes.

A wrong type raises `TypeError`, a value out of range `ValueError`; both name the argument. The integers of numpy and
of PyTorch are integers; a truth value, text and 3.0 are not. Paths are checked by `dalle_zoo.paths.user_path`.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import reprlib
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Real
from typing import Any, ParamSpec, SupportsIndex, TypeVar

from dalle_zoo.registry import suggest

P = ParamSpec("P")
R = TypeVar("R")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def as_integer(
    name: str, value: object, *, least: int | None = None, most: int | None = None, meaning: str = ""
) -> int:
    """Returns a value as an integer.

    Args:
        name: Name of the argument, for the message.
        value: The value.
        least: Smallest value allowed. Defaults to no limit.
        most: Largest value allowed. Defaults to no limit.
        meaning: Meaning of the integer, appended to the message. Defaults to nothing.

    Raises:
        TypeError: The value is not an integer.
        ValueError: The value is out of range.

    Example:
        >>> as_integer("batch_size", 8, least=1)
        8
    """
    expected = f"{name} must be an integer{_limits(least, most)}{meaning}, got {shown(value)}"
    if _is_truth(value) or not isinstance(value, SupportsIndex):
        raise TypeError(expected)
    try:
        number = operator.index(value)
    except TypeError:  # an array or a tensor of fractions, or of several elements
        raise TypeError(expected) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(expected)
    return number


def as_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf, meaning: str = ""
) -> float:
    """Returns a value as a finite number; integers stay integers.

    Args:
        name: Name of the argument, for the message.
        value: The value.
        least: Smallest value allowed. Defaults to no limit.
        most: Largest value allowed. Defaults to no limit.
        meaning: Meaning of the number, appended to the message. Defaults to nothing.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is not finite, or out of range.

    Example:
        >>> as_number("temperature", 0.7, least=0)
        0.7
    """
    limits = _limits(*(None if math.isinf(limit) else limit for limit in (least, most)))
    expected = f"{name} must be a finite number{limits}{meaning}, got {shown(value)}"
    if _is_truth(value) or not isinstance(value, Real):
        raise TypeError(expected)
    number = int(value) if isinstance(value, SupportsIndex) else float(value)
    if not (least <= number <= most and abs(number) <= sys.float_info.max):  # False for NaN too
        raise ValueError(expected)
    return number


def check_integers(config: object, *names: str, least: int = 1) -> None:
    """Checks integer fields of a frozen dataclass, and stores those of numpy as plain integers.

    Args:
        config: The dataclass.
        names: Fields.
        least: Smallest value allowed. Defaults to 1.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is too small.
    """
    for name in names:
        object.__setattr__(config, name, as_integer(name, getattr(config, name), least=least))


def check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raises `TypeError` unless a value is an instance of a type.

    Args:
        name: Name of the argument, for the message.
        value: The value.
        kind: The type, or several of which one suffices.
        expected: What the argument must be, with its article, for the message.

    Example:
        >>> check_type("record", None, dict, "a dict")
        Traceback (most recent call last):
        TypeError: record must be a dict, got None
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {shown(value)}")


def differences(first: Any, second: Any, besides: Collection[str] = ()) -> str:
    """Returns the fields in which two configurations differ, with both values; empty if they do not.

    Args:
        first: A dataclass.
        second: Another one of the same type.
        besides: Names of fields that may differ. Defaults to none.
    """
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(first) if f.name not in besides}
    return "; ".join(f"{name} {one}, {other}" for name, (one, other) in pairs.items() if one != other)


def shown(value: object) -> str:
    """Returns a value as it appears in a message: on one line, long ones shortened, without addresses in memory."""
    return re.sub(r" at 0x[\dA-Fa-f]+", "", _SHORT.repr(value).replace("\n", " "))


def suggests_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public function: an unknown keyword argument raises an error that suggests the nearest known one."""
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in ("self", "cls")
    ]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise TypeError(suggest("argument", name, known))
        return function(*args, **kwargs)

    return checked


def _is_truth(value: object) -> bool:
    """Returns whether a value is true or false, also as an array or a tensor."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _limits(least: float | None, most: float | None) -> str:
    low, high = (f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (least, most))
    if least is not None and most is not None:
        return f" in {low}..{high}"
    if least is not None:
        return f" of at least {low}"
    return f" of at most {high}" if most is not None else ""
