"""Composed samples as a `SampleSource`, so that training, encoding and evaluation read them like any other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from dalle_zoo.composition.composer import Composer, CompositionConfig
from dalle_zoo.composition.layers import Layers, layers
from dalle_zoo.composition.scene import Pixels
from dalle_zoo.data.samples import Sample, SampleSource, Skipped
from dalle_zoo.registry import UnknownNameError, suggest

SPLITS = ("train", "val-styles", "val-concepts", "held-out")
"""``held-out`` composes only combinations that training never sees."""
_COMPARED = 64
"""Number of samples in the fingerprint, which so changes with the code of a kind."""


class ComposedSample(Sample):
    """A composed sample, rendered when its image is used: a resumed run passes over samples without using them.

    Args:
        composer: Composes and renders it.
        index: Number of the sample.
    """

    def __init__(self, composer: Composer, index: int) -> None:
        composed = composer.compose(index)
        self.__dict__["key"], self.__dict__["captions"] = f"{composed.scene.kind}-{index}", (composed.caption,)
        self.__dict__["_composed"], self.__dict__["_composer"] = composed, composer

    @property
    def image(self) -> bytes:
        """Contents of an image file."""
        return ppm(self.__dict__["_composer"].render(self.__dict__["_composed"]))

    def layers(self, grid: int) -> Layers:
        """Returns the layers of its scene, see `dalle_zoo.composition.layers.layers`."""
        return layers(self.__dict__["_composed"].scene, self.__dict__["_composer"].sprites, grid)


class CompositionSource(SampleSource):
    """Samples composed on the fly: epoch e, position p is sample ``e * samples + p`` of the seed.

    A sample depends on (seed, index) alone, so a resumed run and any number of workers compose the same ones.
    Without a seed, the stored order, epoch 0 of the split's own seed is composed: the same samples every time.

    Args:
        config: What to compose.
        split: One of `SPLITS`. Those but ``train`` have a twentieth of the samples.

    Raises:
        UnknownNameError: There is no such split; the message suggests the nearest one.

    Example:
        >>> source = CompositionSource(CompositionConfig.load(), "train")
        >>> first, again = (next(source.read(seed=0, epoch=1, start=7, stop=8)) for _ in range(2))
        >>> first.key, first.image == again.image  # sample 1 * 20,000 + 7 of the seed
        ('pair-20007', True)
    """

    def __init__(self, config: CompositionConfig, split: str = "train") -> None:
        if split not in SPLITS:
            raise UnknownNameError(suggest("split", split, SPLITS))
        self.config, self.split = config, split
        self.sprites = config.open_sprites()
        self.composer(0)  # raises an error for unusable sprites before training

    def composer(self, seed: int | str) -> Composer:
        """Returns the composer of a seed."""
        sprite_split = self.split if self.split.startswith("val-") else "train"
        # For new styles and things, only single images show how well the model knows them.
        shares = {"single": 1.0} if self.split.startswith("val-") else self.config.shares
        return Composer(self.sprites, seed=seed, split=sprite_split, shares=shares, held_out=self.split == "held-out")

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self.config.samples if self.split == "train" else max(1, self.config.samples // 20)

    def read(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        """See `SampleSource.read`; no sample is ever skipped."""
        composer = self.composer(f"stored {self.split}" if seed is None else seed)
        first = 0 if seed is None else epoch * self.num_samples
        for index in range(first + start + skip, first + stop):
            yield ComposedSample(composer, index)

    def fingerprint(self) -> str:
        """Returns the hexadecimal SHA-256 of the sprites, of the configuration and of what the kinds make of them."""
        composer = self.composer("fingerprint")
        composed = [repr(composer.compose(index)) for index in range(_COMPARED)]
        facts = {"sprites": self.sprites.fingerprint(), "split": self.split, **self.config.as_dict(), "made": composed}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def ppm(pixels: Pixels) -> bytes:
    """Returns an image as a PPM file, which is uncompressed and therefore fast to write and read."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()
