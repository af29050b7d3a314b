"""Parses and formats specs: a name with integer options, such as ``"row"`` or ``"conv(kernel=3)"``."""

from __future__ import annotations

import re

from dalle_zoo.values import check_type

_SHAPE = re.compile(r"\s*([^\s(),=]+)\s*(?:\(([^()]*)\))?\s*")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([+-]?\d+)\s*")


def parse_spec(text: str, kind: str = "spec", example: str = "conv(kernel=3)") -> tuple[str, dict[str, int]]:
    """Parses ``name`` or ``name(option=integer, ...)``, without checking that the name or the options exist.

    Args:
        text: The spec.
        kind: What the spec names, for errors ("mask"). Defaults to "spec".
        example: A spec with an option, for errors. Defaults to "conv(kernel=3)".

    Returns:
        The name, and the options in the order of the text.

    Raises:
        TypeError: It is not text.
        ValueError: The text does not have this form, or an option is given twice.

    Example:
        >>> parse_spec(" hsdp_powersgd( rank = 896, shard_size=8 ) ")
        ('hsdp_powersgd', {'rank': 896, 'shard_size': 8})
    """
    check_type(kind, text, str, "text")
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
            raise ValueError(f"option {option.group(1)!r} is given twice in {text!r}: remove one")
        options[option.group(1)] = int(option.group(2))
    return name, options


def format_spec(name: str, options: dict[str, int]) -> str:
    """Returns the canonical text of a spec.

    Example:
        >>> format_spec("conv", {"kernel": 3})
        'conv(kernel=3)'
    """
    inside = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({inside})" if inside else name
