"""Hyper-parameters of DALLE-pytorch's priors: arguments of its class, in the weight file or in a file next to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, check_small

DEFAULTS: dict[str, Any] = {
    "num_text_tokens": 10000, "text_seq_len": 256, "heads": 8, "dim_head": 64, "attn_types": ("full",),
    "stable": False, "padding_id": 0,
}  # fmt: skip
"""Defaults of the original's class, the same in all versions; ``padding_id`` is that of its tokenizers."""
MASKS = {"full": "full", "axial_row": "row_same", "axial_col": "column", "sparse": "full", "mlp": "full"}
"""Types of attention and native masks; ``conv_like`` is one of `CONVOLUTIONS`. Layers of the types ``sparse`` and
``mlp`` differ from others in more than the mask."""
CONVOLUTIONS = ("conv_clamped(kernel=5)", "conv_quadrant(kernel=5)")
"""Masks of ``conv_like`` before version 1.5, and since."""


@dataclass(frozen=True)
class HyperParameters:
    """Stated arguments of the original's class."""

    values: Mapping[str, Any]
    where: str
    """Name of the file, or of the part of the weight file, that states them."""

    def origin(self, name: str) -> str:
        """Returns the origin of a value, for the record."""
        return f"{name} in {self.where}" if name in self.values else f"the original's default, {name} is not stated"

    def number(self, name: str, least: int = 1) -> int:
        """Returns a number or its default."""
        value = self.values.get(name, DEFAULTS[name])
        if type(value) is not int or value < least:
            raise WeightFileError(f"{name} in {self.where} must be an integer of at least {least}, got {shown(value)}")
        return value

    def flag(self, name: str) -> bool:
        """Returns a boolean or its default."""
        value = self.values.get(name, DEFAULTS[name])
        if type(value) is not bool:
            raise WeightFileError(f"{name} in {self.where} must be true or false, got {shown(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Returns a list of names or its default; a single name counts as a list."""
        value = self.values.get(name)
        value = DEFAULTS[name] if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
            raise WeightFileError(f"{name} in {self.where} must be a list of names, got {shown(value)}")
        return tuple(value)

    def check(self, inferred: Mapping[str, Any]) -> None:
        """Raises `WeightFileError` if stated values contradict those inferred from the tensors."""
        wrong = [
            f"{name} is {shown(self.values[name])}, the tensors have {value!r}"
            for name, value in inferred.items()
            if self.values.get(name, value) != value
        ]
        if wrong:
            raise WeightFileError(f"{self.where} does not fit the weights: {'; '.join(wrong)}")


def hyper_parameters(location: Location, checkpoint: Checkpoint) -> HyperParameters:
    """Returns the hyper-parameters in the weight file, else those of another file at the same location.

    Raises:
        WeightFileError: There are none, or several that differ.
    """
    own = _stated(checkpoint.content)
    if own is not None:
        return HyperParameters(own, "hparams")
    others = {name: _stated(content) or {} for name, content in _other_files(location, checkpoint)}
    if not others:
        raise WeightFileError(
            "it lacks its hparams, which state heads and types of attention: state the arguments of DALLE in a file "
            'next to it, such as hparams.json with {"num_text_tokens": 49408, "text_seq_len": 256, '
            '"depth": 12, "heads": 8, "dim_head": 64, "attn_types": ["full"]}'
        )
    where, values = next(iter(others.items()))
    if any(stated != values for stated in others.values()):
        raise WeightFileError(f"{' and '.join(others)} state different hyper-parameters: keep only the right one")
    return HyperParameters(values, where)


def _stated(content: Any) -> Mapping[str, Any] | None:
    """Returns the hyper-parameters of a prior in the content of a file; None if it has none."""
    stated = content.get("hparams", content) if isinstance(content, Mapping) else None
    if not isinstance(stated, Mapping) or "depth" not in stated or {"dim", "text_seq_len"}.isdisjoint(stated):
        return None
    check_small(stated, "it")
    return stated


def _other_files(location: Location, checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields names and contents of other files that state hyper-parameters."""
    contents = {other.path.name: other.content for other in location.checkpoints if other is not checkpoint}
    for name, content in {**location.configs, **contents}.items():
        if _stated(content) is not None:
            yield name, content


def stated_version(location: Location, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Returns the version of the original, (major, minor, …), that a file with hyper-parameters states, or None."""
    for content in (checkpoint.content, *dict(_other_files(location, checkpoint)).values()):
        stated = content.get("version") if isinstance(content, Mapping) else None
        if isinstance(stated, str) and re.match(r"\d{1,4}\.\d{1,4}", stated):
            return tuple(int(part) for part in re.findall(r"\d{1,4}", stated)[:3])
    return None


def layers_of_kind(kind: str, hparams: HyperParameters, num_layers: int) -> tuple[int, ...]:
    """Returns the indices of the layers with a type of attention."""
    kinds = hparams.texts("attn_types")
    return tuple(index for index in range(num_layers) if kinds[index % len(kinds)] == kind)


def attention_masks(
    hparams: HyperParameters, num_layers: int, version: tuple[int, ...] | None, caches: bool
) -> tuple[str, str]:
    """Returns the schedule of masks and its origin.

    Args:
        hparams: Hyper-parameters of the prior.
        num_layers: Number of layers.
        version: Version of the original; None if it is not stated.
        caches: Whether modules are nested as in version 1.4 and later.

    Raises:
        WeightFileError: A type of attention is not known.
    """
    specs, origin = [], hparams.origin("attn_types")
    for kind in hparams.texts("attn_types")[:num_layers]:
        if kind != "conv_like" and kind not in MASKS:
            raise WeightFileError(
                f"it has layers of the attention type {shown(kind)}, expected {', '.join(MASKS)}, conv_like"
            )
        specs.append(MASKS.get(kind) or CONVOLUTIONS[caches if version is None else version >= (1, 5)])
        if kind == "conv_like":
            stated = "as no version is stated" if version is None else f"version {'.'.join(map(str, version))}"
            origin = f"{hparams.origin('attn_types')}; conv_like is {specs[-1]}, {stated}"
    return ", ".join(specs), origin
