"""Reads the files of code shards, and checks that they hold what their manifest says: it may be of another origin."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from dalle_zoo.data.archives import DamagedArchiveError, Place, find_members
from dalle_zoo.files import FileError, parse_json, stays_inside, try_read_json

# n samples, h w code grid

MANIFEST = "manifest.json"
UNFINISHED = "encoding.json"
"""Settings of an unfinished encoding; removed after the manifest is written."""
FORMAT = "dalle-zoo code shards 1"

Codes = npt.NDArray[np.integer[Any]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a folder of code shards.

    Raises:
        ValueError: The folder has no finished encoding, the manifest does not have the expected contents, or shards
            do not match it.
    """
    manifest = try_read_json(folder / MANIFEST)
    if manifest is None or manifest.get("format") != FORMAT:
        found = (
            "an unfinished encoding: run the same command again"
            if (folder / UNFINISHED).exists()
            else "images or other files"
            if folder.is_dir()
            else "nothing"
        )
        raise ValueError(
            f"folder {str(folder)!r} must hold code shards with their manifest.json, as "
            f"`dalle-zoo encode` writes them; it holds {found}"
        )
    try:
        _check_contents(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / MANIFEST} is damaged ({reason}): copy the folder or encode again") from None
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"shard {str(path)!r} has {size} bytes, its manifest says {shard['bytes']}: "
                "copy the folder again, or encode again with overwrite"
            )
    return manifest


def _check_contents(manifest: dict[str, Any]) -> None:
    height, width = manifest["grid"]
    for name, value in {
        "variants": manifest["variants"],
        "chunk": manifest["chunk"],
        "codebook_size": manifest["tokenizer"]["codebook_size"],
        "height of the grid": height,
        "width of the grid": width,
    }.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    per_sample = manifest["variants"] * height * width * np.dtype(np.uint16).itemsize
    for shard in manifest["shards"]:
        file, samples, size = shard["file"], shard["samples"], shard["bytes"]
        if not (isinstance(file, str) and stays_inside(file) and type(samples) is int and type(size) is int):
            raise ValueError(f"shards must have file, samples and bytes, got {file!r}, {samples!r}, {size!r}")
        if samples < 0 or samples * per_sample > size:
            raise ValueError(f"{file} cannot have {samples} samples in {size} bytes")


class ChunkFile:
    """One code shard, open for reading.

    Args:
        path: The shard.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._places: dict[str, Place] = {}
        try:
            self._places.update((place.name, place) for place in find_members(self._file))
        except DamagedArchiveError:
            pass  # what cannot be found is reported for each chunk
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, number: int, shape: Sequence[int], codebook_size: int) -> tuple[list[str], list[list[str]], Codes]:
        """Reads the keys, captions and codes of a chunk.

        Args:
            number: The chunk.
            shape: Expected shape of the codes, (n, variants, h, w).
            codebook_size: Number of codes.

        Raises:
            FileError: The chunk is missing or has other contents.
        """
        codes = self._codes(f"{number:06d}.npy", tuple(shape))
        if codes.min(initial=0) < 0 or codes.max(initial=0) >= codebook_size:
            raise FileError(f"codes must be in 0..{codebook_size - 1}, got {codes.min()}..{codes.max()}")
        names = parse_json(self._contents(f"{number:06d}.json"), f"{number:06d}.json")
        keys, captions = names.get("keys"), names.get("captions")
        if not (
            _is_list(keys, len(codes)) and all(isinstance(key, str) for key in cast(list[Any], keys))
            and _is_list(captions, len(codes)) and all(map(_is_texts, cast(list[Any], captions)))
        ):  # fmt: skip
            raise FileError(f"{number:06d}.json must hold keys and captions of {len(codes)} samples")
        return cast(list[str], keys), cast(list[list[str]], captions), codes

    def _codes(self, name: str, shape: tuple[int, ...]) -> Codes:
        file = io.BytesIO(self._contents(name))
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of the format")
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # the parser of headers raises many kinds of exceptions on damaged bytes
            raise FileError(f"{name} is not an array ({error})") from None
        if found != shape or dtype.kind not in "iu" or math.prod(shape) * dtype.itemsize > len(file.getbuffer()):
            raise FileError(f"{name} must hold integers of shape {shape}, got {dtype} of shape {found}")
        return cast(Codes, np.load(io.BytesIO(file.getvalue()), allow_pickle=False))

    def _contents(self, name: str) -> bytes:
        if name not in self._places:
            raise FileError(f"there is no {name}")
        place = self._places[name]
        self._file.seek(place.offset)
        return self._file.read(place.size)


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
