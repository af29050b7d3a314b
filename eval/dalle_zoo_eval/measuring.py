"""From pictures to features on disk, in chunks that are there whole or not at all.

    subject ─► pictures ─► blur radii ─► network ─► one safetensors file a chunk and network

A chunk has a fixed number of samples, because what a network says of a picture depends, in the last bits, on the
pictures beside it. So neither a kill nor the number of processes changes a number. Process r of w begins with chunks
r, r + w, ...; process 0 then does what is missing.
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

from dalle_zoo import __version__
from dalle_zoo.files import written_aside
from dalle_zoo.hub import read_json, write_json
from dalle_zoo.pictures import save_png
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.networks.base import Network, exact_float32
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.subjects import Shown, Subject

# B samples of a chunk, d features, c classes

IDENTITY = "run.json"
SECONDS = "seconds"
"""Name, in the metadata of a chunk, of the time that its features took."""


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
        cache: Folder of all measurements. Each network has a folder there, named by the digest of what fixes its
            numbers, so that another network or another model can be added without measuring the rest again.
    """

    def __init__(
        self, subject: Subject, networks: Mapping[str, Network], radii: Sequence[int], chunk: int, cache: Path
    ) -> None:
        if len(subject) < 2:
            raise ValueError(f"at least 2 samples are needed for a covariance, got {len(subject)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.subject, self.networks, self.radii, self.chunk = subject, dict(networks), tuple(radii), chunk
        self.cache, self.counts = cache, subject.counts
        self.chunks = -(-len(subject) // chunk)
        versions = {"dalle-zoo": __version__, "torch": torch.__version__.partition("+")[0]}
        common = {"subject": subject.identity, "radii": list(self.radii), "chunk": chunk, "versions": versions}
        self.identities = {name: {**common, "network": dict(net.record)} for name, net in self.networks.items()}
        self.folders = {name: cache / f"{name}-{digest(found)[:16]}" for name, found in self.identities.items()}

    def path(self, network: str, chunk: int) -> Path:
        """File of a chunk."""
        return self.folders[network] / f"{chunk:06d}.safetensors"

    def run(self, share: Share, *, label: str, pictures: Path | None = None) -> None:
        """Measures the chunks that are missing.

        Args:
            share: Which chunks this process begins with; process 0 goes on with whatever is then missing.
            label: What the progress bar says.
            pictures: Folder for PNG files of the pictures, each with its caption beside it, written by a thread of
                its own.
        """
        for name, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDENTITY, self.identities[name])
        # Once around both threads: the flags belong to the process, and must not change while either computes.
        with exact_float32(torch.device("cpu")):
            self._measure(range(share.rank, self.chunks, share.world), label, pictures)
            if share.rank == 0:  # from the end, where the other processes come to last
                self._measure(range(self.chunks - 1, -1, -1), label, pictures)

    def seconds(self) -> float:
        """Time that all features took, summed over chunks and processes."""
        total = 0.0
        for name in self.networks:
            for chunk in range(self.chunks):
                with safe_open(self.path(name, chunk), "pt") as file:
                    total += float((file.metadata() or {}).get(SECONDS, 0))
        return total

    def _indices(self, chunk: int) -> range:
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.subject)))

    def _lacking(self, chunk: int, pictures: Path | None) -> list[str] | None:
        """Networks that have not seen a chunk; None if there is nothing to do."""
        networks = [name for name in self.networks if not self.path(name, chunk).is_file()]
        unwritten = pictures is not None and not all(_png(pictures, i).is_file() for i in self._indices(chunk))
        return networks if networks or unwritten else None

    def _measure(self, chunks: Sequence[int], label: str, pictures: Path | None) -> None:
        wanted = [chunk for chunk in chunks if self._lacking(chunk, pictures) is not None]
        if not wanted:
            return
        # Two threads: one shows the chunk after the one that the networks look at, one writes PNG files.
        with (
            ThreadPoolExecutor(1) as ahead,
            ThreadPoolExecutor(1) as writer,
            tqdm(total=len(wanted), desc=label, unit="chunk") as bar,
        ):
            coming: Future[Shown | None] = ahead.submit(self._show, wanted[0], pictures)
            for chunk, following in zip(wanted, [*wanted[1:], None], strict=True):
                shown = coming.result()
                if following is not None:
                    coming = ahead.submit(self._show, following, pictures)
                networks = self._lacking(chunk, pictures)
                if shown is not None and networks is not None:
                    writing = None if pictures is None else writer.submit(self._write_pictures, shown, chunk, pictures)
                    features = {name: self._look(name, shown) for name in networks}
                    if writing is not None:
                        writing.result()  # the PNG files first: a chunk that is there needs no other look
                    for name, (tensors, seconds) in features.items():
                        with written_aside(self.path(name, chunk)) as aside:
                            save_file(tensors, aside, metadata={SECONDS: f"{seconds:.6f}"})
                bar.update()

    def _show(self, chunk: int, pictures: Path | None) -> Shown | None:
        """The pictures of a chunk, unless another process has been quicker."""
        return self.subject.show(self._indices(chunk)) if self._lacking(chunk, pictures) is not None else None

    def _look(self, name: str, shown: Shown) -> tuple[dict[str, Tensor], float]:
        """All features of some samples, named ``radius/candidates/kind``, and the seconds that they took."""
        start, tensors = time.perf_counter(), {}
        for count, images in shown.pictures.items():
            tensors[f"chosen/{count}"] = torch.tensor(shown.chosen[count])
            # The curve over candidates is drawn without blur.
            radii = self.radii if count == self.counts[-1] else (0,)
            for radius, blurred in gaussian_blur(images, radii).items():
                for kind, values in _by_size(self.networks[name], blurred).items():
                    tensors[f"{radius}/{count}/{kind}"] = values.contiguous()
        return tensors, time.perf_counter() - start

    def _write_pictures(self, shown: Shown, chunk: int, folder: Path) -> None:
        images = shown.pictures[self.counts[-1]]
        for index, image, caption in zip(self._indices(chunk), images, shown.captions, strict=True):
            path = _png(folder, index)
            if caption:
                with written_aside(path.with_suffix(".txt")) as aside:
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

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """The judged pictures of some samples, read or drawn again: of each the chosen candidate alone."""
        chosen = self.all(next(iter(self.networks)), f"chosen/{self.counts[-1]}")
        return [self.subject.picture(index, int(chosen[index])) for index in indices]


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _by_size(network: Network, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Features of pictures of any sizes: those of one size together, back in order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    parts = [network(torch.stack([images[i] for i in numbers])) for numbers in groups.values()]
    order = torch.tensor([i for numbers in groups.values() for i in numbers]).argsort()
    return {kind: torch.cat([part[kind] for part in parts])[order] for kind in parts[0]}


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
