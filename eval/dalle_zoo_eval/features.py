"""From images to features on disk, in chunks that are complete or absent.

    image source ─► images ─► blur radii ─► extractor ─► one safetensors file per chunk and extractor
    └──────── a thread, one chunk ahead ────────┘

A chunk has a fixed number of samples, because the features of an image depend, in the last bits, on the other images
of its batch. So neither a kill nor the number of processes changes a number. Process r of w begins with chunks r,
r + w, ...; process 0 then does what is missing and nobody has claimed, and finally waits for what others have.
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
from dalle_zoo.version import __version__
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.extractors.base import Extractor, ExtractorFileError, PairExtractor, exact_float32
from dalle_zoo_eval.image_sources import EVERY, ImageBatch, ImageSource
from dalle_zoo_eval.provenance import IDENTITY, PACKAGES, digest, package_versions

# B samples of a chunk, d features, c classes

SECONDS = "seconds"
"""Name, in the metadata of a chunk, of the time that its network took."""
LOADING = "loading"
"""Likewise of the time in which its images were generated or read, by the thread that is one chunk ahead."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which chunks a process begins with."""

    rank: int = 0
    """Number of the process."""
    world: int = 1
    """Processes in all."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in 0..{self.world - 1}, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The images of a chunk, prepared for the extractors."""

    batch: ImageBatch
    """The images themselves."""
    views: dict[str, dict[str, list[Tensor]]]
    """For every extractor and every ``radius/candidates`` the prepared images, those of one size together."""
    places: dict[str, list[list[int]]]
    """For every ``radius/candidates`` the places of these images in the chunk."""
    seconds: float
    """Time in which the images were generated or read."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A chunk that a thread prepares."""

    chunk: int
    """Its number."""
    extractors: list[str]
    """Extractors whose features are missing; this process has claimed it for them."""
    ready: Future[Ready]
    """Its images."""


class FeatureStore:
    """Features of an image source, chunk by chunk.

    Args:
        source: The images.
        extractors: Extractors by name.
        radii: Radii of the Gaussian blur, pixels; 0 is none.
        chunk: Samples of a chunk.
        cache: Folder of all features. Each extractor has a folder there, named by the digest of what fixes its
            numbers, so that another extractor or another model can be added without measuring the rest again.
        device: Where the extractors compute; its kind fixes numbers too, as do the versions of packages.
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
        # Without the part after a "+", the kind of build: the kind of device states it.
        versions = {n: v.partition("+")[0] for n, v in package_versions(PACKAGES).items()}
        common = {
            "source": source.identity, "radii": list(self.radii), "chunk": chunk,
            "versions": {"dalle-zoo": __version__, **versions}, "device": torch.device(device).type,
        }  # fmt: skip
        self.identities = {name: {**common, "extractor": dict(net.record)} for name, net in self.extractors.items()}
        self.folders = {name: cache / f"{name}-{digest(found)[:16]}" for name, found in self.identities.items()}

    def path(self, extractor: str, chunk: int) -> Path:
        """File of a chunk."""
        return self.folders[extractor] / f"{chunk:06d}.safetensors"

    def run(self, share: Share, *, label: str, images: Path | None = None) -> None:
        """Computes the chunks that are missing.

        Args:
            share: Which chunks this process begins with; process 0 ends with all of them computed.
            label: What the progress bar says.
            images: Folder for PNG files of the images, each with its caption in a text file of the same name, written
                by a thread of its own.
        """
        for name, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDENTITY, self.identities[name])
        # Once around both threads: the flags belong to the process, and must not change while either computes.
        with exact_float32(torch.device("cpu")):
            self._run(range(share.rank, self.chunks, share.world), label, images)
            if share.rank == 0:
                self._run(range(self.chunks), label, images)
                self._run(range(self.chunks), label, images, wait=True)

    def missing(self) -> int:
        """Samples of which features are missing."""
        return sum(len(self._indices(chunk)) for chunk in range(self.chunks) if self._lacking(chunk))

    def seconds(self) -> float:
        """Time that the extractors themselves took, summed over chunks and processes."""
        return sum(self._recorded(name, SECONDS) for name in self.extractors)

    def loading_seconds(self) -> float:
        """Time in which the images were generated or read, summed likewise; extractors compute meanwhile."""
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
        """Extractors whose features of a chunk are missing; in one order for all processes, so that none deadlocks."""
        return [name for name in sorted(self.extractors) if not self.path(name, chunk).is_file()]

    def _unwritten(self, chunk: int, images: Path | None) -> bool:
        return images is not None and not all(_png(images, i).is_file() for i in self._indices(chunk))

    def _run(self, chunks: Sequence[int], label: str, images: Path | None, *, wait: bool = False) -> None:
        """Computes what is missing of some chunks and is not claimed by others, or else waits for them."""
        wanted = [chunk for chunk in chunks if self._lacking(chunk) or self._unwritten(chunk, images)]
        if not wanted:
            return
        # Two threads: one prepares the chunk after the one that the extractors work on, one writes PNG files.
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
        """Claims what is missing of a chunk and has its images prepared; None if there is nothing to do."""
        lacking, extractors = self._lacking(chunk), []
        for name in lacking:
            if not claims.take(self._claim(name, chunk), wait=wait):
                continue
            if self.path(name, chunk).is_file():  # another process has just finished it
                claims.release(self._claim(name, chunk))
            else:
                extractors.append(name)
        # Whoever has the claim writes the images too; those that are missing at the end were not requested before.
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
            # The curve over candidates is measured without blur.
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
            writing.result()  # the PNG files first: a chunk that is there is not opened again
        for name, (tensors, seconds) in features.items():
            with atomic_write(self.path(name, begun.chunk)) as aside:
                recorded = {SECONDS: f"{seconds:.6f}", LOADING: f"{ready.seconds:.6f}"}
                save_file(tensors, aside, metadata=recorded)
            claims.release(self._claim(name, begun.chunk))

    def _extract(self, name: str, ready: Ready) -> tuple[dict[str, Tensor], float]:
        """All features of some samples, named ``radius/candidates/kind``, and the seconds that they took."""
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
        """A tensor of every chunk, in order.

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
        """Names of the tensors that an extractor gives, such as ``features`` and ``logits``."""
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
        """A tensor of all samples, (n, ...)."""
        return torch.cat(list(self.read(extractor, name)))

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """The images of some samples, read or generated again; of each the chosen candidate."""
        return [self.source.load([index]).images[self.counts[-1]][0] for index in indices]


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _check_finite(found: Tensor, extractor: str, kind: str) -> None:
    """Raises `ExtractorFileError` for NaN and infinity, before further images are generated for them."""
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ExtractorFileError(
            f"the {kind} of {extractor} hold NaN or infinity: its weights are broken; give others with --network, or "
            f"leave its scores out with --leave-out {extractor}"
        )


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Places of the images of one size, for every size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    return list(groups.values())
