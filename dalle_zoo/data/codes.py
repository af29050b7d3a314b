"""Code shards: pictures encoded once by an image tokenizer, for training the prior.

```
codes-00000.tar    000000.npy    (n, variants, h, w), uint16 or int32      chunk 0
                   000000.json   {"keys": [...], "captions": [[...], ...]}
                   000001.npy    ...                                       chunk 1
                   skipped.json  {key: reason}
manifest.json      settings, counts, SHA-256 of each shard; written last
```
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dalle_zoo.data.checks import check_caption_choice, check_positive
from dalle_zoo.data.datasets import (
    NO_CAPTION,
    CaptionedDataset,
    Item,
    crop_of,
    pick_caption,
)
from dalle_zoo.data.images import CorruptImageError
from dalle_zoo.data.ordering import seeded_rng, shuffled, stretches
from dalle_zoo.data.samples import SampleSource, Skipped
from dalle_zoo.data.transforms import TRANSFORMS, Transform

log = logging.getLogger(__name__)

# n samples, h w code grid

MANIFEST = "manifest.json"
UNFINISHED = "encoding.json"
"""Settings of an encoding under way; gone once the manifest is there."""
FORMAT = "dalle-zoo code shards 1"

Codes = npt.NDArray[np.integer[Any]]
Encode = Callable[[Tensor], Tensor]
"""Pixels in [0, 1], float32 (B, 3, size, size), to codes, integers (B, h, w)."""
_Encoded = tuple[str, Sequence[str], Tensor]
"""Key, captions, and crops (variants, 3, size, size) or codes (variants, h, w)."""


class CodeShardWriter:
    """Writes one shard aside and gives it its name when it is complete.

    Args:
        path: Name of the finished shard; until `close` the data is in a hidden file beside it.
        codebook_size: Codes lie below; up to 65,536 they are stored as uint16, else as int32.
        chunk: Samples per member. Many to a member read forty times as fast as one each.
    """

    def __init__(self, path: Path, *, codebook_size: int, chunk: int = 256) -> None:
        self.path, self.codebook_size, self.chunk = path, codebook_size, chunk
        self.dtype = np.uint16 if codebook_size <= 1 << 16 else np.int32
        self._aside = _aside(path)
        self._archive = tarfile.open(self._aside, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._pending: list[tuple[str, Sequence[str], Codes]] = []
        self._num_chunks = 0

    def add(self, key: str, captions: Sequence[str], codes: Tensor) -> None:
        """Adds a sample with codes (variants, h, w)."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers (variants, h, w), got {codes.dtype} {tuple(codes.shape)}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"codes must lie in 0..{self.codebook_size - 1} (codebook_size), got {low}..{high}")
        self._pending.append((key, captions, codes.cpu().numpy().astype(self.dtype)))
        if len(self._pending) == self.chunk:
            self._flush()

    def close(self, skipped: Mapping[str, str]) -> None:
        """Finishes the shard, with the reasons of samples that it lacks, and names it."""
        self._flush()
        self._write("skipped.json", _json_bytes(skipped))
        self._archive.close()
        _publish(self._aside, self.path)

    def discard(self) -> None:
        """Gives the shard up."""
        self._archive.close()
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        keys, captions, codes = zip(*self._pending, strict=True)
        array = io.BytesIO()
        np.save(array, np.stack(codes), allow_pickle=False)
        name = f"{self._num_chunks:06d}"
        self._write(f"{name}.npy", array.getvalue())
        self._write(f"{name}.json", _json_bytes({"keys": keys, "captions": captions}))
        self._pending.clear()
        self._num_chunks += 1

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner and time stay 0: equal data, equal bytes
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class _Encoding:
    """Everything that decides the contents of a shard."""

    source: SampleSource
    encode: Encode
    transform: Transform
    size: int
    seed: int
    variants: int
    batch_size: int

    def samples(self, start: int, stop: int, lost: dict[str, str]) -> Iterator[_Encoded]:
        """The usable ones of samples ``start .. stop - 1``, encoded; ``lost`` gets the others."""
        crops = self._crops(start, stop, lost)
        while group := list(itertools.islice(crops, max(1, self.batch_size // self.variants))):
            pixels = torch.cat([pixels for _, _, pixels in group]).float().div_(255)
            codes = torch.cat([self.encode(part) for part in torch.split(pixels, self.batch_size)])
            for (key, captions, _), own in zip(group, torch.split(codes, self.variants), strict=True):
                yield key, captions, own

    def _crops(self, start: int, stop: int, lost: dict[str, str]) -> Iterator[_Encoded]:
        for record in self.source.read(seed=None, epoch=0, start=start, stop=stop):
            try:
                if isinstance(record, Skipped):
                    raise CorruptImageError(record.reason)
                if not record.captions:
                    raise CorruptImageError(NO_CAPTION)
                crops = [
                    crop_of(record, self.transform, self.size, self.seed, variant) for variant in range(self.variants)
                ]
            except CorruptImageError as error:
                lost[record.key] = str(error)
                log.warning("skipped %s: %s", record.key, error)
            else:
                yield record.key, record.captions, torch.stack(crops)


def encode_source(
    source: SampleSource,
    encode: Encode,
    out: str | Path,
    *,
    size: int,
    info: Mapping[str, Any],
    variants: int = 1,
    seed: int = 0,
    transform: str = "prior",
    batch_size: int = 64,
    samples_per_shard: int = 16384,
    chunk: int = 256,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Encodes every captioned picture of a source into code shards.

    Variant v of a sample is the crop that training on the fly takes in epoch v. Samples without a
    caption or with a corrupt picture are left out, and named in a warning and in the manifest.
    Killed at any moment, the same call goes on behind the last complete shard and ends with the
    same files as if undisturbed.

    Args:
        source: The pictures.
        encode: The image tokenizer's ``encode``, on whatever device it likes.
        out: Folder of the shards; made if missing.
        size: Side of the crops, pixels.
        info: Plain data about the tokenizer for the manifest: ``codebook_size`` (needed), its
            name, the SHA-256 of its weights.
        variants: Crops per picture.
        seed: Seed of the crops.
        transform: Name in `TRANSFORMS`.
        batch_size: Crops that are encoded together, at most.
        samples_per_shard: Listed samples per shard.
        chunk: Samples per member of a shard.
        progress: Show a progress bar.
        overwrite: Replace the code shards that ``out`` holds.

    Returns:
        The manifest, as written to ``manifest.json``.

    Raises:
        ValueError: A bad option, a folder with other contents, or no usable sample.
    """
    check_positive(
        size=size,
        variants=variants,
        batch_size=batch_size,
        samples_per_shard=samples_per_shard,
        chunk=chunk,
    )
    codebook_size = info.get("codebook_size")
    if not isinstance(codebook_size, int):
        raise ValueError(f"info must hold codebook_size, the number of codes, got {dict(info)}")
    encoding = _Encoding(source, encode, TRANSFORMS[transform], size, seed, variants, batch_size)
    settings = {
        "format": FORMAT,
        "size": size,
        "variants": variants,
        "seed": seed,
        "transform": transform,
        "samples_per_shard": samples_per_shard,
        "chunk": chunk,
        "source": source.fingerprint(),
        "tokenizer": dict(info),
    }
    folder = Path(out)
    finished = _claim(folder, settings, overwrite)
    if finished is not None:
        return finished
    shards = []
    total = source.num_samples
    with tqdm(total=total, desc="encode", unit="picture", disable=not progress) as bar:
        for number, start in enumerate(range(0, total, samples_per_shard)):
            path = folder / f"codes-{number:05d}.tar"
            stop = min(start + samples_per_shard, total)
            if not path.exists():
                writer = CodeShardWriter(path, codebook_size=codebook_size, chunk=chunk)
                _fill(writer, encoding, start, stop, bar)
            shards.append(_describe(path))
            bar.update(stop - bar.n)
    return _finish(folder, settings, shards)


def _fill(writer: CodeShardWriter, encoding: _Encoding, start: int, stop: int, bar: tqdm[Any]) -> None:
    lost: dict[str, str] = {}
    try:
        for key, captions, codes in encoding.samples(start, stop, lost):
            writer.add(key, captions, codes)
            bar.update()
        writer.close(lost)
    except BaseException:
        writer.discard()
        raise


def _finish(folder: Path, settings: Mapping[str, Any], shards: Sequence[_Shard]) -> dict[str, Any]:
    skipped = {key: reason for shard in shards for key, reason in shard.skipped.items()}
    grids = {shard.grid for shard in shards if shard.grid is not None}
    if len(grids) != 1:
        _remove_ours(folder)
        named = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:3])
        raise ValueError(
            f"no sample of the source can be used: {named}"
            if not grids
            else f"encode must give one grid of codes for all pictures, got {sorted(grids)}"
        )
    manifest = {
        **settings,
        "count": sum(shard.samples for shard in shards),
        "grid": list(grids.pop()),
        "skipped": skipped,
        "shards": [{"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in shards],
    }
    _write_whole(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink()
    return manifest


def _claim(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Makes the folder ours, or raises.

    Returns:
        The manifest if the same encoding was killed after writing it, else None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = _read_json(folder / UNFINISHED)
    finished = _read_json(folder / MANIFEST)
    if unfinished == settings:
        if finished is not None:
            (folder / UNFINISHED).unlink()
        return finished
    if unfinished is not None and not overwrite:
        changed = [
            f"{name} was {unfinished.get(name)!r} and is {value!r} now"
            for name, value in settings.items()
            if unfinished.get(name) != value
        ]
        raise ValueError(
            f"out {str(folder)!r} holds an unfinished encoding with other settings "
            f"({'; '.join(changed)}): repeat that call, choose another folder, or overwrite"
        )
    if finished is not None and not overwrite:
        raise ValueError(f"out {str(folder)!r} holds a finished encoding: choose another folder, or overwrite")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    foreign += [MANIFEST] if finished is not None and finished.get("format") != FORMAT else []
    leftovers = any(path.name.startswith("codes-") for path in folder.iterdir())
    if foreign or (leftovers and not overwrite):
        raise ValueError(
            f"out {str(folder)!r} holds other files ({', '.join(foreign[:3]) or 'code shards'}): "
            "choose an empty folder"
        )
    _remove_ours(folder)
    _write_whole(folder / UNFINISHED, settings)
    return None


def _is_ours(path: Path) -> bool:
    name = path.name.removeprefix(".").removesuffix(".part")
    return name in (MANIFEST, UNFINISHED) or re.fullmatch(r"codes-\d{5,}\.tar", name) is not None


def _remove_ours(folder: Path) -> None:
    # The manifest first: shards without one are never taken for a finished encoding.
    ours = [path for path in folder.iterdir() if _is_ours(path)]
    for path in sorted(ours, key=lambda path: path.name != MANIFEST):
        path.unlink()


@dataclass(frozen=True)
class _Shard:
    file: str
    samples: int
    bytes: int
    sha256: str
    grid: tuple[int, int] | None
    """None if no sample of the shard was usable."""
    skipped: dict[str, str]


def _describe(path: Path) -> _Shard:
    samples, grid, skipped = 0, None, {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.name.endswith(".npy"):
                shape = np.load(io.BytesIO(_contents(archive, member)), allow_pickle=False).shape
                samples, grid = samples + shape[0], shape[2:]
            elif member.name == "skipped.json":
                skipped = json.loads(_contents(archive, member))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Shard(path.name, samples, path.stat().st_size, digest, grid, skipped)


class CodeDataset(CaptionedDataset):
    """Codes and captions from the shards of `encode_source`.

    Epoch e takes the codes of crop ``e % variants``, as `ImageTextDataset` takes its crop.

    Args:
        folder: The encoding; it must be finished.
        seed: Seed of the choice of captions.
        caption: Which of several captions: the ``first``, or a ``random`` one in each epoch.
        shuffle_buffer: Samples that the bounded shuffle holds.

    Raises:
        ValueError: No finished encoding there, or shards that do not match its manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        caption: str = "first",
        shuffle_buffer: int = 16384,
    ) -> None:
        super().__init__()
        check_positive(shuffle_buffer=shuffle_buffer)
        check_caption_choice(caption)
        self.folder, self.seed, self.caption = Path(folder), seed, caption
        self.shuffle_buffer = shuffle_buffer
        self.manifest = _read_manifest(self.folder)
        self.variants = int(self.manifest["variants"])
        self._shards = [shard for shard in self.manifest["shards"] if shard["samples"]]

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return int(self.manifest["tokenizer"]["codebook_size"])

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the codes."""
        height, width = self.manifest["grid"]
        return height, width

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self._shards)

    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Item | Skipped]:
        """As `CaptionedDataset.read`."""
        items = self._in_order(seed, epoch, start, stop)
        if seed is None:
            return items
        return shuffled(items, self.shuffle_buffer, seeded_rng("buffer", seed, epoch, start))

    def _in_order(self, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Item]:
        counts = [shard["samples"] for shard in self._shards]
        for part in stretches(counts, seed=seed, epoch=epoch, start=start, stop=stop):
            path = self.folder / self._shards[part.shard]["file"]
            for key, captions, codes in self._records(path, part.start, part.stop):
                chosen = torch.from_numpy(codes[epoch % self.variants].astype(np.int64))
                caption = pick_caption(captions, self.caption, self.seed, key, epoch)
                yield {"key": key, "codes": chosen, "caption": caption}

    def _records(self, path: Path, start: int, stop: int) -> Iterator[tuple[str, Sequence[str], Codes]]:
        chunk = self.manifest["chunk"]
        with tarfile.open(path, "r:") as archive:
            for number in range(start // chunk, -(-stop // chunk)):
                data = _contents(archive, archive.getmember(f"{number:06d}.npy"))
                codes = np.load(io.BytesIO(data), allow_pickle=False)
                names = json.loads(_contents(archive, archive.getmember(f"{number:06d}.json")))
                first = number * chunk
                for i in range(max(start - first, 0), min(stop - first, len(codes))):
                    yield names["keys"][i], names["captions"][i], codes[i]


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = _read_json(folder / MANIFEST)
    if manifest is None or manifest.get("format") != FORMAT:
        found = (
            "an encoding that is not finished: repeat the call that began it"
            if (folder / UNFINISHED).exists()
            else "pictures or other files"
            if folder.is_dir()
            else "nothing"
        )
        raise ValueError(
            f"folder {str(folder)!r} must hold code shards with their manifest.json, as "
            f"`dalle-zoo encode` writes them; it holds {found}"
        )
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"shard {str(path)!r} has {size} bytes, its manifest says {shard['bytes']}: "
                "copy the folder again, or encode again with overwrite"
            )
    return manifest


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{archive.name!r}: {member.name} is not a file: encode again")
    return file.read()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _publish(aside: Path, path: Path) -> None:
    """Renames a complete file, after its contents have reached the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def _write_whole(path: Path, data: Mapping[str, Any]) -> None:
    aside = _aside(path)
    aside.write_bytes(json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")
    _publish(aside, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()
