"""WebDataset tar shards as a `SampleSource`, including the layout of img2dataset."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from dalle_zoo.data.checks import check_positive
from dalle_zoo.data.ordering import shuffled, stretches
from dalle_zoo.data.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Sample,
    SampleSource,
    Skipped,
    read_captions,
)
from dalle_zoo.files import try_read_json
from dalle_zoo.seeds import seeded_rng

log = logging.getLogger(__name__)

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error)
"""Exceptions raised for damaged or truncated tar and gzip files."""

_GZIP_MAGIC = b"\x1f\x8b"
_TAR_BLOCK = 512


def is_shard(path: Path) -> bool:
    """Whether a path has the name of a shard; hidden files such as ``._0.tar`` are not shards."""
    return path.name.lower().endswith(SHARD_ENDINGS) and not path.name.startswith(".")


class ShardSource(SampleSource):
    """Samples in tar files with consecutive members ``KEY.jpg``, ``KEY.txt``, ``KEY.json``.

    KEY ends at the first dot of the base name, as in WebDataset. Only members with known suffixes are read, as bytes:
    nothing is unpickled. Shuffling permutes the shards and uses a shuffle buffer.

    Args:
        paths: The shards. Other files of img2dataset (``.parquet``, ``_stats.json``) are not needed.
        shuffle_buffer: Undecoded samples in the shuffle buffer. Defaults to 2048.
    """

    def __init__(self, paths: Sequence[Path], *, shuffle_buffer: int = 2048) -> None:
        check_positive(shuffle_buffer=shuffle_buffer)
        self.paths = tuple(paths)
        self.shuffle_buffer = shuffle_buffer

    @property
    def num_samples(self) -> int:
        """Number of samples of all shards."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of samples of each shard, from the manifest in its folder, or else from the names of its members."""
        listed = {folder: _manifest_counts(folder) for folder in {p.parent for p in self.paths}}
        counts = []
        for path in self.paths:
            known = listed[path.parent].get((path.name, path.stat().st_size))
            counts.append(_scan(path) if known is None else known)
        return tuple(counts)

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the shards."""
        names = [[path.name, path.stat().st_size] for path in self.paths]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """See `SampleSource.read`."""
        records = self._in_order(seed, epoch, start, stop)
        if seed is None:
            return records
        return shuffled(records, self.shuffle_buffer, seeded_rng("buffer", seed, epoch, start))

    def _in_order(self, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        for stretch in stretches(self.counts, seed=seed, epoch=epoch, start=start, stop=stop):
            position = 0
            for record in _read_shard(self.paths[stretch.shard]):
                if position >= stretch.start:
                    yield record
                position += isinstance(record, Sample)
                if position == stretch.stop and stretch.stop < self.counts[stretch.shard]:
                    break


def _webdataset() -> ModuleType:
    try:
        from webdataset import tariterators
    except ImportError as error:
        raise ImportError("reading tar shards needs webdataset: pip install webdataset") from error
    return cast(ModuleType, tariterators)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    if zipped:
        # gzip checks sizes and checksums; tarfile's own decompression of streams lets damage pass
        # unseen.
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _read_shard(path: Path) -> Iterator[Sample | Skipped]:
    """Samples of one shard in stored order; damage ends up as one `Skipped` of the shard."""
    wds = _webdataset()
    damage: list[str] = []

    def note(error: Exception) -> bool:
        damage.append(f"{type(error).__name__}: {error.args[0] if error.args else 'damaged'}")
        return True  # continue

    with _open(path) as stream:
        members = wds.tar_file_expander([{"url": str(path), "stream": stream}], handler=note, select_files=_is_wanted)
        for group in wds.group_by_keys(members, handler=note):
            yield _sample(group, path)
        if not damage:
            damage.extend(_end_is_wrong(stream))
    if damage:
        yield Skipped(str(path), f"the shard is damaged; its readable samples are used ({damage[0]})")


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES | CAPTION_SUFFIXES


def _sample(group: dict[str, Any], path: Path) -> Sample | Skipped:
    key = str(group["__key__"]).removeprefix("./")
    images = sorted(IMAGE_SUFFIXES & group.keys())
    if not images:
        return Skipped(key, f"captions without an image in {path.name}")
    return Sample(key, group[images[0]], read_captions(group.get("json"), group.get("txt")))


def _end_is_wrong(stream: IO[bytes]) -> Iterator[str]:
    """Describes what follows the last member, if it is not the end of a tar file."""
    try:
        while block := stream.read(1 << 20):
            if any(block):
                yield "a damaged header hides the members after it"  # tarfile stops there
                return
        if not isinstance(stream, gzip.GzipFile):  # gzip reports truncation itself
            stream.seek(-_TAR_BLOCK, os.SEEK_END)
            if any(stream.read()):
                yield "truncated: the end-of-archive marker is missing"
    except DAMAGE as error:
        yield f"{type(error).__name__}: {error}"


def _scan(path: Path) -> int:
    """Counts the samples of a shard by the names of its members, up to damage if there is any."""
    wds = _webdataset()

    def names() -> Iterator[dict[str, Any]]:
        # Mode "r:" seeks over the contents of the members, which is fast in an uncompressed tar file.
        with _open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isreg() and _is_wanted(member.name):
                    yield {"fname": member.name, "data": b"", "__url__": str(path)}

    def ignore(_: Exception) -> bool:
        return True

    count = 0
    try:
        for group in wds.group_by_keys(names(), handler=ignore):
            count += isinstance(_sample(group, path), Sample)
    except DAMAGE as error:
        log.warning("%s is damaged; counting its readable samples: %s", path, error)
    return count


def _manifest_counts(folder: Path) -> dict[tuple[str, int], int]:
    """Counts by (name, bytes) from ``manifest.json``, which lists ``shards`` at the top level or per split."""
    manifest = try_read_json(folder / "manifest.json") or {}
    splits = manifest.get("splits")
    parts: Iterable[Any] = [manifest, *(splits.values() if isinstance(splits, dict) else ())]
    counts = {}
    for part in parts:
        for shard in part.get("shards", ()) if isinstance(part, dict) else ():
            if isinstance(shard, dict) and {"file", "bytes", "samples"} <= shard.keys():
                counts[str(shard["file"]), int(shard["bytes"])] = int(shard["samples"])
    return counts
