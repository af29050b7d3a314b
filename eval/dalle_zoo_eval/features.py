"""Extracts features of images and stores them on disk in chunks.

    image source ─► images ─► blur radii ─► extractor ─► one safetensors file per chunk and extractor
    └──────── a thread, one chunk ahead ────────┘

The last bits of the features of an image depend on the other images of its batch. Therefore all chunks have the same
number of samples, and their files are written atomically: neither an interrupted run nor the number of processes
changes a score. Process r of w begins with chunks r, r + w, ...; process 0 then computes the missing chunks that no
other process has claimed, and finally waits for the claimed ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dalle_zoo.claims import Claims
from dalle_zoo.files import atomic_write, write_json
from dalle_zoo.images import save_png
from dalle_zoo.sharing import Share
from dalle_zoo.version import __version__
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.extractors.base import Extractor, ExtractorFileError, PairExtractor, exact_float32
from dalle_zoo_eval.image_sources import EVERY, ImageBatch, ImageSource
from dalle_zoo_eval.moments import Moments
from dalle_zoo_eval.provenance import IDENTITY, PACKAGES, digest, package_versions

# B samples of a chunk, d features, c classes

SECONDS = "seconds"
"""Key, in the metadata of a chunk, of the time that its network took."""
LOADING = "loading"
"""Key of the time that generating or reading its images took, in the thread that is one chunk ahead."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The images of a chunk, prepared for the extractors."""

    batch: ImageBatch
    """The original images."""
    views: dict[str, dict[str, list[Tensor]]]
    """Prepared images by extractor and ``radius/candidates``, in one tensor per image size."""
    places: dict[str, list[list[int]]]
    """Indices of these images in the chunk by ``radius/candidates``, in one list per image size."""
    seconds: float
    """Time that generating or reading the images took."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A chunk that is being prepared in a thread."""

    chunk: int
    """Index of the chunk."""
    extractors: list[str]
    """Extractors whose features are missing; this process holds the claims for them."""
    ready: Future[Ready]
    """The prepared images."""


class FeatureStore:
    """Stores the features of an image source in chunks.

    Args:
        source: The images.
        extractors: Extractors by name.
        radii: Radii of the Gaussian blur, pixels; 0 is none.
        chunk: Number of samples per chunk.
        cache: Folder of all features. Each extractor has a folder in it, named by the digest of everything that
            determines its features. Another extractor or model can be added without computing the others again.
        device: Device of the extractors. Its type and the versions of packages are part of that digest. Defaults to
            ``cpu``.

    Raises:
        ValueError: The source has fewer than 2 samples, or ``chunk`` is less than 1.
    """

    def __init__(
        self,
        source: ImageSource,
        extractors: Mapping[str, Extractor],
        radii: Sequence[int],
        chunk: int,
        cache: Path,
        device: str = "cpu",
    ) -> None:
        if len(source) < 2:
            raise ValueError(f"at least 2 samples are needed for a covariance, got {len(source)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.source, self.extractors, self.radii, self.chunk = source, dict(extractors), tuple(radii), chunk
        self.cache, self.counts = cache, source.counts
        self.chunks = -(-len(source) // chunk)
        # The local version after a "+" names the build, which the type of the device already determines.
        versions = {n: v.partition("+")[0] for n, v in package_versions(PACKAGES).items()}
        common = {
            "source": source.identity, "radii": list(self.radii), "chunk": chunk,
            "versions": {"dalle-zoo": __version__, **versions}, "device": torch.device(device).type,
        }  # fmt: skip
        self.identities = {name: {**common, "extractor": dict(net.record)} for name, net in self.extractors.items()}
        self.folders = {name: cache / f"{name}-{digest(found)[:16]}" for name, found in self.identities.items()}

    def path(self, extractor: str, chunk: int) -> Path:
        """Returns the file of a chunk."""
        return self.folders[extractor] / f"{chunk:06d}.safetensors"

    def run(self, share: Share, *, label: str, images: Path | None = None) -> None:
        """Computes the missing chunks.

        Args:
            share: Chunks with which this process begins. When process 0 returns, all chunks are complete.
            label: Label of the progress bar.
            images: Folder for PNG files of the images, each with its caption in a text file of the same name; a
                separate thread writes them. Defaults to None, which writes no images.
        """
        for name, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDENTITY, self.identities[name])
        # Set once for both threads: the flags belong to the process and must not change while either one computes.
        with exact_float32(torch.device("cpu")):
            self._run(range(share.rank, self.chunks, share.world), label, images)
            if share.rank == 0:
                self._run(range(self.chunks), label, images)
                self._run(range(self.chunks), label, images, wait=True)

    def missing(self) -> int:
        """Returns the number of samples with missing features."""
        return sum(len(self._indices(chunk)) for chunk in range(self.chunks) if self._lacking(chunk))

    def seconds(self) -> float:
        """Returns the time that the extractors took, summed over chunks and processes."""
        return sum(self._recorded(name, SECONDS) for name in self.extractors)

    def loading_seconds(self) -> float:
        """Returns the time that generating or reading images took, which overlaps with that of the extractors."""
        return self._recorded(next(iter(self.extractors)), LOADING)

    def _recorded(self, extractor: str, what: str) -> float:
        total = 0.0
        for chunk in range(self.chunks):
            with self._opened(extractor, chunk) as file:
                total += float((file.metadata() or {}).get(what, 0))
        return total

    def _indices(self, chunk: int) -> range:
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.source)))

    def _lacking(self, chunk: int) -> list[str]:
        """Returns the extractors without features of a chunk, in one order for all processes to avoid deadlocks."""
        return [name for name in sorted(self.extractors) if not self.path(name, chunk).is_file()]

    def _unwritten(self, chunk: int, images: Path | None) -> bool:
        return images is not None and not all(_png(images, i).is_file() for i in self._indices(chunk))

    def _run(self, chunks: Sequence[int], label: str, images: Path | None, *, wait: bool = False) -> None:
        """Computes missing features; skips those claimed by other processes, or waits for them with ``wait``."""
        wanted = [chunk for chunk in chunks if self._lacking(chunk) or self._unwritten(chunk, images)]
        if not wanted:
            return
        # Two threads: one prepares the next chunk while the extractors run, the other writes PNG files.
        with (
            Claims() as claims,
            ThreadPoolExecutor(1) as ahead,
            ThreadPoolExecutor(1) as writer,
            tqdm(total=len(wanted), desc=label, unit="chunk", disable=None) as bar,
        ):
            begun = self._begin(wanted[0], images, claims, ahead, wait=wait)
            for following in [*wanted[1:], None]:
                current, begun = begun, None
                if following is not None:
                    begun = self._begin(following, images, claims, ahead, wait=wait)
                if current is not None:
                    self._finish(current, images, claims, writer)
                bar.update()

    def _begin(
        self, chunk: int, images: Path | None, claims: Claims, ahead: ThreadPoolExecutor, *, wait: bool
    ) -> Begun | None:
        """Claims the missing features of a chunk and starts preparing its images; None if there is nothing to do."""
        lacking, extractors = self._lacking(chunk), []
        for name in lacking:
            if not claims.take(self._claim(name, chunk), wait=wait):
                continue
            if self.path(name, chunk).is_file():  # another process has just finished it
                claims.release(self._claim(name, chunk))
            else:
                extractors.append(name)
        # The process with the claim also writes the images. Those still missing at the end were not requested earlier.
        writes = (wait or not lacking) and self._unwritten(chunk, images)
        if not extractors and not writes:
            return None
        return Begun(chunk=chunk, extractors=extractors, ready=ahead.submit(self._prepare, chunk, extractors))

    def _claim(self, extractor: str, chunk: int) -> Path:
        return self.path(extractor, chunk).with_suffix(".claim")

    def _prepare(self, chunk: int, extractors: Sequence[str]) -> Ready:
        start = time.perf_counter()
        batch = self.source.load(self._indices(chunk))
        seconds = time.perf_counter() - start
        views: dict[str, dict[str, list[Tensor]]] = {name: {} for name in extractors}
        places = {}
        for count, images in batch.images.items() if extractors else ():
            # The curve over candidates is computed without blur.
            radii = self.radii if count == self.counts[-1] else (0,)
            for radius, blurred in gaussian_blur(images, radii).items():
                view = f"{radius}/{count}"
                places[view] = _by_size(blurred)
                stacks = [torch.stack([blurred[i] for i in some]) for some in places[view]]
                for name in extractors:
                    views[name][view] = [self.extractors[name].prepare(stack) for stack in stacks]
        return Ready(batch=batch, views=views, places=places, seconds=seconds)

    def _finish(self, begun: Begun, images: Path | None, claims: Claims, writer: ThreadPoolExecutor) -> None:
        """Extracts and writes the features of a chunk."""
        ready = begun.ready.result()
        writing = None if images is None else writer.submit(self._write_images, ready.batch, begun.chunk, images)
        features = {name: self._extract(name, ready) for name in begun.extractors}
        if writing is not None:
            writing.result()  # PNG files first: once its features exist, a chunk is not processed again
        for name, (tensors, seconds) in features.items():
            with atomic_write(self.path(name, begun.chunk)) as aside:
                recorded = {SECONDS: f"{seconds:.6f}", LOADING: f"{ready.seconds:.6f}"}
                save_file(tensors, aside, metadata=recorded)
            claims.release(self._claim(name, begun.chunk))

    def _extract(self, name: str, ready: Ready) -> tuple[dict[str, Tensor], float]:
        """Returns the features of a chunk, named ``radius/candidates/kind``, and the time that they took, seconds."""
        start, extractor, batch = time.perf_counter(), self.extractors[name], ready.batch
        tensors = {f"chosen/{count}": torch.tensor(chosen) for count, chosen in batch.chosen.items()}
        for view, stacks in ready.views[name].items():
            parts = []
            for stack, some in zip(stacks, ready.places[view], strict=True):
                if isinstance(extractor, PairExtractor):
                    captions, others = ([texts[i] for i in some] for texts in (batch.captions, batch.others))
                    parts.append(extractor.pairs(stack, captions, others))
                else:
                    parts.append(extractor(stack))
            order = torch.tensor([i for some in ready.places[view] for i in some]).argsort()
            for kind in parts[0]:
                found = torch.cat([part[kind] for part in parts])[order]
                _check_finite(found, name, kind)
                if view == f"0/{EVERY}":
                    found = found.reshape(len(batch.captions), -1, *found.shape[1:])
                tensors[f"{view}/{kind}"] = found.contiguous()
        return tensors, time.perf_counter() - start

    def _write_images(self, batch: ImageBatch, chunk: int, folder: Path) -> None:
        images = batch.images[self.counts[-1]]
        for index, image, caption in zip(self._indices(chunk), images, batch.captions, strict=True):
            path = _png(folder, index)
            if caption:
                with atomic_write(path.with_suffix(".txt")) as aside:
                    aside.write_text(caption + "\n", encoding="utf-8")
            save_png(image, path)

    def read(self, extractor: str, name: str) -> Iterator[Tensor]:
        """Yields a tensor of every chunk, in order.

        Args:
            extractor: Name of the extractor.
            name: Name of the tensor, such as ``0/1/features`` (radius, candidates, kind).

        Raises:
            ValueError: A chunk is missing or damaged.
        """
        for chunk in range(self.chunks):
            expected = len(self._indices(chunk))
            with self._opened(extractor, chunk) as file:
                values: Tensor = file.get_tensor(name)
            if len(values) != expected:
                path = self.path(extractor, chunk)
                raise ValueError(f"{path} holds {len(values)} samples instead of {expected}: delete it and run again")
            yield values

    def kinds(self, extractor: str) -> list[str]:
        """Returns the kinds of tensors of an extractor, such as ``features`` and ``logits``."""
        with self._opened(extractor, 0) as file:
            return sorted({name.split("/", 2)[2] for name in file.keys() if name.count("/") == 2})  # noqa: SIM118

    @contextmanager
    def _opened(self, extractor: str, chunk: int) -> Iterator[Any]:
        path = self.path(extractor, chunk)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it and run again") from None

    def all(self, extractor: str, name: str) -> Tensor:
        """Returns a tensor of all samples, (n, ...); arguments and errors as in `read`."""
        return torch.cat(list(self.read(extractor, name)))

    def moments(self, extractor: str) -> Moments:
        """Mean and covariance of the features of all samples, without blur."""
        return Moments.of_parts(self.read(extractor, f"0/{self.counts[-1]}/features"))

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """Returns images of some samples, read or generated again; with several candidates, the chosen one of each."""
        return [self.source.load([index]).images[self.counts[-1]][0] for index in indices]


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _check_finite(found: Tensor, extractor: str, kind: str) -> None:
    """Raises `ExtractorFileError` for NaN and infinity, before more images are generated."""
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ExtractorFileError(
            f"the {kind} of {extractor} hold NaN or infinity: its weights are broken; give others with --network, or "
            f"leave its scores out with --leave-out {extractor}"
        )


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Returns the indices of the images of each size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    return list(groups.values())
