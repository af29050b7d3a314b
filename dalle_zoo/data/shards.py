"""WebDataset tar shards as a `SampleSource`, including the layout of img2dataset."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from dalle_zoo.data.archives import DamagedArchiveError, Member, read_members
from dalle_zoo.data.captions import MAX_CAPTION_BYTES
from dalle_zoo.data.checks import check_positive
from dalle_zoo.data.decoding import MAX_IMAGE_BYTES
from dalle_zoo.data.ordering import shuffled, stretches
from dalle_zoo.data.samples import Sample, SampleSource, Skipped, read_sample
from dalle_zoo.data.selection import CAPTION_SUFFIXES, IMAGE_SUFFIXES, is_hidden, suffix_of, valid_name
from dalle_zoo.files import try_read_json

log = logging.getLogger(__name__)

MIN_BYTES_PER_SAMPLE = 1024
"""Smallest size of a sample in an uncompressed shard: the blocks of a header and of the contents."""
MAX_COMPRESSION = 1032
"""Largest factor by which gzip compresses."""


class ShardSource(SampleSource):
    """Samples in tar files with consecutive members ``KEY.jpg``, ``KEY.txt``, ``KEY.json``.

    KEY ends at the first dot of the base name, as in WebDataset. Only members with known suffixes are read, as bytes:
    nothing is unpickled. Of several images of a sample, the first in the order of suffixes is used. Shuffling permutes
    the shards and uses a shuffle buffer.

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
        return shuffled(records, self.shuffle_buffer, seed=seed, epoch=epoch, start=start)

    def problems(self) -> Iterator[Skipped]:
        """Names the members that cannot be samples, without reading contents."""
        for path in self.paths:
            yield from (r for r in _read_shard(path, contents=False) if isinstance(r, Skipped))

    def _in_order(self, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        for stretch in stretches(self.counts, seed=seed, epoch=epoch, start=start, stop=stop):
            path, count, position = self.paths[stretch.shard], self.counts[stretch.shard], 0
            for record in _read_shard(path):
                if record.listed and position == count:
                    yield _wrong_count(path, count, "more")
                    break
                if position >= stretch.start:
                    yield record
                position += record.listed
                if position == stretch.stop and stretch.stop < count:
                    break
            else:
                if position < count:
                    yield _wrong_count(path, count, "fewer")


def _wrong_count(path: Path, count: int, relation: str) -> Skipped:
    return Skipped(
        valid_name(str(path)),
        f"the shard has {relation} samples than the {count} that the manifest.json next to it lists: remove that file",
        listed=False,
    )


@dataclass
class _Group:
    """Consecutive members of one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """By suffix."""
    repeated: str = ""
    """A suffix that occurs twice."""

    def add(self, suffix: str, member: Member) -> None:
        if suffix in self.members:
            self.repeated = suffix
        self.members.setdefault(suffix, member)

    def records(self, shard: Path) -> Iterator[Sample | Skipped]:
        key = valid_name(self.key)
        suffixes = sorted(IMAGE_SUFFIXES & self.members.keys())
        if not suffixes:
            yield Skipped(key, self._no_image(shard), listed=False)
            return
        image, texts = self.members[suffixes[0]], [self.members.get(suffix) for suffix in ("json", "txt")]
        if image.problem:
            yield Skipped(key, f"the image is {image.problem}")
        else:
            problem = next((f"the caption is {text.problem}" for text in texts if text and text.problem), "")
            json_text, plain_text = (text.data if text else None for text in texts)
            yield from read_sample(key, image.data or b"", json_text, plain_text, problem)
        if self.repeated:
            reason = f"the first is used of several members of {shard.name} with the suffix {self.repeated!r}"
            yield Skipped(f"{key} (repeated)", reason, listed=False)

    def _no_image(self, shard: Path) -> str:
        name = next((m.name for suffix, m in self.members.items() if suffix not in CAPTION_SUFFIXES), None)
        if name is None:
            return f"captions without an image next to them in {shard.name} (`tar --sort=name` orders members by name)"
        base = valid_name(PurePosixPath(name).name)
        key, _, suffix = base.partition(".")
        rule = f"a key ends at the first dot, so {base!r} has the key {key!r} and the suffix {suffix!r}"
        return f"no image in {shard.name}: {rule}"


def _read_shard(path: Path, *, contents: bool = True) -> Iterator[Sample | Skipped]:
    """Samples of one shard in stored order; damage ends up as one `Skipped` of the shard.

    Args:
        path: The shard.
        contents: Whether to read the contents. Without them, the same samples are listed. Defaults to True.
    """
    group: _Group | None = None
    damage = ""
    try:
        for member in read_members(path, _limit, contents=contents):
            key, suffix = _split(member.name)
            if group is None or group.key != key:
                if group is not None:
                    yield from group.records(path)
                group = _Group(key)
            group.add(suffix, member)
    except DamagedArchiveError as error:
        damage = str(error)
    if group is not None:
        yield from group.records(path)
    if damage:
        reason = f"the shard is damaged; its readable samples are used ({damage})"
        yield Skipped(valid_name(str(path)), reason, listed=False)


def _split(name: str) -> tuple[str, str]:
    """Splits the name of a member at the first dot of its base name: key, and suffix in lower case."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return (path.parent / stem).as_posix(), suffix.lower()


def _limit(name: str) -> int | None:
    """Largest size of a member that belongs to a sample; None for other members."""
    path = PurePosixPath(name)
    if is_hidden(path):
        return None
    limits = dict.fromkeys(IMAGE_SUFFIXES, MAX_IMAGE_BYTES) | dict.fromkeys(CAPTION_SUFFIXES, MAX_CAPTION_BYTES)
    return limits.get(suffix_of(path))


def _scan(path: Path) -> int:
    """Counts the samples of a shard by the names of its members, up to damage if there is any."""
    count, first = 0, ""
    for record in _read_shard(path, contents=False):
        count += record.listed
        if isinstance(record, Skipped):
            first = first or f": {record}"
    if not count:
        log.warning("shard %s has no sample%s", path, first)
    return count


def _manifest_counts(folder: Path) -> dict[tuple[str, int], int]:
    """Counts by (name, bytes) from ``manifest.json``, which lists ``shards`` at the top level or per split."""
    manifest = try_read_json(folder / "manifest.json") or {}
    splits = manifest.get("splits")
    parts: Iterable[Any] = [manifest, *(splits.values() if isinstance(splits, dict) else ())]
    counts = {}
    for part in parts:
        shards = part.get("shards") if isinstance(part, dict) else None
        for shard in shards if isinstance(shards, list) else ():
            values = shard if isinstance(shard, dict) else {}
            name, size, count = (values.get(key) for key in ("file", "bytes", "samples"))
            if isinstance(name, str) and type(size) is int and type(count) is int and _is_plausible(name, size, count):
                counts[name, size] = count
    return counts


def _is_plausible(name: str, size: int, count: int) -> bool:
    """Whether a shard can have this number of samples; longer lists of samples would not fit into memory."""
    largest = size * MAX_COMPRESSION if name.lower().endswith(("gz", ".tgz")) else size
    return 1 <= count <= largest // MIN_BYTES_PER_SAMPLE
