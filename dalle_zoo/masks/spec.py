"""Specs: masks as people type them, ``"row"`` or ``"conv(kernel=3)"``."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.specs import format_spec, parse_spec


def split_specs(text: str) -> list[str]:
    """Splits a list at its commas; those inside parentheses belong to options.

    Example:
        >>> split_specs("row, conv(kernel=3, other=1)")
        ['row', 'conv(kernel=3, other=1)']
    """
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]


@dataclass(frozen=True)
class MaskSpec:
    """A mask's name and integer options; ``str`` gives the canonical text.

    Example:
        >>> str(MaskSpec.parse(" conv( kernel = 3 ) "))
        'conv(kernel=3)'
    """

    name: str
    options: tuple[tuple[str, int], ...] = ()
    """Pairs of option and value, sorted by option."""

    @staticmethod
    def split(text: str) -> MaskSpec:
        """Reads the grammar only, ``name`` or ``name(option=integer, ...)``.

        Raises:
            ValueError: The text does not have that form.
        """
        name, options = parse_spec(text, "mask")
        return MaskSpec(name, tuple(sorted(options.items())))

    @staticmethod
    def parse(text: str) -> MaskSpec:
        """Reads a spec and checks name and options against the registry.

        Raises:
            UnknownNameError: No such mask, or no such option of the mask; names the nearest one.
                It is a `ValueError` too.
            ValueError: The text is not a spec.
        """
        return MaskSpec.split(text).check()

    def check(self) -> MaskSpec:
        """Itself, if the registry knows name and options; else raises as `parse` does."""
        _, *known = inspect.signature(MASKS[self.name]).parameters  # the first one is the layout
        for option, _ in self.options:
            if option not in known:
                raise UnknownNameError(suggest(f"{self.name} option", option, known))
        return self

    def build(self, layout: TextImageLayout) -> MaskMod:
        """The mask on a layout; raises what the factory raises for a bad value."""
        return MASKS[self.name](layout, **dict(self.options))

    def __str__(self) -> str:
        return format_spec(self.name, dict(self.options))
