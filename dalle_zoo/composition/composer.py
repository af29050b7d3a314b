"""Composes samples: maps a seed and an index to a scene, its caption and its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dalle_zoo.composition.kinds import KINDS, SHARES
from dalle_zoo.composition.picker import Picker, Pools
from dalle_zoo.composition.scene import Pixels, Scene, render
from dalle_zoo.composition.sprites import SpriteSet, bundled_folder
from dalle_zoo.paths import user_path
from dalle_zoo.plain_data import PlainDataError, yaml_value
from dalle_zoo.seeds import seeded_rng
from dalle_zoo.values import as_number, check_integers, check_type, shown

COMBINATIONS = ("ground", "hue", "count", "pair")
"""Kinds with combinations that are held out of training."""
_ATTEMPTS = 1000


class NothingComposedError(ValueError):
    """The sprites do not allow any of the kinds."""


@dataclass(frozen=True, kw_only=True)
class CompositionConfig:
    """Configuration of a composed dataset."""

    sprites: str | None = None
    """Folder of sprites, see `SpriteSet.load`; relative to the configuration file. Defaults to the bundled set."""
    styles: tuple[str, ...] = ()
    """Styles of the sprites. Defaults to all."""
    things: tuple[str, ...] = ()
    """Names of the things that are composed for training. Defaults to all. Those of ``val-concepts`` always remain."""
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """Share of each kind; they need not add up to 1."""
    samples: int = 20_000
    """Number of samples per epoch. Every epoch composes new samples."""

    def __post_init__(self) -> None:
        check_integers(self, "samples")
        check_type("sprites", self.sprites, (str, type(None)), "the path of a folder")
        check_type("shares", self.shares, Mapping, "a mapping of kinds to numbers")
        for name in ("styles", "things"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
                raise TypeError(f"{name} must be a list of names, got {shown(value)}")
        for kind, share in self.shares.items():
            KINDS[kind]  # raises an error for an unknown name
            as_number(f"the share of {kind!r}", share, least=0)
        if not sum(self.shares.values()) > 0:
            raise ValueError("shares must hold a kind with a share above 0")

    @classmethod
    def load(cls, path: str | Path | None = None) -> CompositionConfig:
        """Reads a YAML file with the fields of this class.

        Args:
            path: The file. Defaults to the bundled one.

        Raises:
            ValueError: The file is not a mapping, or a field is unknown or out of range.
            TypeError: A field is of another type.

        Example:
            >>> sorted(CompositionConfig.load().shares)
            ['count', 'ground', 'hue', 'pair', 'place', 'single', 'styles']
        """
        file = bundled_folder() / "composition.yaml" if path is None else user_path(path)
        try:
            values = yaml_value(file.read_text("utf-8"))
        except (PlainDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} {error}") from None
        values = {} if values is None else values  # an empty file
        if not isinstance(values, dict) or (unknown := set(values) - set(cls.__dataclass_fields__)):
            what = f"the key {sorted(map(str, unknown))[0]!r}" if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{file} holds {what}: expected the keys {', '.join(cls.__dataclass_fields__)}")
        if isinstance(values.get("sprites"), str):
            values["sprites"] = str((file.parent / values["sprites"]).resolve())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def open_sprites(self) -> SpriteSet:
        """Returns the sprites of the chosen styles and things."""
        open_chosen = _bundled_sprites if self.sprites is None else _chosen
        return open_chosen(self.sprites, self.styles, self.things)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for fingerprints and records."""
        return {
            "styles": list(self.styles),
            "things": list(self.things),
            "shares": dict(self.shares),
            "samples": self.samples,
        }


def _chosen(folder: str | None, styles: tuple[str, ...], things: tuple[str, ...]) -> SpriteSet:
    return SpriteSet.load(folder).subset(styles, things)


_bundled_sprites = cache(_chosen)
"""Sprites of the bundled set, which every split shares: decoding them takes a second."""


@dataclass(frozen=True)
class Composed:
    """A composed sample, not yet rendered.

    Example:
        >>> composer = Composer(CompositionConfig.load().open_sprites(), shares={"ground": 1.0})
        >>> composed = composer.compose(0)
        >>> composed.scene.kind, composed.scene.ground in composed.caption
        ('ground', True)
    """

    index: int
    """Index of the sample."""
    scene: Scene
    """Scene of the image."""
    caption: str
    """Caption, in lower case except for acronyms."""


class Composer:
    """Composes samples, each of which depends only on (seed, index).

    Args:
        sprites: Sprites to compose.
        seed: Seed of all samples.
        split: Split of the sprites: "train", "val-styles" or "val-concepts".
        shares: Share of each kind. Defaults to `SHARES`.
        held_out: Whether only combinations that are held out of training are composed, which leaves out kinds without
            combinations. Defaults to False, which composes only the other combinations.

    Raises:
        ValueError: No kind remains.

    Example:
        >>> composer = Composer(CompositionConfig.load().open_sprites(), seed=0)
        >>> sample = composer.compose(7)
        >>> sample == composer.compose(7), composer.render(sample).shape
        (True, (64, 64, 3))
    """

    def __init__(
        self,
        sprites: SpriteSet,
        *,
        seed: int | str = 0,
        split: str = "train",
        shares: Mapping[str, float] = SHARES,
        held_out: bool = False,
    ) -> None:
        self.sprites, self.seed, self.held_out = sprites, seed, held_out
        self.pools = Pools(sprites, split)
        chosen = {k: share for k, share in shares.items() if share > 0 and (not held_out or k in COMBINATIONS)}
        if not chosen:
            raise ValueError(f"no kind is left to compose: expected one of {list(COMBINATIONS)} among {list(shares)}")
        self.kinds = tuple(chosen)
        self._cumulative = list(itertools.accumulate(chosen.values()))

    def compose(self, index: int) -> Composed:
        """Returns the sample with an index; raises `NothingComposedError` if the sprites do not allow any kind."""
        rng = seeded_rng("composition", self.seed, index)
        picker = Picker(self.pools, rng, self.held_out)
        for _ in range(_ATTEMPTS):
            kind = rng.choices(self.kinds, cum_weights=self._cumulative)[0]
            made = KINDS[kind](picker)
            if made is not None:
                return Composed(index, *made)
        raise NothingComposedError(self._nothing_composed())

    def _nothing_composed(self) -> str:
        """Returns the message for sprites that do not allow any kind."""
        kinds, start = ", ".join(self.kinds), f"{_ATTEMPTS} attempts composed nothing: the sprites allow"
        if not self.held_out:
            return f"{start} none of {kinds}: add sprites, or give a share to kinds that they allow"
        return (
            f"{start} no held-out combination of {kinds}, since few sprites have few or none: add sprites, give a "
            "share to kinds that they allow, or leave the held-out data out (`--data.val null`)"
        )

    def render(self, sample: Composed) -> Pixels:
        """Returns the pixels of a sample, uint8 (64, 64, 3)."""
        return render(sample.scene, self.sprites)
