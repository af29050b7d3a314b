"""Counts the words of captions in parts, on any number of processes, for the training of a text tokenizer.

```
counting.json        what is counted
counts-00000.json    the counts of 50,000 listed samples
```
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle_zoo.claims import CLAIM
from dalle_zoo.data.checks import changed_settings
from dalle_zoo.data.samples import SampleSource, usable
from dalle_zoo.files import atomic_write, read_json, try_read_json, write_json
from dalle_zoo.sharing import Share, complete_parts, remove_claims
from dalle_zoo.tokenizers.bpe import count_pieces
from dalle_zoo.tokenizers.words import MOST_WORDS, count_words, most_frequent_first
from dalle_zoo.workspaces import SUFFIX, claimed_folder

SETTINGS = "counting.json"
FORMAT = "dalle-zoo caption counts 1"
SAMPLES_PER_PART = 50_000
CAPTIONS_IN_SAMPLE = 1000
"""Captions of a part that are stored, for statistics of their length."""


@dataclass
class CaptionCounts:
    """Counts over captions; `add` merges those of another part."""

    captions: int = 0
    """Number of captions."""
    pieces: dict[str, int] = field(default_factory=dict)
    """Occurrences of each piece of `count_pieces`."""
    words: dict[str, int] | None = field(default_factory=dict)
    """Number of captions that have a word; None with more than `MOST_WORDS` words."""
    sample: list[str] = field(default_factory=list)
    """Some of the captions."""

    @classmethod
    def of(cls, captions: Sequence[str]) -> CaptionCounts:
        """Counts captions."""
        pieces, sample = dict(count_pieces(captions)), list(captions[:CAPTIONS_IN_SAMPLE])
        return cls(len(captions), pieces, count_words(captions), sample)

    def add(self, other: CaptionCounts) -> None:
        """Adds the counts of other captions."""
        self.captions += other.captions
        self.sample += other.sample
        for piece, count in other.pieces.items():
            self.pieces[piece] = self.pieces.get(piece, 0) + count
        if self.words is not None and other.words is not None:
            both = Counter(self.words) + Counter(other.words)
            self.words = most_frequent_first(both) if len(both) <= MOST_WORDS else None
        else:
            self.words = None


def count_captions(
    source: SampleSource, folder: Path | None = None, *, share: Share | None = None, progress: bool = True
) -> CaptionCounts:
    """Counts the captions of a source.

    Args:
        source: The samples.
        folder: Folder of the counts of parts, which a later call or other processes use. Defaults to None, nothing is
            written.
        share: Which parts this process begins with, if several processes make the same call. Defaults to all.
        progress: Whether to show a progress bar on a terminal. Defaults to True.

    Raises:
        ValueError: The folder has other contents, or the counts of other data.
    """
    starts = range(0, source.num_samples, SAMPLES_PER_PART)
    total = CaptionCounts()
    with tqdm(total=source.num_samples, desc="captions", disable=None if progress else True) as bar:
        if folder is None:
            for start in starts:
                total.add(_count_part(source, start))
                bar.update(min(SAMPLES_PER_PART, source.num_samples - start))
            return total
        with claimed_folder(folder, wait=True):
            _begin(folder, source)
        paths = [folder / f"counts-{part:05d}.json" for part in range(len(starts))]

        def make(part: int) -> None:
            with atomic_write(paths[part]) as temporary:
                found = asdict(_count_part(source, starts[part]))
                temporary.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")

        def done(part: int) -> None:
            bar.update(min(SAMPLES_PER_PART, source.num_samples - starts[part]))

        complete_parts(paths, make, share or Share(), done=done)
    remove_claims(folder)
    for path in paths:
        total.add(CaptionCounts(**read_json(path)))
    return total


def _count_part(source: SampleSource, start: int) -> CaptionCounts:
    records = source.read_captions(start, min(start + SAMPLES_PER_PART, source.num_samples))
    return CaptionCounts.of([text for sample in usable(records, needs_captions=True) for text in sample.captions])


def _begin(folder: Path, source: SampleSource) -> None:
    """Prepares a claimed folder, or raises `ValueError`."""
    settings: dict[str, Any] = {"format": FORMAT, "source": source.fingerprint(), "listed": source.num_samples}
    found = try_read_json(folder / SETTINGS)
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith((CLAIM, SUFFIX)))
    if found is None and names:
        raise ValueError(f"{str(folder)!r} holds other files ({', '.join(names[:3])}): choose a new folder for counts")
    if found is not None and (changed := changed_settings(found, settings)):
        raise ValueError(f"{str(folder)!r} holds the counts of other data ({changed}): choose a new folder")
    write_json(folder / SETTINGS, settings)
