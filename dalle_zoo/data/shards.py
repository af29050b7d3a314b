"""WebDataset tar shards as a `SampleSource`, including the layout of img2dataset."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from dalle_zoo.data.archives import DamagedArchiveError, Member, read_members
from dalle_zoo.data.captions import MAX_CAPTION_BYTES
from dalle_zoo.data.checks import check_positive
from dalle_zoo.data.decoding import MAX_IMAGE_BYTES
from dalle_zoo.data.ordering import Order, Stretch, in_order, stretches
from dalle_zoo.data.remote import RemotePath
from dalle_zoo.data.samples import Sample, SampleSource, Skipped, read_sample
from dalle_zoo.data.selection import CAPTION_SUFFIXES, IMAGE_SUFFIXES, is_hidden, suffix_of, valid_name
from dalle_zoo.files import try_read_json

log = logging.getLogger(__name__)

MIN_BYTES_PER_SAMPLE = 1024
"""Smallest size of a sample in an uncompressed shard: the blocks of a header and of the contents."""
MAX_COMPRESSION = 1032
"""Largest factor by which gzip compresses."""

ShardPath = Path | RemotePath
MANIFEST = "manifest.json"
"""File next to shards that lists the numbers of their samples."""
BAR_DELAY = 3.0
"""Seconds of counting after which there is a progress bar."""


def _all(_: object) -> bool:
    return True


def _none(_: object) -> bool:
    return False


def _is_caption(name: str) -> bool:
    return suffix_of(PurePosixPath(name)) in CAPTION_SUFFIXES


def _wants(order: Order, first: int, number: int) -> bool:
    return order.wants(first + number)


class ShardSource(SampleSource):
    """Samples in tar files with consecutive members ``KEY.jpg``, ``KEY.txt``, ``KEY.json``.

    KEY ends at the first dot of the base name, as in WebDataset. Only members with known suffixes are read, as bytes:
    nothing is unpickled. Of several images of a sample, the first in the order of suffixes is used. Shuffling permutes
    the shards and uses a shuffle buffer.

    Args:
        paths: The shards. Other files of img2dataset (``.parquet``, ``_stats.json``) are not needed.
        shuffle_buffer: Undecoded samples in the shuffle buffer. Defaults to 2048.
        processes: Number of processes that count the samples of shards without a manifest. Defaults to 1.

    Example:
        >>> import tarfile, tempfile
        >>> from dalle_zoo.data.archives import add_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(Path(folder, "0.tar"), "w") as shard:
        ...         add_file(shard, "dot.ppm", b"P6 1 1 255 abc")
        ...         add_file(shard, "dot.txt", b"a gray dot")
        ...     [(sample.key, sample.captions) for sample in ShardSource([Path(folder, "0.tar")]).stream()]
        [('dot', ('a gray dot',))]
    """

    def __init__(self, paths: Sequence[ShardPath], *, shuffle_buffer: int = 2048, processes: int = 1) -> None:
        check_positive(shuffle_buffer=shuffle_buffer, processes=processes)
        self.paths = tuple(paths)
        self.shuffle_buffer, self.processes = shuffle_buffer, processes

    @property
    def num_samples(self) -> int:
        """Number of samples of all shards."""
        return sum(self.counts)

    @cached_property
    def _listed(self) -> list[tuple[int, int] | None]:
        """Bytes and samples of each shard, if a manifest in its folder states them."""
        listed = {folder: listed_counts(folder) for folder in {p.parent for p in self.paths}}
        return [listed[path.parent].get(path.name) for path in self.paths]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each shard. Those of remote ones come from a manifest, if there is one: asking for each takes long.

        Raises:
            OSError: A shard does not exist, or cannot be reached.
        """
        return tuple(
            listed[0] if listed and isinstance(path, RemotePath) else path.stat().st_size
            for path, listed in zip(self.paths, self._listed, strict=True)
        )

    @property
    def is_listed(self) -> bool:
        """Whether manifests state the samples of all shards."""
        return all(listed and listed[0] == size for listed, size in zip(self._listed, self.sizes, strict=True))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of samples of each shard, from the manifest in its folder, or else from the names of its members."""
        if self.processes == 1:
            return self._count(map)
        with ProcessPoolExecutor(self.processes, get_context("spawn")) as pool:
            return self._count(pool.map)

    def _count(self, apply: Callable[[Callable[[ShardPath], int], list[ShardPath]], Iterable[int]]) -> tuple[int, ...]:
        stated = [
            listed[1] if listed and listed[0] == size else None
            for listed, size in zip(self._listed, self.sizes, strict=True)
        ]
        unknown = [path for path, count in zip(self.paths, stated, strict=True) if count is None]
        # Over a second per 10,000 samples.
        found = tqdm(apply(_scan, unknown), "counting", len(unknown), unit="shard", delay=BAR_DELAY, disable=None)
        counted = dict(zip(unknown, found, strict=True))
        return tuple(counted[path] if count is None else count for path, count in zip(self.paths, stated, strict=True))

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of the shards."""
        names = [[path.name, size] for path, size in zip(self.paths, self.sizes, strict=True)]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def read(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        """See `SampleSource.read`."""
        parts = list(stretches(self.counts, seed=seed, epoch=epoch, start=start, stop=stop))
        order = Order(
            sum(map(len, parts)), seed=seed, epoch=epoch, start=start, buffer_size=self.shuffle_buffer, skip=skip
        )
        return in_order(order, self._placed(parts, order))

    def read_captions(self, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """See `SampleSource.read_captions`; the contents of images are not read."""
        parts = list(stretches(self.counts, seed=None, epoch=0, start=start, stop=stop))
        order = Order(sum(map(len, parts)))
        return in_order(order, self._placed(parts, order, _is_caption))

    def problems(self) -> Iterator[Skipped]:
        """Names the members that cannot be samples, without reading contents."""
        for path in self.paths:
            yield from (r for r in _read_shard(path, wanted=_none) if isinstance(r, Skipped))

    def _placed(
        self, parts: Iterable[Stretch], order: Order, members: Callable[[str], bool] = _all
    ) -> Iterator[tuple[int | None, Sample | Skipped]]:
        """Reads what an order wants of some stretches, with the position in all of them together."""
        first = 0
        for part in parts:
            if order.wants_any(first, first + len(part)):
                for position, record in self._read_part(part, partial(_wants, order, first), members):
                    yield None if position is None else first + position, record
            first += len(part)

    def _read_part(
        self, part: Stretch, wants: Callable[[int], bool], members: Callable[[str], bool]
    ) -> Iterator[tuple[int | None, Sample | Skipped]]:
        """Reads the wanted samples of a stretch, each of which is yielded, whatever is left of the shard."""
        path, count, position = self.paths[part.shard], self.counts[part.shard], 0

        def wanted(position: int) -> bool:
            return part.start <= position < part.stop and wants(position - part.start)

        def lost(problem: Skipped) -> Iterator[tuple[int | None, Sample | Skipped]]:
            yield None, problem
            for number in filter(wanted, range(max(position, part.start), part.stop)):
                yield number - part.start, replace(problem, listed=True)

        if change := _change(path, self.sizes[part.shard]):
            yield from lost(Skipped(valid_name(str(path)), change, listed=False))
            return
        for record in _read_shard(path, wanted=wanted, members=members):
            if record.listed and position == count:
                yield None, _wrong_count(path, count, "more")
                break
            if not record.listed:
                if position >= part.start:
                    yield None, record
                continue
            if wanted(position):
                yield position - part.start, record
            position += 1
            if position == part.stop and part.stop < count:
                break
        else:
            if position < count:
                yield from lost(_wrong_count(path, count, "fewer"))


def _change(path: ShardPath, size: int) -> str:
    """Says how a shard has changed since it was listed; ``""`` if it has not."""
    try:
        now = path.stat().st_size
    except OSError as error:
        return f"the shard has vanished or cannot be reached ({error.strerror or error})"
    return "" if now == size else f"the shard has changed: it has {now} bytes, and {size} when it was listed"


def _wrong_count(path: ShardPath, count: int, relation: str) -> Skipped:
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

    @property
    def listed(self) -> bool:
        """Whether the members are a sample, even one that cannot be read: whether there is an image."""
        return not IMAGE_SUFFIXES.isdisjoint(self.members)

    def add(self, suffix: str, member: Member) -> None:
        if suffix in self.members:
            self.repeated = suffix
        self.members.setdefault(suffix, member)

    def records(self, shard: ShardPath) -> Iterator[Sample | Skipped]:
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

    def _no_image(self, shard: ShardPath) -> str:
        name = next((m.name for suffix, m in self.members.items() if suffix not in CAPTION_SUFFIXES), None)
        if name is None:
            return f"captions without an image next to them in {shard.name} (`tar --sort=name` orders members by name)"
        base = valid_name(PurePosixPath(name).name)
        key, _, suffix = base.partition(".")
        rule = f"a key ends at the first dot, so {base!r} has the key {key!r} and the suffix {suffix!r}"
        return f"no image in {shard.name}: {rule}"


def _read_shard(
    path: ShardPath, *, wanted: Callable[[int], bool] = _all, members: Callable[[str], bool] = _all
) -> Iterator[Sample | Skipped]:
    """Samples of one shard in stored order; damage ends up as one `Skipped` of the shard.

    Args:
        path: The shard.
        wanted: Function of the position of a sample that returns whether to read its contents. Without them, the same
            samples are listed. Defaults to reading all.
        members: Function of a member's name that returns likewise. Defaults to reading all.
    """
    group: _Group | None = None
    position = 0  # of the group
    damage = ""

    def contents(name: str) -> bool:
        begins = group is not None and group.key != _split(name)[0]
        return members(name) and wanted(position + (begins and group.listed))  # type: ignore[union-attr]

    try:
        for member in read_members(path, _limit, contents=contents):
            key, suffix = _split(member.name)
            if group is None or group.key != key:
                if group is not None:
                    yield from group.records(path)
                    position += group.listed
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
    suffix = suffix_of(path)
    if suffix in IMAGE_SUFFIXES:
        return MAX_IMAGE_BYTES
    return MAX_CAPTION_BYTES if suffix in CAPTION_SUFFIXES else None


def _scan(path: ShardPath) -> int:
    """Counts the samples of a shard by the names of its members, up to damage if there is any."""
    count, first = 0, ""
    for record in _read_shard(path, wanted=_none):
        count += record.listed
        if isinstance(record, Skipped):
            first = first or f": {record}"
    if not count:
        log.warning("shard %s has no sample%s", path, first)
    return count


def listed_counts(folder: ShardPath) -> dict[str, tuple[int, int]]:
    """Bytes and samples of shards by their names.

    They are those of ``manifest.json``, which lists ``shards`` at the top level or per split.
    """
    manifest = try_read_json(folder / MANIFEST) or {}
    splits = manifest.get("splits")
    parts: Iterable[Any] = [manifest, *(splits.values() if isinstance(splits, dict) else ())]
    counts = {}
    for part in parts:
        shards = part.get("shards") if isinstance(part, dict) else None
        for shard in shards if isinstance(shards, list) else ():
            values = shard if isinstance(shard, dict) else {}
            name, size, count = (values.get(key) for key in ("file", "bytes", "samples"))
            if isinstance(name, str) and type(size) is int and type(count) is int and _is_plausible(name, size, count):
                counts[name] = size, count
    return counts


def _is_plausible(name: str, size: int, count: int) -> bool:
    """Whether a shard can have this number of samples; longer lists of samples would not fit into memory."""
    largest = size * MAX_COMPRESSION if name.lower().endswith(("gz", ".tgz")) else size
    return 1 <= count <= largest // MIN_BYTES_PER_SAMPLE
