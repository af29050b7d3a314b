"""Sprite sets: images of single things with transparency, their names and styles."""

from __future__ import annotations

import difflib
import hashlib
import importlib.resources
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_zoo.composition.colors import dominant_hue, is_single_hued, nearest_hue
from dalle_zoo.files import escape_surrogates, parse_json
from dalle_zoo.paths import user_path
from dalle_zoo.values import shown

Pixels = npt.NDArray[np.uint8]

SIZE = 64
"""Side of a sprite, pixels."""
BUNDLED = "sprites64"
"""Name of the bundled sprite set."""
ARCHIVE, INDEX = "sprites.tar", "sprites.jsonl"
"""Files of a built sprite set: WebP images, and one JSON record per image."""
_SUFFIXES = (".png", ".webp")
_AGAIN = "build or install the sprites again"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Line breaks and other control characters."""


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """Names and origin of one sprite.

    Example:
        >>> fox = Sprite(key="flat/red_fox", thing="red fox", names=("red fox", "fox"), style="flat", mirrored=True)
        >>> fox.names[0], fox.split
        ('red fox', 'train')
    """

    key: str
    """Name that is unique in its set."""
    thing: str
    """Identifier of the depicted thing, shared by its sprites in several styles."""
    names: tuple[str, ...]
    """Names, the most common one first."""
    style: str
    """Word for its style in captions, such as "3d" or "flat"; empty if the set has only one style."""
    keywords: tuple[str, ...] = ()
    """Related words."""
    mirrored: bool = False
    """Whether it may be mirrored, which is right for animals and food but not for letters."""
    split: str = "train"
    """Split: "train", "val-styles" (training has the thing only in other styles) or "val-concepts" (training does not
    have the thing)."""


class SpriteSet:
    """Sprites and their pixels.

    Args:
        sprites: Records of N sprites.
        pixels: Premultiplied RGBA, uint8 (N, 64, 64, 4).

    Raises:
        ValueError: The set is empty, or records and pixels differ in number.

    Example:
        >>> square = np.zeros((1, SIZE, SIZE, 4), np.uint8)
        >>> square[:, 16:48, 16:48] = 255, 0, 0, 255  # red and opaque
        >>> sprites = SpriteSet([Sprite(key="square", thing="square", names=("square",), style="flat")], square)
        >>> len(sprites), sprites.single_hued  # sprite 0 can be recolored
        (1, frozenset({0}))
        >>> sprites.subset(["3d"])
        Traceback (most recent call last):
        ValueError: there is no style '3d' in the sprite set: expected some of ['flat']
    """

    def __init__(self, sprites: Sequence[Sprite], pixels: Pixels) -> None:
        if not sprites or len(sprites) != len(pixels):
            raise ValueError(f"expected one image per sprite, got {len(sprites)} sprites and {len(pixels)} images")
        self.sprites = tuple(sprites)
        self.pixels = pixels
        self._colors: dict[int, str] = {}

    @cached_property
    def single_hued(self) -> frozenset[int]:
        """Indices of the sprites with one dominant hue, which can be recolored."""
        return frozenset(i for i, image in enumerate(self.pixels) if is_single_hued(image))

    def color(self, sprite: int) -> str:
        """Returns the name in `HUES` that is nearest to the dominant hue of a sprite, given by its index."""
        if sprite not in self._colors:
            self._colors[sprite] = nearest_hue(dominant_hue(self.pixels[sprite])[0])
        return self._colors[sprite]

    def __len__(self) -> int:
        return len(self.sprites)

    def subset(self, styles: Sequence[str] = (), things: Sequence[str] = ()) -> SpriteSet:
        """Returns the sprites of some styles and things; those of ``val-concepts`` are kept for any things.

        Args:
            styles: Styles. Defaults to all.
            things: Names of things, the first of each sprite. Defaults to all.

        Raises:
            ValueError: The set has no such style or thing.
        """
        have = sorted({sprite.style for sprite in self.sprites})
        if unknown := set(styles) - set(have):
            raise ValueError(f"there is no style {sorted(unknown)[0]!r} in the sprite set: expected some of {have}")
        names = sorted({sprite.names[0] for sprite in self.sprites})
        if unknown := set(things) - set(names):
            name = sorted(unknown)[0]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"there is no thing {name!r} in the sprite set{hint}: expected some of {shown(names)}")
        chosen = [
            i
            for i, sprite in enumerate(self.sprites)
            if (not styles or sprite.style in styles)
            and (not things or sprite.names[0] in things or sprite.split == "val-concepts")
        ]
        if not chosen:
            raise ValueError(f"no sprite is of the styles {list(styles)} and the things {list(things)}")
        return SpriteSet([self.sprites[i] for i in chosen], self.pixels[chosen])

    def fingerprint(self) -> str:
        """Returns the hexadecimal SHA-256 of records and pixels."""
        digest = hashlib.sha256(self.pixels.tobytes())
        digest.update(repr(self.sprites).encode())
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: str | Path | None = None) -> SpriteSet:
        """Reads a sprite set.

        Args:
            folder: Folder with `ARCHIVE` and `INDEX`, or a folder of transparent PNG or WebP files whose names are
                the names of the things: ``red_fox.png``, or ``flat/red_fox.png`` where the sub-folder is the style.
                Defaults to the bundled set.

        Raises:
            ValueError: The folder holds neither, a file is damaged, opaque or fully transparent, its name gives no
                words, or two files show the same thing in the same style.
        """
        root = bundled_folder() if folder is None else user_path(folder, "folder of sprites")
        if (root / INDEX).is_file():
            return cls._from_archive(root)
        if not root.is_dir():
            raise ValueError(f"sprite folder {str(root)!r} does not exist")
        return cls._from_images(root)

    @classmethod
    def _from_archive(cls, root: Path) -> SpriteSet:
        lines = (root / INDEX).read_bytes().splitlines()
        sprites = [_sprite(line, f"{root / INDEX}, line {number}") for number, line in enumerate(lines, 1)]
        with _opened(root / ARCHIVE) as tar:
            images = {Path(member.name).stem: tar.extractfile(member) for member in tar if member.isfile()}
            missing = [sprite.key for sprite in sprites if images.get(sprite.key) is None]
            if missing:
                raise ValueError(f"{root / ARCHIVE} lacks the image of {missing[0]!r}: build or install it again")
            pixels = [_read(images[sprite.key], f"{root / ARCHIVE}: {sprite.key}") for sprite in sprites]
        return cls(sprites, np.stack(pixels))

    @classmethod
    def _from_images(cls, root: Path) -> SpriteSet:
        found = list(_named_images(root))
        if not found:
            raise ValueError(
                f"sprite folder {str(root)!r} holds no image: expected transparent PNG or WebP files named after "
                "what they show, such as red_fox.png, or in sub-folders named after their style"
            )
        return cls([sprite for sprite, _ in found], np.stack([pixels for _, pixels in found]))


def bundled_folder() -> Path:
    """Returns the folder of the bundled sprite set."""
    return Path(str(importlib.resources.files("dalle_zoo"))) / "_data" / BUNDLED


def _sprite(line: bytes, where: str) -> Sprite:
    """Returns the sprite that a line of the index describes."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in parse_json(line, where).items()}
    for name, kind in _KINDS.items():
        value = values.get(name, kind())
        texts = value if kind is tuple else ()
        if name in ("key", "thing", "names", "style") and name not in values:
            raise ValueError(f"{where} lacks {name}: {_AGAIN}")
        if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}: {name} has an invalid value, {shown(value)}: build or install the sprites again"
            )
    return Sprite(**{name: values[name] for name in _KINDS if name in values})


_KINDS: Mapping[str, type] = {
    "key": str, "thing": str, "names": tuple, "style": str, "keywords": tuple, "mirrored": bool, "split": str,
}  # fmt: skip
"""Types of the fields of `Sprite`."""


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged ({error}): {_AGAIN}") from None


def _read(file: Any, where: str) -> Pixels:
    """Reads the image of a sprite.

    Raises:
        ValueError: The image is damaged, opaque or fully transparent.
    """
    try:
        with Image.open(file) as image:
            rgba = image.convert("RGBA") if image.has_transparency_data else None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"sprite {where} cannot be read: {error}") from None
    if rgba is None or rgba.getchannel("A").getextrema()[0] == 255:
        raise ValueError(f"sprite {where} has no transparency: save it with a transparent background")
    if rgba.getchannel("A").getbbox() is None:
        raise ValueError(f"sprite {where} is fully transparent: save it with a visible thing")
    return _premultiplied(rgba)


def _named_images(root: Path) -> Iterator[tuple[Sprite, Pixels]]:
    for (thing, style), path in _named_files(root).items():
        key = path.relative_to(root).with_suffix("").as_posix()
        yield Sprite(key=key, thing=thing, names=(thing,), style=style), _read(path, str(path))


def _named_files(root: Path) -> dict[tuple[str, str], Path]:
    """Returns the image files of a folder by the thing and the style that they show.

    Raises:
        ValueError: A name gives no words, or two files show the same thing in the same style.
    """
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix.lower() not in _SUFFIXES or any(part.startswith(".") for part in parts):
            continue
        named = _thing_and_style(path, parts)
        if named in files:
            raise ValueError(
                f"sprites {str(files[named])!r} and {str(path)!r} show the same thing, {named[0]!r}, in the same "
                "style: remove or rename one, or put each into a sub-folder named after its style"
            )
        files[named] = path
    return files


def _thing_and_style(path: Path, parts: Sequence[str]) -> tuple[str, str]:
    """Returns the thing and the style in the name of an image file, which become captions.

    Args:
        path: The file.
        parts: Parts of its path in the folder of sprites.

    Raises:
        ValueError: The name is not UTF-8, gives no words, or has control characters.
    """
    thing = path.stem.replace("_", " ").replace("-", " ").strip().lower()
    style = " ".join(parts[:-1]).replace("_", " ").lower()
    if escape_surrogates(thing + style) != thing + style:
        raise ValueError(f"sprite {str(path)!a} has a name that is not UTF-8: rename it")
    if not thing or not all(part.strip("_- ") for part in parts[:-1]) or _CONTROL.search("".join(parts)):
        raise ValueError(
            f"sprite {str(path)!a} has a name without words or with control characters: rename it to what it shows, "
            "such as red_fox.png, or flat/red_fox.png with the style as sub-folder"
        )
    return thing, style


def _premultiplied(image: Image.Image) -> Pixels:
    """Fits an RGBA image into `SIZE` x `SIZE`, centered, as premultiplied RGBA."""
    rgba = image.convert("RGBa")
    if rgba.size != (SIZE, SIZE):
        scale = SIZE / max(rgba.size)
        size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        resized = rgba.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
        rgba = Image.new("RGBa", (SIZE, SIZE))
        rgba.paste(resized, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return np.asarray(rgba)
