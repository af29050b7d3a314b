"""The layer schedule: which layer has which mask."""

from __future__ import annotations

from dalle_zoo.masks.layout import MASKS
from dalle_zoo.masks.spec import MaskSpec, split_specs
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.values import as_integer, check_type


def layer_masks(schedule: str, num_layers: int) -> tuple[str, ...]:
    """Returns the mask spec of every layer, first layer first.

    Args:
        schedule: ``"paper"``, the schedule of appendix B.1; ``"paper(kernel=5)"``, the same with
            that option of the convolutional mask; or a comma-separated list of specs, repeated
            from the first layer (``"full"``, ``"row, column"``).
        num_layers: Number of layers of the network, at least 1.

    Raises:
        TypeError: The schedule is not text, or the number is not an integer.
        UnknownNameError: A name or an option is unknown; the message suggests the most similar one. It is also a
            `ValueError`.
        ValueError: The text is not a schedule, or ``num_layers`` is below 1.

    Example:
        >>> layer_masks("paper", 7)
        ('row', 'column', 'row', 'row', 'row', 'column', 'conv')
        >>> layer_masks("row, conv(kernel=3)", 3)
        ('row', 'conv(kernel=3)', 'row')
    """
    check_type("schedule", schedule, str, "text")
    num_layers = as_integer("num_layers", num_layers, least=1)
    entries = [MaskSpec.split(part) for part in split_specs(schedule)]
    for entry in entries:
        if entry.name != "paper" and entry.name not in MASKS:
            raise UnknownNameError(suggest("schedule or mask", entry.name, [*MASKS, "paper"]))
    if entries[0].name == "paper" and len(entries) == 1:
        return _paper(MaskSpec("conv", entries[0].options).check(), num_layers)
    if any(entry.name == "paper" for entry in entries):
        raise ValueError(
            f"'paper' is a complete schedule and cannot be part of a list, got {schedule!r}: "
            f"write only 'paper', or only masks ({', '.join(MASKS)})"
        )
    cycle = [str(entry.check()) for entry in entries]
    return tuple(cycle[index % len(cycle)] for index in range(num_layers))


def _paper(last: MaskSpec, num_layers: int) -> tuple[str, ...]:
    # Appendix B.1 counts layers from 1: column where (i - 2) mod 4 = 0, the last one
    # convolutional.
    before = ["column" if (index - 1) % 4 == 0 else "row" for index in range(num_layers - 1)]
    return (*before, str(last))
