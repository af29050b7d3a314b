"""WebDataset tar shards as a `SampleSource`, img2dataset's layout included."""

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
"""What reading a broken or truncated tar or gzip raises."""

_GZIP_MAGIC = b"\x1f\x8b"
_TAR_BLOCK = 512


def is_shard(path: Path) -> bool:
    """Whether the name is that of a shard; hidden files such as ``._0.tar`` are none."""
    return path.name.lower().endswith(SHARD_ENDINGS) and not path.name.startswith(".")


class ShardSource(SampleSource):
    """Samples in tar files: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` side by side.

    KEY reaches to the first dot of the base name, WebDataset's convention. Only members with the
    endings that we name are read, as bytes: nothing is ever unpickled. Shuffling is the order of
    shards plus a bounded buffer.

    Args:
        paths: The shards. Files of img2dataset beside them (``.parquet``, ``_stats.json``) are not
            needed.
        shuffle_buffer: Undecoded samples that the bounded shuffle holds.
    """

    def __init__(self, paths: Sequence[Path], *, shuffle_buffer: int = 2048) -> None:
        check_positive(shuffle_buffer=shuffle_buffer)
        self.paths = tuple(paths)
        self.shuffle_buffer = shuffle_buffer

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each shard: from the manifest beside it, or else by one scan of names."""
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
        """As `SampleSource.read`."""
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
        return True  # go on

    with _open(path) as stream:
        members = wds.tar_file_expander([{"url": str(path), "stream": stream}], handler=note, select_files=_is_wanted)
        for group in wds.group_by_keys(members, handler=note):
            yield _sample(group, path)
        if not damage:
            damage.extend(_end_is_wrong(stream))
    if damage:
        yield Skipped(str(path), f"the shard is damaged, what could be read was kept ({damage[0]})")


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES | CAPTION_SUFFIXES


def _sample(group: dict[str, Any], path: Path) -> Sample | Skipped:
    key = str(group["__key__"]).removeprefix("./")
    images = sorted(IMAGE_SUFFIXES & group.keys())
    if not images:
        return Skipped(key, f"no image beside its captions in {path.name}")
    return Sample(key, group[images[0]], read_captions(group.get("json"), group.get("txt")))


def _end_is_wrong(stream: IO[bytes]) -> Iterator[str]:
    """A complaint about what follows the last member that was found, if it is not an end of tar."""
    try:
        while block := stream.read(1 << 20):
            if any(block):
                yield "a damaged header hides the members after it"  # tarfile takes it for the end
                return
        if not isinstance(stream, gzip.GzipFile):  # which has reported a truncation by now
            stream.seek(-_TAR_BLOCK, os.SEEK_END)
            if any(stream.read()):
                yield "truncated: the end mark is missing"
    except DAMAGE as error:
        yield f"{type(error).__name__}: {error}"


def _scan(path: Path) -> int:
    """Samples of a shard by names of members; a damaged one counts as far as it can be read."""
    wds = _webdataset()

    def names() -> Iterator[dict[str, Any]]:
        # Mode "r:" seeks over the contents of the members, which is quick in a tar that is not
        # zipped.
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
        log.warning("%s is damaged, counted what can be read: %s", path, error)
    return count


def _manifest_counts(folder: Path) -> dict[tuple[str, int], int]:
    """Counts by (name, bytes) from ``manifest.json``: ``shards`` at the top or in each split."""
    manifest = try_read_json(folder / "manifest.json") or {}
    splits = manifest.get("splits")
    parts: Iterable[Any] = [manifest, *(splits.values() if isinstance(splits, dict) else ())]
    counts = {}
    for part in parts:
        for shard in part.get("shards", ()) if isinstance(part, dict) else ():
            if isinstance(shard, dict) and {"file", "bytes", "samples"} <= shard.keys():
                counts[str(shard["file"]), int(shard["bytes"])] = int(shard["samples"])
    return counts
