"""From pictures to features on disk, in chunks that are there whole or not at all.

    subject ─► pictures ─► blur radii ─► networks ─► one safetensors file a chunk

A chunk has a fixed number of samples, because what a network says of a picture depends, in the last bits, on the
pictures beside it. So neither a kill nor the number of processes changes a number. Process r of w begins with chunks
r, r + w, ...; process 0 then does what is missing.
"""

from __future__ import annotations

import hashlib
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

from dalle_zoo.files import written_aside
from dalle_zoo.hub import read_json, write_json
from dalle_zoo.pictures import save_png
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.networks.base import Network
from dalle_zoo_eval.subjects import Shown, Subject

# B samples of a chunk, d features, c classes

IDENTITY = "run.json"


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


class Measurement:
    """Features of a subject, chunk by chunk, in a folder of their own.

    Args:
        subject: What is measured.
        networks: Networks by name.
        radii: Radii of the Gaussian blur, pixels; 0 is none.
        chunk: Samples of a chunk.
        cache: Folder of all measurements; each has a folder there, named by the digest of what fixes its numbers.
    """

    def __init__(
        self, subject: Subject, networks: Mapping[str, Network], radii: Sequence[int], chunk: int, cache: Path
    ) -> None:
        if len(subject) < 2:
            raise ValueError(f"at least 2 samples are needed for a covariance, got {len(subject)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.subject, self.networks, self.radii, self.chunk = subject, dict(networks), tuple(radii), chunk
        self.identity = {
            "subject": subject.identity,
            "networks": {name: dict(network.record) for name, network in self.networks.items()},
            "radii": list(self.radii),
            "chunk": chunk,
        }
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = cache / digest[:16]
        self.chunks = -(-len(subject) // chunk)
        self.counts = subject.counts

    def path(self, chunk: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{chunk:06d}.safetensors"

    def run(self, share: Share, *, label: str, pictures: Path | None = None) -> float | None:
        """Measures the chunks that are missing.

        Args:
            share: Which chunks this process begins with; process 0 goes on with whatever is then missing.
            label: What the progress bar says.
            pictures: Folder for PNG files of the pictures, written by a thread of its own.

        Returns:
            Samples a second, or None if nothing was missing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY).is_file():
            write_json(self.folder / IDENTITY, self.identity)
        own = [c for c in range(share.rank, self.chunks, share.world) if not self.path(c).is_file()]
        done = self._measure(own, label, pictures)
        if share.rank == 0:
            rest = [c for c in range(self.chunks) if not self.path(c).is_file()]
            done = self._measure(rest, label, pictures) or done
        return done

    def _indices(self, chunk: int) -> range:
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.subject)))

    def _measure(self, chunks: list[int], label: str, pictures: Path | None) -> float | None:
        if not chunks:
            return None
        samples, start = 0, time.perf_counter()
        # Two threads: one shows the chunk after the one that the networks look at, one writes PNG files.
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as writer:
            coming = ahead.submit(self.subject.show, self._indices(chunks[0]))
            writing: Future[None] | None = None
            bar = tqdm(chunks, desc=label, unit="chunk")
            for place, chunk in enumerate(bar):
                shown = coming.result()
                if place + 1 < len(chunks):
                    coming = ahead.submit(self.subject.show, self._indices(chunks[place + 1]))
                if self.path(chunk).is_file():  # another process was quicker
                    continue
                tensors = self.features(shown)
                with written_aside(self.path(chunk)) as aside:
                    save_file(tensors, aside)
                if pictures is not None:
                    if writing is not None:
                        writing.result()  # which raises what went wrong
                    writing = writer.submit(_write_pictures, shown, self._indices(chunk), pictures)
                samples += len(shown.captions)
            if writing is not None:
                writing.result()
        return samples / (time.perf_counter() - start)

    def features(self, shown: Shown) -> dict[str, Tensor]:
        """All features of some samples, named ``network/radius/candidates/kind``."""
        tensors = {}
        for count, images in shown.pictures.items():
            # The curve over candidates is drawn without blur.
            radii = self.radii if count == self.counts[-1] else (0,)
            for radius, blurred in gaussian_blur(images, radii).items():
                for name, network in self.networks.items():
                    for kind, values in _by_size(network, blurred).items():
                        tensors[f"{name}/{radius}/{count}/{kind}"] = values.contiguous()
        return tensors

    def read(self, name: str) -> Iterator[Tensor]:
        """A tensor of every chunk, in order.

        Raises:
            ValueError: A chunk is missing or damaged.
        """
        for chunk in range(self.chunks):
            path = self.path(chunk)
            try:
                with safe_open(path, "pt") as file:
                    values: Tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): delete it and run the same command again"
                ) from None
            if len(values) != len(self._indices(chunk)):
                raise ValueError(
                    f"{path} holds {len(values)} samples instead of {len(self._indices(chunk))}: delete it"
                )
            yield values

    def all(self, name: str) -> Tensor:
        """A tensor of all samples, (n, ...)."""
        return torch.cat(list(self.read(name)))

    def complete(self) -> bool:
        """Whether every chunk is there."""
        return all(self.path(chunk).is_file() for chunk in range(self.chunks))


def _by_size(network: Network, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Features of pictures of any sizes: those of one size together, back in order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    parts = [network(torch.stack([images[i] for i in numbers])) for numbers in groups.values()]
    order = torch.tensor([i for numbers in groups.values() for i in numbers]).argsort()
    return {kind: torch.cat([part[kind] for part in parts])[order] for kind in parts[0]}


def _write_pictures(shown: Shown, indices: Sequence[int], folder: Path) -> None:
    for index, image in zip(indices, shown.pictures[max(shown.pictures)], strict=True):
        path = folder / f"{index:06d}.png"
        if not path.is_file():
            save_png(image, path)


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Binds a result folder to one evaluation: writes down what fixes its numbers, or compares with what is there.

    Raises:
        ValueError: The folder holds another evaluation; the message names what differs.
    """
    path = folder / IDENTITY
    plain = json.loads(json.dumps(identity))
    if not path.is_file():
        write_json(path, plain)
        return
    there = read_json(path)
    differing = sorted(key for key in {*there, *plain} if there.get(key) != plain.get(key))
    if differing:
        details = "; ".join(f"{key}: there {there.get(key)!r}, now {plain.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} holds another evaluation ({details}): choose another --out")
