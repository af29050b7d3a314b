"""A folder tree of images and caption files as a `SampleSource`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dalle_zoo.data.captions import MAX_CAPTION_BYTES
from dalle_zoo.data.decoding import CorruptImageError, read_file, read_image
from dalle_zoo.data.samples import Sample, SampleSource, Skipped, read_sample
from dalle_zoo.data.selection import CAPTION_SUFFIXES, Selection, select, valid_name
from dalle_zoo.seeds import seeded_rng

log = logging.getLogger(__name__)


class FolderSource(SampleSource):
    """Images in a folder and its subfolders, with captions in .txt or .json files of the same name.

    The key of an image is its path relative to the folder without the suffix, so equal names in different folders
    differ. Images whose paths differ only in the suffix keep it in their keys. All samples are shuffled together.

    Args:
        root: The folder; `dalle_zoo.data.selection` says which of its files are read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "dot.ppm").write_bytes(b"P6 1 1 255 abc")
        ...     _ = Path(folder, "dot.txt").write_text("a gray dot")
        ...     [(sample.key, sample.captions) for sample in FolderSource(Path(folder)).stream()]
        [('dot', ('a gray dot',))]
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def selection(self) -> Selection:
        """The files, found once; what is ignored is logged.

        Raises:
            ValueError: The folder is an output of dalle-zoo, or has both images and shards.
        """
        selection = select(self.root)
        if selection.images and selection.shards:
            raise ValueError(
                f"folder {str(self.root)!r} has both images, such as {str(selection.images[0])!r}, and archives, such "
                f"as {str(selection.shards[0])!r}: move one kind elsewhere, or name the archives by a pattern such as "
                f"{str(self.root / '*.tar')!r}"
            )
        if selection.passed_over:
            log.warning("folder %s: %s", self.root, selection.describe())
        return selection

    @cached_property
    def images(self) -> dict[str, Path]:
        """Images by key, sorted."""
        paths = self.selection.images
        stems = Counter(path.with_suffix("") for path in paths)
        names = ((p if stems[p.with_suffix("")] > 1 else p.with_suffix("")) for p in paths)
        return {valid_name(name.as_posix()): path for name, path in zip(names, paths, strict=True)}

    @property
    def num_samples(self) -> int:
        """Number of images in the folder and its subfolders."""
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of images and captions."""
        digest = hashlib.sha256()
        for relative in self.images.values():
            texts = self._texts(relative)
            files = [relative, *(texts.get(suffix) for suffix in sorted(CAPTION_SUFFIXES))]
            sizes = [None if file is None else _size(self.root / file) for file in files]
            digest.update(json.dumps([relative.as_posix(), sizes]).encode())
        return digest.hexdigest()

    def read(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        """See `SampleSource.read`."""
        keys = list(self.images)
        if seed is not None:
            # The string is part of the seed of the shuffle: another one would change the order of every run.
            seeded_rng("pictures", seed, epoch).shuffle(keys)
        for key in keys[start + skip : stop]:
            try:
                image = read_image(self.root / self.images[key])
            except CorruptImageError as error:
                yield Skipped(key, str(error))
            else:
                yield from read_sample(key, image, *self.read_texts(self.images[key]))

    def read_texts(self, image: Path) -> tuple[bytes | None, bytes | None]:
        """Reads the .json and the .txt file of an image; None for a file that is missing or cannot be read."""
        texts = self._texts(image)
        json_text, plain_text = (self._read_text(texts.get(suffix)) for suffix in ("json", "txt"))
        return json_text, plain_text

    def _texts(self, image: Path) -> dict[str, Path]:
        return self.selection.captions.get(image.with_suffix(""), {})

    def _read_text(self, file: Path | None) -> bytes | None:
        try:
            return None if file is None else read_file(self.root / file, MAX_CAPTION_BYTES)
        except CorruptImageError:
            return None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
