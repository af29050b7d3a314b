"""Filters a source into new shards, on any number of processes, with the same bytes for all numbers.

```
00000.tar             the samples of 10,000 listed ones that are kept, and .dropped.json {key: reason}
manifest.json         settings, counts of each filter, and the samples of each shard; written last
filtering.json        settings, until the work is finished
findings/00000.npy    likewise: the results of the first pass
findings/later.npy    likewise: whether an image file occurred before
```

Three steps of parts that processes share (`dalle_zoo.sharing`): captions and images are examined; one process finds
the files that occur again, of which the first in the order of the source is kept; the shards are written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dalle_zoo.claims import CLAIM
from dalle_zoo.data.archives import add_file
from dalle_zoo.data.checks import changed_settings, check_positive
from dalle_zoo.data.decoding import image_suffix
from dalle_zoo.data.filters import DUPLICATE, REASONS, UNREADABLE, Filters, english_detector
from dalle_zoo.data.samples import Sample, SampleSource, Skipped
from dalle_zoo.files import atomic_write, read_json, try_read_json, write_json
from dalle_zoo.sharing import Share, complete_parts, remove_claims
from dalle_zoo.workspaces import SUFFIX, claimed_folder

log = logging.getLogger(__name__)

MANIFEST, UNFINISHED, FINDINGS = "manifest.json", "filtering.json", "findings"
FORMAT = "dalle-zoo filtered shards 1"
DROPPED = ".dropped.json"
"""Member of a shard that readers of shards pass over."""
MAX_CAPTIONS = 64
"""Captions of an image that are examined; others are dropped."""

_FINDING = np.dtype([("reason", "u1"), ("captions", "u8"), ("file", "u8")])
"""Per listed sample: 0 or 1 + number of its reason; a bit per kept caption; the first bytes of the SHA-256 of the
image file. Of 250 million different files, two have the same 8 bytes with a probability of 1 in 600."""
_Findings = npt.NDArray[np.void]


def filter_source(
    source: SampleSource,
    out: str | Path,
    *,
    filters: Filters | None = None,
    samples_per_shard: int = 10_000,
    progress: bool = True,
    share: Share | None = None,
) -> dict[str, Any]:
    """Copies the samples of a source that pass the filters to new shards, with the captions that pass.

    After an interruption, the same call continues with the next part, and writes the same files as an uninterrupted
    one. A finished result is returned as it is.

    Args:
        source: The images.
        out: Folder of the shards; created if it does not exist.
        filters: Options of the filters. Defaults to the paper's filters.
        samples_per_shard: Listed samples of the source per shard. Defaults to 10,000.
        progress: Whether to show progress bars on a terminal. Defaults to True.
        share: Which parts this process begins with, if several processes make the same call; each returns when all is
            done. Defaults to all parts, and to being the only process.

    Returns:
        The content of ``manifest.json``; `kept_of` summarizes it.

    Raises:
        ClaimedError: Another process, which does not share the work, writes to the same folder.
        ValueError: An option is invalid, or the folder has other contents.
        ImportError: The package that identifies languages is not installed.

    Example:
        >>> import tempfile
        >>> from dalle_zoo.data import FolderSource
        >>> with tempfile.TemporaryDirectory() as images, tempfile.TemporaryDirectory() as out:
        ...     for key, caption in (("1", "a gray dot"), ("2", "a dot")):
        ...         _ = Path(images, f"{key}.ppm").write_bytes(b"P6 1 1 255 abc")
        ...         _ = Path(images, f"{key}.txt").write_text(caption)
        ...     filters = Filters(english=False)
        ...     manifest = filter_source(FolderSource(Path(images)), out, filters=filters, progress=False)
        ...     manifest["count"], manifest["dropped"]["caption too short"]
        (1, 1)
    """
    check_positive(samples_per_shard=samples_per_shard)
    filters, share = filters or Filters(), share or Share()
    is_english = english_detector() if filters.english else _any_language
    settings = {
        "format": FORMAT,
        "filters": asdict(filters),
        "samples_per_shard": samples_per_shard,
        "source": source.fingerprint(),
        "listed": source.num_samples,
    }
    work = _Filtering(source, Path(out).resolve(), filters, is_english, samples_per_shard)
    with claimed_folder(work.folder, wait=share.world > 1):
        finished = _begin(work.folder, settings)
        if finished is not None:
            return finished
        if share.world == 1:
            _run(work, share, progress)
            return _finish(work, settings)
    _run(work, share, progress)
    with claimed_folder(work.folder, wait=True):
        return _begin(work.folder, settings) or _finish(work, settings)


def kept_of(manifest: Mapping[str, Any]) -> str:
    """Summarizes a manifest in a line per filter."""
    dropped = [f"{count:>12,}  {reason}" for reason, count in manifest["dropped"].items()]
    return "\n".join([f"{manifest['count']:,} of {manifest['listed']:,} samples kept; dropped:", *dropped])


def _any_language(caption: str) -> bool:
    return True


@dataclass(frozen=True)
class _Filtering:
    """The work, in parts of ``size`` listed samples."""

    source: SampleSource
    folder: Path
    filters: Filters
    is_english: Callable[[str], bool]
    size: int
    starts: range = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", range(0, self.source.num_samples, self.size))

    @property
    def shards(self) -> list[Path]:
        return [self.folder / f"{part:05d}.tar" for part in range(len(self.starts))]

    @property
    def findings(self) -> list[Path]:
        return [self.folder / FINDINGS / f"{part:05d}.npy" for part in range(len(self.starts))]

    @property
    def later(self) -> Path:
        return self.folder / FINDINGS / "later.npy"

    def count(self, part: int) -> int:
        """Listed samples of a part."""
        return min(self.size, self.source.num_samples - self.starts[part])

    @property
    def finished(self) -> bool:
        """Whether another process has written the manifest, and removed the findings."""
        return (self.folder / MANIFEST).exists()

    def records(self, part: int, log_problem: Callable[[str, Skipped], None]) -> Iterator[Sample | Skipped]:
        """Reads the listed samples of a part."""
        start = self.starts[part]
        for record in self.source.read(seed=None, epoch=0, start=start, stop=start + self.count(part)):
            if isinstance(record, Skipped):
                log_problem("skipped %s", record)
            if record.listed:
                yield record

    def examine(self, part: int) -> None:
        """Stores the findings about the samples of a part; those that a damaged shard lacks count as unreadable."""
        if self.finished:
            return
        findings = np.zeros(self.count(part), _FINDING)
        findings["reason"] = _number(UNREADABLE)
        for number, record in enumerate(self.records(part, log.warning)):
            findings[number] = self._finding(record)
        with atomic_write(self.findings[part]) as temporary, temporary.open("wb") as file:
            np.save(file, findings, allow_pickle=False)

    def _finding(self, record: Sample | Skipped) -> tuple[int, int, int]:
        if isinstance(record, Skipped):
            return _number(UNREADABLE), 0, 0
        kept, reason = self.filters.captions(record.captions[:MAX_CAPTIONS], self.is_english)
        data = b"" if reason else record.image
        reason = reason or self.filters.image(data)
        if reason:
            return _number(reason), 0, 0
        digest = hashlib.sha256(data).digest()[:8] if self.filters.duplicates else bytes(8)
        return 0, sum(1 << number for number in kept), int.from_bytes(digest)

    def find_later(self) -> None:
        """Stores which of the samples that passed have the image file of an earlier one that passed."""
        if self.finished:
            return
        passes, files = [], []  # one field after the other: all findings take twice the memory
        for path in self.findings:
            findings = np.load(path, allow_pickle=False)
            passes.append(findings["reason"] == 0)
            files.append(findings["file"][passes[-1]])
        passed, digests = np.flatnonzero(np.concatenate(passes)), np.concatenate(files)
        later = np.zeros(sum(map(len, passes)), np.bool_)
        if self.filters.duplicates:
            order = digests.argsort(kind="stable")  # equal files stay in the order of the source
            same = digests[order[1:]] == digests[order[:-1]]
            later[passed[order[1:][same]]] = True
        with atomic_write(self.later) as temporary, temporary.open("wb") as file:
            np.save(file, later, allow_pickle=False)

    def reasons(self, part: int) -> tuple[_Findings, npt.NDArray[np.uint8]]:
        """Returns the findings of a part, and the reasons with duplicates among them."""
        findings = np.load(self.findings[part], allow_pickle=False)
        later = np.load(self.later, mmap_mode="r")[self.starts[part] :][: len(findings)]
        return findings, np.where(later, _number(DUPLICATE), findings["reason"]).astype(np.uint8)

    def write(self, part: int) -> None:
        """Writes the shard of a part."""
        if self.finished:
            return
        findings, reasons = self.reasons(part)
        dropped = {}
        with (
            atomic_write(self.shards[part]) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for number, record in enumerate(self.records(part, log.debug)):  # the first pass named the problems
                if isinstance(record, Skipped):
                    dropped[record.key] = record.reason
                    continue
                if reasons[number]:
                    dropped[record.key] = REASONS[int(reasons[number]) - 1]
                    continue
                name, bits = member_name(record.key), int(findings["captions"][number])
                captions = [text for bit, text in enumerate(record.captions[:MAX_CAPTIONS]) if bits >> bit & 1]
                add_file(archive, f"{name}.{image_suffix(record.image)}", record.image)
                add_file(archive, f"{name}.json", _json_bytes({"captions": captions}))
            add_file(archive, DROPPED, _json_bytes(dropped))


def member_name(key: str) -> str:
    """Returns the name of a sample's members without their suffix, which begins at the first dot of the base name.

    Example:
        >>> [member_name(key) for key in ("a/0001", "a.b/scan.v2", "100%.x")]
        ['a/0001', 'a.b/scan%2Ev2', '100%25%2Ex']
    """
    path = PurePosixPath(key)
    if "." not in path.name:
        return key
    return path.with_name(path.name.replace("%", "%25").replace(".", "%2E")).as_posix()


def _number(reason: str) -> int:
    return REASONS.index(reason) + 1


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _run(work: _Filtering, share: Share, progress: bool) -> None:
    (work.folder / FINDINGS).mkdir(exist_ok=True)
    with _bar(work, "examine", progress) as done:
        complete_parts(work.findings, work.examine, share, done=done)
    complete_parts([work.later], lambda part: work.find_later(), share)
    with _bar(work, "write", progress) as done:
        complete_parts(work.shards, work.write, share, done=done)


@contextmanager
def _bar(work: _Filtering, label: str, progress: bool) -> Iterator[Callable[[int], None]]:
    total = work.source.num_samples
    with tqdm(total=total, desc=label, unit="sample", disable=None if progress else True) as bar:

        def done(part: int) -> None:
            bar.update(work.count(part))

        yield done


def _begin(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Prepares a claimed folder, or raises `ValueError`; returns the manifest if the work is finished."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith((CLAIM, SUFFIX))}
    unfinished, finished = try_read_json(folder / UNFINISHED), try_read_json(folder / MANIFEST)
    found = unfinished or finished
    if not names:
        write_json(folder / UNFINISHED, settings)
        return None
    if found is None or found.get("format") != FORMAT:
        raise ValueError(
            f"out {str(folder)!r} holds other files ({', '.join(sorted(names)[:3])}): choose a new folder"
        )
    if changed := changed_settings(found, settings):
        raise ValueError(
            f"out {str(folder)!r} holds the result of other settings ({changed}): use those settings, or choose a new "
            "folder"
        )
    if finished is not None:
        _end(folder)
    return finished


def _finish(work: _Filtering, settings: Mapping[str, Any]) -> dict[str, Any]:
    remove_claims(work.folder)
    counts, shards = np.zeros(len(REASONS) + 1, int), []
    for part, path in enumerate(work.shards):
        own = np.bincount(work.reasons(part)[1], minlength=len(counts))
        if own[0]:
            shards.append({"file": path.name, "bytes": path.stat().st_size, "samples": int(own[0])})
        counts += own
    manifest = {
        **settings,
        "count": int(counts[0]),
        "dropped": dict(zip(REASONS, counts[1:].tolist(), strict=True)),
        "shards": shards,
    }
    write_json(work.folder / MANIFEST, manifest)
    _end(work.folder)
    return manifest


def _end(folder: Path) -> None:
    """Removes what only unfinished work needs, and shards without samples."""
    listed = {shard["file"] for shard in read_json(folder / MANIFEST)["shards"]}
    for path in folder.glob("*.tar"):
        if path.name not in listed:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / FINDINGS, ignore_errors=True)
    (folder / UNFINISHED).unlink(missing_ok=True)
