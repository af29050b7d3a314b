"""Hyper-parameters of DALLE-pytorch's priors: arguments of its class, from the file of the weights or beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dalle_zoo.convert.base import Location
from dalle_zoo.convert.checkpoints import Checkpoint
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import check_small

DEFAULTS: dict[str, Any] = {
    "num_text_tokens": 10000, "text_seq_len": 256, "heads": 8, "dim_head": 64, "attn_types": ("full",),
    "stable": False, "padding_id": 0,
}  # fmt: skip
"""Of the original's class, in all versions, where the tensors do not tell; ``padding_id`` is of its tokenizers."""
MASKS = {"full": "full", "axial_row": "row_same", "axial_col": "column", "sparse": "full", "mlp": "full"}
"""Types of attention and our masks; ``conv_like`` is one of `CONVOLUTIONS`. Layers of ``sparse`` and ``mlp`` differ
from others in more than the mask."""
CONVOLUTIONS = ("conv_clamped(kernel=5)", "conv_quadrant(kernel=5)")
"""Before version 1.5, and since."""


@dataclass(frozen=True)
class HyperParameters:
    """Arguments of the original's class, as far as they are stated."""

    values: Mapping[str, Any]
    where: str
    """In which file, or in which part of the file of the weights."""

    def origin(self, name: str) -> str:
        """For the record: where a value comes from."""
        return f"{name} in {self.where}" if name in self.values else f"the original's default, {name} is not stated"

    def number(self, name: str, least: int = 1) -> int:
        """A number, or its default."""
        value = self.values.get(name, DEFAULTS[name])
        if type(value) is not int or value < least:
            raise WeightFileError(f"{name} in {self.where} must be a number from {least} on, got {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """Yes or no, or its default."""
        value = self.values.get(name, DEFAULTS[name])
        if type(value) is not bool:
            raise WeightFileError(f"{name} in {self.where} must be true or false, got {value!r}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Several texts, of which one may stand alone, or their default."""
        value = self.values.get(name)
        value = DEFAULTS[name] if value is None else (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
            raise WeightFileError(f"{name} in {self.where} must be a list of names, got {value!r}")
        return tuple(value)

    def check(self, inferred: Mapping[str, Any]) -> None:
        """Raises `WeightFileError` where something else is stated than the tensors tell."""
        wrong = [
            f"{name} is {self.values[name]!r}, the tensors have {value!r}"
            for name, value in inferred.items()
            if self.values.get(name, value) != value
        ]
        if wrong:
            raise WeightFileError(f"{self.where} does not fit: {'; '.join(wrong)}")


def hyper_parameters(location: Location, checkpoint: Checkpoint) -> HyperParameters:
    """Those in the file of the weights, else those of another file beside it.

    Raises:
        WeightFileError: There are none, or several that differ.
    """
    own = _stated(checkpoint.content)
    if own is not None:
        return HyperParameters(own, "hparams")
    beside = {name: _stated(content) or {} for name, content in _beside(location, checkpoint)}
    if not beside:
        raise WeightFileError(
            "it lacks its hparams, without which heads and kinds of attention are not known: state the arguments of "
            'DALLE in a file beside it, such as hparams.json with {"num_text_tokens": 49408, "text_seq_len": 256, '
            '"depth": 12, "heads": 8, "dim_head": 64, "attn_types": ["full"]}'
        )
    if any(values != next(iter(beside.values())) for values in beside.values()):
        raise WeightFileError(f"{' and '.join(beside)} state different hyper-parameters: leave the right one there")
    where, values = next(iter(beside.items()))
    return HyperParameters(values, where)


def _stated(content: Any) -> Mapping[str, Any] | None:
    """Hyper-parameters of a prior in the content of a file; None if it has none."""
    stated = content.get("hparams", content) if isinstance(content, Mapping) else None
    if not isinstance(stated, Mapping) or "depth" not in stated or {"dim", "text_seq_len"}.isdisjoint(stated):
        return None
    check_small(stated, "it")
    return stated


def _beside(location: Location, checkpoint: Checkpoint) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and contents of other files that state hyper-parameters."""
    contents = {other.path.name: other.content for other in location.checkpoints if other is not checkpoint}
    for name, content in {**location.configs, **contents}.items():
        if _stated(content) is not None:
            yield name, content


def stated_version(location: Location, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Version of the original that a file states beside hyper-parameters, (major, minor, …); None if none does."""
    for content in (checkpoint.content, *dict(_beside(location, checkpoint)).values()):
        stated = content.get("version") if isinstance(content, Mapping) else None
        if isinstance(stated, str) and re.match(r"\d{1,4}\.\d{1,4}", stated):
            return tuple(int(part) for part in re.findall(r"\d{1,4}", stated)[:3])
    return None


def layers_of_kind(kind: str, hparams: HyperParameters, num_layers: int) -> tuple[int, ...]:
    """Numbers of the layers with a type of attention."""
    kinds = hparams.texts("attn_types")
    return tuple(index for index in range(num_layers) if kinds[index % len(kinds)] == kind)


def attention_masks(
    hparams: HyperParameters, num_layers: int, version: tuple[int, ...] | None, caches: bool
) -> tuple[str, str]:
    """Schedule of masks, and where it comes from.

    Args:
        hparams: Of the prior.
        num_layers: Its layers.
        version: Of the original, if it is stated.
        caches: Whether modules are nested as since version 1.4.

    Raises:
        WeightFileError: A type of attention is not known.
    """
    specs, origin = [], hparams.origin("attn_types")
    for kind in hparams.texts("attn_types")[:num_layers]:
        if kind != "conv_like" and kind not in MASKS:
            raise WeightFileError(
                f"it has layers of the attention type {kind!r}, expected {', '.join(MASKS)}, conv_like"
            )
        specs.append(MASKS.get(kind) or CONVOLUTIONS[caches if version is None else version >= (1, 5)])
        if kind == "conv_like":
            stated = "as no version is stated" if version is None else f"version {'.'.join(map(str, version))}"
            origin = f"{hparams.origin('attn_types')}; conv_like is {specs[-1]}, {stated}"
    return ", ".join(specs), origin
