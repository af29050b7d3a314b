"""Chooses the captions from which images are generated, by seed; reads exclusion lists."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from dalle_zoo.files import atomic_write
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.choices import Choice
from dalle_zoo_eval.datasets.base import DatasetError, EvalDataset, Item

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionList:
    """Captions in the order in which images are generated.

    Example:
        >>> chosen = [CaptionList(entries=(("robin", "a robin"),), seed=seed, source="") for seed in (0, 1)]
        >>> chosen[0].sha256 == chosen[1].sha256
        True
    """

    entries: tuple[tuple[str, str], ...]
    """Pairs of the key of an item and one of its captions."""
    seed: int
    """Seed of the choice."""
    source: str
    """sha256 of the dataset."""

    @property
    def sha256(self) -> str:
        """Digest of the entries in their order; equal lists have equal digests, however they were chosen."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(_line(entry))
        return digest.hexdigest()


def choose_captions(
    dataset: EvalDataset,
    *,
    count: int | None,
    rule: Choice,
    seed: int,
    exclude: frozenset[str] = frozenset(),
    items: Sequence[Item] | None = None,
) -> CaptionList:
    """Chooses captions by seed.

    Order and choice depend on the SHA-256 of the seed and the key or caption. A list is therefore the same on every
    machine and version of Python, a shorter list is the beginning of a longer one, and leaving out some items does not
    affect the others.

    Args:
        dataset: Dataset of the captions.
        count: Number of captions; None chooses all.
        rule: ``one`` chooses one caption per item, as for MS-COCO. ``unique`` takes every distinct caption once, with
            the first item that has it, as for CUB. ``first`` takes the first caption of each item, in order.
        seed: Seed of order and choice.
        exclude: Keys of excluded items. Defaults to none.
        items: Items to choose from, in their order. Defaults to all items of the dataset.

    Raises:
        UnknownNameError: There is no such rule.
        DatasetError: There are no captions, fewer than ``count``, or no item has a key of ``exclude``.

    Example:
        >>> items = tuple(Item(key=key, image=None, captions=(f"a {key}",)) for key in ("robin", "wren", "owl"))
        >>> birds = EvalDataset(name="birds", root="birds", items=items)
        >>> two, three = (choose_captions(birds, count=count, rule="one", seed=0).entries for count in (2, 3))
        >>> two == three[:2]  # the shorter list is the beginning of the longer one
        True
    """
    if rule not in get_args(Choice):
        raise UnknownNameError(suggest("rule of caption choice", rule, get_args(Choice)))
    if count is not None and count < 1:
        raise DatasetError(f"count must be at least 1, or None for all captions, got {count}")
    check_exclusions(dataset, exclude)
    known = dataset.items if items is None else items
    items = [item for item in known if item.captions and item.key not in exclude]
    if rule == "one":
        items.sort(key=lambda item: (_rank(seed, "item", item.key), item.key))
        entries = [(item.key, _one_caption(item, seed)) for item in items]
    elif rule == "first":
        entries = [(item.key, item.captions[0]) for item in items]
    else:
        first: dict[str, str] = {}
        for item in items:
            for caption in item.captions:
                first.setdefault(caption, item.key)
        entries = [(first[caption], caption) for caption in sorted(first, key=lambda c: _rank(seed, "caption", c))]
    if not entries or (count is not None and count > len(entries)):
        wanted = "any" if count is None else str(count)
        raise DatasetError(
            f"dataset {dataset.name} in {dataset.root} has {len(entries)} captions by the rule {rule!r}, of "
            f"{len(dataset.items)} items, {len(exclude)} keys excluded and {len(dataset.skipped)} entries left "
            f"out for lack of an image or caption; expected {wanted}: complete the dataset"
        )
    return CaptionList(entries=tuple(entries[:count]), seed=seed, source=dataset.sha256())


def choose_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Chooses items by seed, as `choose_captions` does, and returns them in their order."""
    chosen = sorted(items, key=lambda item: (_rank(seed, "item", item.key), item.key))[:count]
    keys = {item.key for item in chosen}
    return [item for item in items if item.key in keys]


def _one_caption(item: Item, seed: int) -> str:
    return min(item.captions, key=lambda caption: _rank(seed, "caption", item.key, caption))


def _rank(seed: int, *parts: str) -> bytes:
    """Returns the sort key of a random order."""
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()


def check_exclusions(dataset: EvalDataset, exclude: frozenset[str]) -> None:
    """Raises `DatasetError` if no key of an exclusion list is in the dataset; warns of some unknown keys.

    Example:
        >>> item = Item(key="robin", image=None, captions=("a robin",))
        >>> birds = EvalDataset(name="birds", root="birds", items=(item,))
        >>> check_exclusions(birds, frozenset({"robin"}))
        >>> check_exclusions(birds, frozenset({"cat"}))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dalle_zoo_eval.datasets.base.DatasetError: none of the 1 excluded keys, such as 'cat', is in the dataset ...
    """
    unknown = sorted(exclude - {item.key for item in dataset.items})
    if unknown and len(unknown) == len(exclude):
        raise DatasetError(
            f"none of the {len(exclude)} excluded keys, such as {unknown[0]!r}, is in the dataset {dataset.name} "
            f"with keys such as {dataset.items[0].key!r}: this is the exclusion list of another dataset"
        )
    if unknown:
        log.warning(
            "%d of %d excluded keys, such as %r, are not in the dataset %s",
            len(unknown), len(exclude), unknown[0], dataset.name,
        )  # fmt: skip


def save_captions(captions: CaptionList, path: Path) -> None:
    """Writes a list as JSON lines, atomically: a header, and then ``[key, caption]`` for each entry.

    Example:
        >>> import tempfile
        >>> captions = CaptionList(entries=(("robin", "a robin"),), seed=0, source="")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_captions(captions, Path(folder, "captions.jsonl"))
        ...     print(Path(folder, "captions.jsonl").read_text().splitlines()[1])
        ["robin", "a robin"]
    """
    head = {
        "captions": len(captions.entries),
        "seed": captions.seed,
        "source": captions.source,
        "sha256": captions.sha256,
    }
    with atomic_write(path) as aside, aside.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        file.writelines(_line(entry) for entry in captions.entries)


def _line(entry: Sequence[str]) -> bytes:
    return json.dumps(list(entry)).encode() + b"\n"


def load_exclusions(path: Path) -> frozenset[str]:
    r"""Reads the keys of excluded items, one per line; lines that begin with ``#`` are comments.

    Raises:
        DatasetError: The file is missing, is not UTF-8, or is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "exclude.txt").write_text("# seen in training\nrobin\n")
        ...     load_exclusions(Path(folder, "exclude.txt"))
        frozenset({'robin'})
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"exclusion list {path} cannot be read: {error}") from None
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not any(lines):  # a list with only a comment is from a search that found nothing
        raise DatasetError(f"exclusion list {path} holds no key: expected one per line")
    return keys


def shuffle_concepts(concepts: Sequence[str], seed: int) -> list[int]:
    """Returns a permutation that maps every sample to a sample of another concept.

    Samples are grouped by concept, in random order. The concatenated groups are then rotated by the size of the
    largest group, so that no sample is mapped to its own concept.

    Args:
        concepts: Concept of each of B samples.
        seed: Seed of the random order.

    Returns:
        Index of another sample for each of B samples.

    Raises:
        ValueError: One concept has more than half of the samples, so no such permutation exists.

    Example:
        >>> concepts = ["cat", "dog", "cat", "owl"]
        >>> all(concepts[other] != concept for concept, other in zip(concepts, shuffle_concepts(concepts, seed=0)))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, list[int]] = {}
    for index in torch.randperm(len(concepts), generator=generator).tolist():
        groups.setdefault(concepts[index], []).append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(concepts):
        raise ValueError(
            f"captions can't be shuffled across concepts: one has {largest} of {len(concepts)} "
            "samples, at most half is possible"
        )
    order = torch.tensor([index for group in groups.values() for index in group])
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(-largest)
    found: list[int] = permutation.tolist()
    return found
