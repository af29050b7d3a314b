"""Parses mask specs such as ``"row"`` or ``"conv(kernel=3)"``."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.specs import format_spec, parse_spec


def split_specs(text: str) -> list[str]:
    """Splits a list at its commas, except commas inside parentheses, which separate options.

    Example:
        >>> split_specs("row, conv(kernel=3, other=1)")
        ['row', 'conv(kernel=3, other=1)']
    """
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]


@dataclass(frozen=True)
class MaskSpec:
    """Name and integer options of a mask; ``str`` gives the canonical text.

    Example:
        >>> str(MaskSpec.parse(" conv( kernel = 3 ) "))
        'conv(kernel=3)'
    """

    name: str
    options: tuple[tuple[str, int], ...] = ()
    """Pairs of option and value, sorted by option."""

    @staticmethod
    def split(text: str) -> MaskSpec:
        """Parses ``name`` or ``name(option=integer, ...)`` without checking the names.

        Raises:
            ValueError: The text does not have that form.
        """
        name, options = parse_spec(text, "mask")
        return MaskSpec(name, tuple(sorted(options.items())))

    @staticmethod
    def parse(text: str) -> MaskSpec:
        """Parses a spec and checks its name and options against the registry.

        Raises:
            UnknownNameError: There is no such mask, or the mask has no such option; the message suggests the most
                similar name. It is also a `ValueError`.
            ValueError: The text is not a spec.
        """
        return MaskSpec.split(text).check()

    def check(self) -> MaskSpec:
        """Returns the spec if its name and options are registered; otherwise raises the errors of `parse`."""
        _, *known = inspect.signature(MASKS[self.name]).parameters  # the first one is the layout
        for option, _ in self.options:
            if option not in known:
                raise UnknownNameError(suggest(f"{self.name} option", option, known))
        return self

    def build(self, layout: TextImageLayout) -> MaskMod:
        """Builds the mask on a layout; raises the factory's errors for invalid options."""
        return MASKS[self.name](layout, **dict(self.options))

    def __str__(self) -> str:
        return format_spec(self.name, dict(self.options))
