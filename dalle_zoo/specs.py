"""Specs: a name and integer options as people type them, ``"row"``, ``"conv(kernel=3)"``, ``"hsdp(shard_size=8)"``."""

from __future__ import annotations

import re

_SHAPE = re.compile(r"\s*([^\s(),=]+)\s*(?:\(([^()]*)\))?\s*")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([+-]?\d+)\s*")


def parse_spec(text: str, kind: str = "spec", example: str = "conv(kernel=3)") -> tuple[str, dict[str, int]]:
    """Reads the grammar only, ``name`` or ``name(option=integer, ...)``; whether there is such a name is not asked.

    Args:
        text: What was typed.
        kind: What it should name, for messages ("mask").
        example: One with an option, for messages.

    Returns:
        The name, and the options in the order typed.

    Raises:
        ValueError: The text does not have that form.

    Example:
        >>> parse_spec(" hsdp_powersgd( rank = 896, shard_size=8 ) ")
        ('hsdp_powersgd', {'rank': 896, 'shard_size': 8})
    """
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        raise ValueError(
            f"a {kind} is written 'name' or 'name(option=integer, ...)', "
            f"such as {example.partition('(')[0]!r} or {example!r}, got {text!r}"
        )
    name, inside = shape.group(1), shape.group(2) or ""
    options: dict[str, int] = {}
    for part in inside.split(",") if inside.strip() else ():
        option = _OPTION.fullmatch(part)
        if option is None:
            one = example.partition("(")[2].rstrip(")").partition(",")[0]
            raise ValueError(
                f"an option of {name!r} is written 'option=integer', such as {one!r}, got {part.strip()!r} in {text!r}"
            )
        if option.group(1) in options:
            raise ValueError(f"option {option.group(1)!r} is given twice in {text!r}: drop one")
        options[option.group(1)] = int(option.group(2))
    return name, options


def format_spec(name: str, options: dict[str, int]) -> str:
    """The canonical text of a spec.

    Example:
        >>> format_spec("conv", {"kernel": 3})
        'conv(kernel=3)'
    """
    inside = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({inside})" if inside else name
