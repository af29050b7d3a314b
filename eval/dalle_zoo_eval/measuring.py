"""From images to features on disk, in chunks that are there atomically.

    subject ─► images ─► blur radii ─► network ─► one safetensors file a chunk and network
    └───── a thread, one chunk ahead ─────┘

A chunk has a fixed number of samples, because what a network says of an image depends, in the last bits, on the
images beside it. So neither a kill nor the number of processes changes a number. Process r of w begins with chunks
r, r + w, ...; process 0 then does what is missing and nobody has claimed, and at last waits for what others have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dalle_zoo.files import atomic_write, read_json, write_json
from dalle_zoo.images import save_png
from dalle_zoo.version import __version__
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.claims import Claims
from dalle_zoo_eval.networks.base import Network, exact_float32
from dalle_zoo_eval.provenance import PACKAGES, digest, package_versions
from dalle_zoo_eval.subjects import ImageSource, Shown

# B samples of a chunk, d features, c classes

IDENTITY = "run.json"
SECONDS = "seconds"
"""Name, in the metadata of a chunk, of the time that its network took."""
SHOWING = "showing"
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
            raise ValueError(f"rank must lie in 0..{self.world - 1}, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The images of a chunk as the networks will take them."""

    shown: Shown
    """The images themselves."""
    views: dict[str, dict[str, list[Tensor]]]
    """For every network and every ``radius/candidates`` the prepared images, those of one size together."""
    order: dict[str, Tensor]
    """For every ``radius/candidates`` the places, among the prepared images, of the images in their order."""
    seconds: float
    """Time in which the images were generated or read."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A chunk that a thread makes ready."""

    chunk: int
    """Its number."""
    networks: list[str]
    """Networks that are to look at it; this process has claimed it for them."""
    ready: Future[Ready]
    """Its images."""


class Measurement:
    """Features of a subject, chunk by chunk, in a folder of their own.

    Args:
        subject: What is measured.
        networks: Networks by name.
        radii: Radii of the Gaussian blur, pixels; 0 is none.
        chunk: Samples of a chunk.
        cache: Folder of all measurements. Each network has a folder there, named by the digest of what fixes its
            numbers, so that another network or another model can be added without measuring the rest again.
        device: Where the networks compute; its kind fixes numbers too, as do the versions of packages.
    """

    def __init__(
        self,
        subject: ImageSource,
        networks: Mapping[str, Network],
        radii: Sequence[int],
        chunk: int,
        cache: Path,
        device: str = "cpu",
    ) -> None:
        if len(subject) < 2:
            raise ValueError(f"at least 2 samples are needed for a covariance, got {len(subject)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.subject, self.networks, self.radii, self.chunk = subject, dict(networks), tuple(radii), chunk
        self.cache, self.counts = cache, subject.counts
        self.chunks = -(-len(subject) // chunk)
        # Without what stands behind a "+", the kind of build: the kind of device says it.
        versions = {n: v.partition("+")[0] for n, v in package_versions(PACKAGES).items()}
        common = {
            "subject": subject.identity, "radii": list(self.radii), "chunk": chunk,
            "versions": {"dalle-zoo": __version__, **versions}, "device": torch.device(device).type,
        }  # fmt: skip
        self.identities = {name: {**common, "network": dict(net.record)} for name, net in self.networks.items()}
        self.folders = {name: cache / f"{name}-{digest(found)[:16]}" for name, found in self.identities.items()}

    def path(self, network: str, chunk: int) -> Path:
        """File of a chunk."""
        return self.folders[network] / f"{chunk:06d}.safetensors"

    def run(self, share: Share, *, label: str, images: Path | None = None) -> None:
        """Measures the chunks that are missing.

        Args:
            share: Which chunks this process begins with; process 0 ends with all of them measured.
            label: What the progress bar says.
            images: Folder for PNG files of the images, each with its caption beside it, written by a thread of
                its own.
        """
        for name, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDENTITY, self.identities[name])
        # Once around both threads: the flags belong to the process, and must not change while either computes.
        with exact_float32(torch.device("cpu")):
            self._measure(range(share.rank, self.chunks, share.world), label, images)
            if share.rank == 0:
                self._measure(range(self.chunks), label, images)
                self._measure(range(self.chunks), label, images, wait=True)

    def missing(self) -> int:
        """Samples that some network has not seen."""
        return sum(len(self._indices(chunk)) for chunk in range(self.chunks) if self._lacking(chunk))

    def seconds(self) -> float:
        """Time that the networks themselves took, summed over chunks and processes."""
        return sum(self._noted(name, SECONDS) for name in self.networks)

    def showing_seconds(self) -> float:
        """Time in which the images were generated or read, summed likewise; networks compute meanwhile."""
        return self._noted(next(iter(self.networks)), SHOWING)

    def _noted(self, network: str, what: str) -> float:
        total = 0.0
        for chunk in range(self.chunks):
            with safe_open(self.path(network, chunk), "pt") as file:
                total += float((file.metadata() or {}).get(what, 0))
        return total

    def _indices(self, chunk: int) -> range:
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.subject)))

    def _lacking(self, chunk: int) -> list[str]:
        """Networks that have not seen a chunk; in one order for all processes, so that none waits in a circle."""
        return [name for name in sorted(self.networks) if not self.path(name, chunk).is_file()]

    def _unwritten(self, chunk: int, images: Path | None) -> bool:
        return images is not None and not all(_png(images, i).is_file() for i in self._indices(chunk))

    def _measure(self, chunks: Sequence[int], label: str, images: Path | None, *, wait: bool = False) -> None:
        """Measures what is missing of some chunks, and is not claimed by others, or else waits for them."""
        wanted = [chunk for chunk in chunks if self._lacking(chunk) or self._unwritten(chunk, images)]
        if not wanted:
            return
        # Two threads: one makes the chunk ready after the one that the networks look at, one writes PNG files.
        with (
            Claims() as claims,
            ThreadPoolExecutor(1) as ahead,
            ThreadPoolExecutor(1) as writer,
            tqdm(total=len(wanted), desc=label, unit="chunk") as bar,
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
        """Claims what is missing of a chunk and has its images made ready; None if there is nothing to do."""
        lacking, networks = self._lacking(chunk), []
        for name in lacking:
            if not claims.take(self._claim(name, chunk), wait=wait):
                continue
            if self.path(name, chunk).is_file():  # another process has just finished it
                claims.release(self._claim(name, chunk))
            else:
                networks.append(name)
        # Whoever has the claim writes the images too; at last those that it was not asked for are missing.
        writes = (wait or not lacking) and self._unwritten(chunk, images)
        if not networks and not writes:
            return None
        return Begun(chunk=chunk, networks=networks, ready=ahead.submit(self._make_ready, chunk, networks))

    def _claim(self, network: str, chunk: int) -> Path:
        return self.path(network, chunk).with_suffix(".claim")

    def _make_ready(self, chunk: int, networks: Sequence[str]) -> Ready:
        start = time.perf_counter()
        shown = self.subject.show(self._indices(chunk))
        seconds = time.perf_counter() - start
        views: dict[str, dict[str, list[Tensor]]] = {name: {} for name in networks}
        order = {}
        for count, images in shown.images.items() if networks else ():
            # The curve over candidates is sampled without blur.
            radii = self.radii if count == self.counts[-1] else (0,)
            for radius, blurred in gaussian_blur(images, radii).items():
                view = f"{radius}/{count}"
                stacks, order[view] = _by_size(blurred)
                for name in networks:
                    views[name][view] = [self.networks[name].prepare(stack) for stack in stacks]
        return Ready(shown=shown, views=views, order=order, seconds=seconds)

    def _finish(self, begun: Begun, images: Path | None, claims: Claims, writer: ThreadPoolExecutor) -> None:
        """Has the networks look at a chunk, and writes what they say of it."""
        ready = begun.ready.result()
        writing = None if images is None else writer.submit(self._write_images, ready.shown, begun.chunk, images)
        features = {name: self._look(name, ready) for name in begun.networks}
        if writing is not None:
            writing.result()  # the PNG files first: a chunk that is there needs no other look
        for name, (tensors, seconds) in features.items():
            with atomic_write(self.path(name, begun.chunk)) as aside:
                noted = {SECONDS: f"{seconds:.6f}", SHOWING: f"{ready.seconds:.6f}"}
                save_file(tensors, aside, metadata=noted)
            claims.release(self._claim(name, begun.chunk))

    def _look(self, name: str, ready: Ready) -> tuple[dict[str, Tensor], float]:
        """All features of some samples, named ``radius/candidates/kind``, and the seconds that they took."""
        start, network = time.perf_counter(), self.networks[name]
        tensors = {f"chosen/{count}": torch.tensor(chosen) for count, chosen in ready.shown.chosen.items()}
        for view, stacks in ready.views[name].items():
            parts = [network(stack) for stack in stacks]
            for kind in parts[0]:
                tensors[f"{view}/{kind}"] = torch.cat([part[kind] for part in parts])[ready.order[view]].contiguous()
        return tensors, time.perf_counter() - start

    def _write_images(self, shown: Shown, chunk: int, folder: Path) -> None:
        images = shown.images[self.counts[-1]]
        for index, image, caption in zip(self._indices(chunk), images, shown.captions, strict=True):
            path = _png(folder, index)
            if caption:
                with atomic_write(path.with_suffix(".txt")) as aside:
                    aside.write_text(caption + "\n", encoding="utf-8")
            save_png(image, path)

    def read(self, network: str, name: str) -> Iterator[Tensor]:
        """A tensor of every chunk, in order.

        Raises:
            ValueError: A chunk is missing or damaged.
        """
        for chunk in range(self.chunks):
            path, expected = self.path(network, chunk), len(self._indices(chunk))
            try:
                with safe_open(path, "pt") as file:
                    values: Tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}): delete it and run again") from None
            if len(values) != expected:
                raise ValueError(f"{path} holds {len(values)} samples instead of {expected}: delete it and run again")
            yield values

    def all(self, network: str, name: str) -> Tensor:
        """A tensor of all samples, (n, ...)."""
        return torch.cat(list(self.read(network, name)))

    def images(self, indices: Sequence[int]) -> list[Tensor]:
        """The judged images of some samples, read or sampled again: of each the chosen candidate alone."""
        chosen = self.all(next(iter(self.networks)), f"chosen/{self.counts[-1]}")
        return [self.subject.image(index, int(chosen[index])) for index in indices]


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _by_size(images: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Images of one size together, (B, 3, H, W) each, and the place of every image among them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    order = torch.tensor([i for numbers in groups.values() for i in numbers]).argsort()
    return [torch.stack([images[i] for i in numbers]) for numbers in groups.values()], order


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` if a result folder holds another evaluation; the message names what differs."""
    path = folder / IDENTITY
    if not path.is_file():
        return
    there, now = _leaves(read_json(path)), _leaves(json.loads(json.dumps(identity)))
    differing = sorted(key for key in {*there, *now} if there.get(key) != now.get(key))
    if differing:
        shown = "; ".join(f"{key}: there {there.get(key)!r}, now {now.get(key)!r}" for key in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"{folder} holds another evaluation ({shown}{more}): choose another --out")


def bind(folder: Path, identity: dict[str, Any]) -> None:
    """Writes down which evaluation a result folder holds."""
    write_json(folder / IDENTITY, identity)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found
