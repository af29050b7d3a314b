"""Code shards: images encoded once by an image tokenizer, for training the prior.

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
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dalle_zoo.data.archives import add_file
from dalle_zoo.data.captions import valid_captions
from dalle_zoo.data.checks import check_caption_choice, check_positive
from dalle_zoo.data.code_files import ChunkFile, Codes, read_manifest
from dalle_zoo.data.datasets import CaptionedDataset, Item, pick_caption
from dalle_zoo.data.ordering import Order, Stretch, in_order, stretches
from dalle_zoo.data.samples import Skipped
from dalle_zoo.files import FileError

# n samples, h w code grid


class CodeRecord(NamedTuple):
    """One crop of a sample, as it is stored."""

    key: str
    captions: Sequence[str]
    codes: Codes
    """(h, w)."""


class CodeShardWriter:
    """Writes one shard; an error in the ``with`` block leaves it incomplete.

    Args:
        path: File to write. Within `dalle_zoo.files.atomic_write`, the shard appears when it is complete.
        codebook_size: Number of codes; up to 65,536 they are stored as uint16, else as int32.
        chunk: Samples per member. Large members are read forty times as fast as members of one sample. Defaults to
            256.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with CodeShardWriter(Path(folder, "codes.tar"), codebook_size=16) as writer:
        ...         writer.add("robin", ["a robin"], torch.tensor([[[3, 5], [0, 15]]]))
        ...         writer.finish({"wren": "no caption"})
        ...     with tarfile.open(Path(folder, "codes.tar")) as shard:
        ...         print(*shard.getnames())
        000000.npy 000000.json skipped.json
    """

    def __init__(self, path: Path, *, codebook_size: int, chunk: int = 256) -> None:
        self.codebook_size, self.chunk = codebook_size, chunk
        self.dtype = np.uint16 if codebook_size <= 1 << 16 else np.int32
        self._archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._pending: list[tuple[str, Sequence[str], Codes]] = []
        self._num_chunks = 0

    def add(self, key: str, captions: Sequence[str], codes: Tensor) -> None:
        """Adds a sample with codes (variants, h, w)."""
        if codes.ndim != 3 or codes.is_floating_point():
            raise ValueError(f"codes must be integers (variants, h, w), got {codes.dtype} {tuple(codes.shape)}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(f"codes must be in 0..{self.codebook_size - 1} (codebook_size), got {low}..{high}")
        self._pending.append((key, captions, codes.cpu().numpy().astype(self.dtype)))
        if len(self._pending) == self.chunk:
            self._flush()

    def finish(self, skipped: Mapping[str, str]) -> None:
        """Writes the remaining samples.

        Args:
            skipped: Reasons for missing samples, by key.
        """
        self._flush()
        add_file(self._archive, "skipped.json", _json_bytes(skipped))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        keys, captions, codes = zip(*self._pending, strict=True)
        array = io.BytesIO()
        np.save(array, np.stack(codes), allow_pickle=False)
        name = f"{self._num_chunks:06d}"
        add_file(self._archive, f"{name}.npy", array.getvalue())
        add_file(self._archive, f"{name}.json", _json_bytes({"keys": keys, "captions": captions}))
        self._pending.clear()
        self._num_chunks += 1


class CodeDataset(CaptionedDataset):
    """Codes and captions from the shards of `encode_source`.

    Epoch e uses the codes of crop ``e % variants``, like `ImageTextDataset`.

    Args:
        folder: Folder of a finished encoding.
        seed: Seed of the choice of captions.
        caption: Which of several captions to use: the ``first``, or a ``random`` one in each epoch.
        shuffle_buffer: Samples in the shuffle buffer.

    Raises:
        ValueError: The folder has no finished encoding, or shards that do not match its manifest.
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
        self.manifest = read_manifest(self.folder)
        self.variants = int(self.manifest["variants"])
        self._shards = [shard for shard in self.manifest["shards"] if shard["samples"]]

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return int(self.manifest["tokenizer"]["codebook_size"])

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        height, width = self.manifest["grid"]
        return height, width

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self._shards)

    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which has the digest of every shard."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def records(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[CodeRecord | Skipped]:
        """See `CaptionedDataset.records`."""
        counts = [shard["samples"] for shard in self._shards]
        parts = list(stretches(counts, seed=seed, epoch=epoch, start=start, stop=stop))
        order = Order(
            sum(map(len, parts)), seed=seed, epoch=epoch, start=start, buffer_size=self.shuffle_buffer, skip=skip
        )
        # Shuffled as stored, in a quarter of the memory of int64.
        return in_order(order, self._placed(parts, order, epoch % self.variants))

    def item(self, record: CodeRecord, epoch: int) -> Item:
        """See `CaptionedDataset.item`."""
        caption = pick_caption(record.captions, self.caption, self.seed, record.key, epoch)
        codes = torch.from_numpy(record.codes.astype(np.int64))
        return {"key": record.key, "codes": codes, "caption": caption}

    def _placed(
        self, parts: Iterable[Stretch], order: Order, variant: int
    ) -> Iterator[tuple[int, CodeRecord | Skipped]]:
        """Reads what an order wants of some stretches, with the position in all of them together."""
        first = 0
        for part in parts:
            shard, offset = self._shards[part.shard], first - part.start
            if order.wants_any(first, first + len(part)):
                with ChunkFile(self.folder / shard["file"]) as chunks:
                    for number, samples in self._chunks(part, offset, order):
                        records = self._records(chunks, shard, number, samples, variant)
                        yield from ((offset + sample, record) for sample, record in records)
            first += len(part)

    def _chunks(self, part: Stretch, offset: int, order: Order) -> Iterator[tuple[int, list[int]]]:
        """The chunks of a stretch, each with the samples of the shard that are wanted of it, if there are any."""
        chunk = self.manifest["chunk"]
        for number in range(part.start // chunk, -(-part.stop // chunk)):
            start, stop = max(part.start, number * chunk), min(part.stop, (number + 1) * chunk)
            if order.wants_any(offset + start, offset + stop):
                yield number, [sample for sample in range(start, stop) if order.wants(offset + sample)]

    def _records(
        self, chunks: ChunkFile, shard: Mapping[str, Any], number: int, samples: Sequence[int], variant: int
    ) -> Iterator[tuple[int, CodeRecord | Skipped]]:
        """Reads samples of one chunk."""
        first = number * self.manifest["chunk"]
        shape = min(self.manifest["chunk"], shard["samples"] - first), self.variants, *self.grid
        try:
            keys, captions, codes = chunks.read(number, shape, self.codebook_size)
        except FileError as error:
            lost = Skipped(f"{self.folder / shard['file']}, chunk {number}", str(error))
            yield from ((sample, lost) for sample in samples)
            return
        for sample in samples:
            key, (texts, invalid) = keys[sample - first], valid_captions(captions[sample - first])
            if invalid and not texts:
                yield sample, Skipped(key, invalid)
                continue
            # A copy, since a record in the shuffle buffer would keep its whole chunk in memory.
            yield sample, CodeRecord(key, texts, codes[sample - first, variant].copy())


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Reads a member of an archive."""
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{archive.name!r}: {member.name} is not a file: encode again")
    return file.read()


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()
