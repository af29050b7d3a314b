"""Which captions are sampled from: a list fixed by a seed, pinned by its sha256."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dalle_zoo.files import atomic_write
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.benchmarks.base import Benchmark, BenchmarkError, Item
from dalle_zoo_eval.protocol import Choice

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionList:
    """Captions in the order in which images are generated from them."""

    entries: tuple[tuple[str, str], ...]
    """Key of an item, and one of its captions."""
    seed: int
    """Seed of the choice."""
    source: str
    """sha256 of the benchmark."""

    @property
    def sha256(self) -> str:
        """Digest of the entries in their order: equal lists have equal ones, however they came about."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(_line(entry))
        return digest.hexdigest()


def choose_captions(
    benchmark: Benchmark, *, count: int | None, rule: Choice, seed: int, exclude: frozenset[str] = frozenset()
) -> CaptionList:
    """Chooses captions by seed.

    Order and choice come from SHA-256 of the seed and the key or caption itself. So a list is the same on every
    machine and version of Python, a shorter one is the beginning of a longer one, and leaving out some items changes
    nothing of the others.

    Args:
        benchmark: What to choose from.
        count: Captions to choose; None chooses all there are.
        rule: ``one`` caption an item, sampled among its own, as for MS-COCO; or ``unique``, every different caption
            once, with the first item that has it, as for CUB.
        seed: Seed of order and choice.
        exclude: Keys of items to leave out.

    Raises:
        UnknownNameError: Another rule.
        BenchmarkError: There are fewer captions than ``count``, none at all, or none of the keys of ``exclude``.
    """
    if rule not in get_args(Choice):
        raise UnknownNameError(suggest("rule of caption choice", rule, get_args(Choice)))
    if count is not None and count < 1:
        raise BenchmarkError(f"count must be at least 1, or None for all captions, got {count}")
    check_exclusions(benchmark, exclude)
    items = [item for item in benchmark.items if item.captions and item.key not in exclude]
    if rule == "one":
        items.sort(key=lambda item: (_rank(seed, "item", item.key), item.key))
        entries = [(item.key, _one_caption(item, seed)) for item in items]
    else:
        first: dict[str, str] = {}
        for item in items:
            for caption in item.captions:
                first.setdefault(caption, item.key)
        entries = [(first[caption], caption) for caption in sorted(first, key=lambda c: _rank(seed, "caption", c))]
    if not entries or (count is not None and count > len(entries)):
        wanted = "any" if count is None else str(count)
        raise BenchmarkError(
            f"benchmark {benchmark.name} in {benchmark.root} has {len(entries)} captions by the rule {rule!r}, of "
            f"{len(benchmark.items)} items, {len(exclude)} keys excluded and {len(benchmark.skipped)} entries left "
            f"out for lack of an image or caption; expected {wanted}: complete the data set"
        )
    return CaptionList(entries=tuple(entries[:count]), seed=seed, source=benchmark.sha256())


def _one_caption(item: Item, seed: int) -> str:
    return min(item.captions, key=lambda caption: _rank(seed, "caption", item.key, caption))


def _rank(seed: int, *parts: str) -> bytes:
    """Place in a random order."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()


def check_exclusions(benchmark: Benchmark, exclude: frozenset[str]) -> None:
    """Raises `BenchmarkError` if a list of exclusions is that of another data set; warns of single unknown keys."""
    unknown = sorted(exclude - {item.key for item in benchmark.items})
    if unknown and len(unknown) == len(exclude):
        raise BenchmarkError(
            f"none of the {len(exclude)} excluded keys, such as {unknown[0]!r}, is in the benchmark {benchmark.name} "
            f"with keys such as {benchmark.items[0].key!r}: this is the exclusion list of another data set"
        )
    if unknown:
        log.warning(
            "%d of %d excluded keys, such as %r, are not in the benchmark %s",
            len(unknown), len(exclude), unknown[0], benchmark.name,
        )  # fmt: skip


def save_captions(captions: CaptionList, path: Path) -> None:
    """Writes a list as JSON lines, atomically: first what it is, then ``[key, caption]`` each."""
    head = {
        "captions": len(captions.entries),
        "seed": captions.seed,
        "source": captions.source,
        "sha256": captions.sha256,
    }
    with atomic_write(path) as aside, aside.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.writelines(_line(entry) for entry in captions.entries)


def load_captions(path: Path) -> CaptionList:
    """Reads what `save_captions` wrote.

    Raises:
        BenchmarkError: The file is missing, is something else, or was changed or truncated.
    """
    try:
        head, *lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        entries = tuple((str(key), str(caption)) for key, caption in lines)
        captions = CaptionList(entries=entries, seed=int(head["seed"]), source=str(head["source"]))
        pinned, count = head["sha256"], head["captions"]
    except FileNotFoundError:
        raise BenchmarkError(f"caption list {path} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchmarkError(f"{path} is no caption list of dalle-zoo, or is truncated ({error})") from None
    if captions.sha256 != pinned:
        raise BenchmarkError(
            f"{path} was changed or truncated: expected {count} captions with the sha256 {pinned}, got {len(entries)} "
            f"with {captions.sha256}"
        )
    return captions


def _line(entry: Sequence[str]) -> bytes:
    return json.dumps(list(entry)).encode() + b"\n"


def load_exclusions(path: Path) -> frozenset[str]:
    """Keys of items to leave out, one per line; lines that begin with ``#`` are comments.

    Raises:
        BenchmarkError: The file is missing, is not UTF-8, or holds neither a key nor a comment.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"exclusion list {path} cannot be read: {error}") from None
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not any(lines):  # a comment alone is the list of a search that found nothing
        raise BenchmarkError(f"exclusion list {path} holds no key: expected one per line")
    return keys
