"""Reference statistics in files: features and moments of real images, computed once and checked when they are read.

| file | holds |
|---|---|
| ``.safetensors`` | by extractor, features and moments, with a digest of every tensor and of the network |
| ``.npz`` | mean ``mu`` and covariance ``sigma``, as pytorch-fid and clean-fid write them |

Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dalle_zoo.files import atomic_write, sha256_file
from dalle_zoo.sharing import Share
from dalle_zoo_eval.extractors import Extractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.moments import Moments, StatisticsError, in_batches

# n samples, d features

ENDINGS = (".safetensors", ".npz")
FORMAT = "dalle-zoo reference statistics 1"
FEATURES = "0/1/features"
"""Name of the features without blur in a store; those of others begin alike."""
NPZ_EXTRACTOR = "inception-2015"
"""Network of ``.npz`` files, which do not say what they were computed with."""
NPZ_FEATURES = 2048
"""Number of its features."""
UNKNOWN = 2**31
"""Replaces the number of images where a file does not state it."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A file of statistics, checked."""

    path: Path
    """The file."""
    sha256: str
    """Digest of the file."""
    count: int | None
    """Number of images; None if the file does not state it."""
    name: str
    """Name of the images."""
    networks: Mapping[str, str]
    """sha256 of the weights by extractor; "" if the file does not state them."""
    tensors: Mapping[str, Tensor]
    """``EXTRACTOR/features``, ``EXTRACTOR/total`` and others."""
    image: tuple[str, int | None] | None = None
    """Crop and size of the images; None if the file does not state them."""

    def record(self) -> dict[str, Any]:
        """Returns what a result file says of the file."""
        return {"name": self.path.name, "sha256": self.sha256, "images": self.count, "of": self.name}

    def check_images(self, crop: str, size: int | None) -> None:
        """Raises `StatisticsError` unless the images were cropped and scaled as those that they are compared with.

        Args:
            crop: Crop of the other images.
            size: Side to which they are scaled, pixels; None leaves them as they are.
        """
        if self.image not in (None, (crop, size)):
            stored, other = (f"crop {c}, size {s or 'as they are'}" for c, s in (self.image, (crop, size)))
            raise StatisticsError(
                f"{self.path.name} is of images with {stored}, and they would be compared with images with {other}: "
                "save the statistics again with the same size, or compare at theirs"
            )

    def moments(self, extractor: str) -> Moments:
        """Returns the moments in the features of an extractor.

        Raises:
            StatisticsError: The file has none.
        """
        if f"{extractor}/total" not in self.tensors:
            raise StatisticsError(f"{self.path.name} has no statistics of {extractor}")
        total, outer = (self.tensors[f"{extractor}/{name}"] for name in ("total", "outer"))
        return Moments(count=UNKNOWN if self.count is None else self.count, total=total, outer=outer)


def save_statistics(store: FeatureStore, path: Path, *, name: str) -> str:
    """Writes the features and moments of a store, without blur.

    Args:
        store: Features of real images, complete.
        path: The file, ``.safetensors``.
        name: Name of the images.

    Returns:
        sha256 of the file.
    """
    tensors: dict[str, Tensor] = {}
    for extractor in store.extractors:
        for kind in store.kinds(extractor):
            tensors[f"{extractor}/{kind}"] = store.all(extractor, f"0/1/{kind}").contiguous()
        moments = store.moments(extractor)
        tensors |= {f"{extractor}/total": moments.total, f"{extractor}/outer": moments.outer}
    head = {
        "format": FORMAT,
        "name": name,
        "count": len(store.source),
        "chunk": store.chunk,
        "source": store.source.identity,
        "networks": {extractor: dict(net.record) for extractor, net in store.extractors.items()},
        "sha256": {key: _digest(tensor) for key, tensor in tensors.items()},
    }
    with atomic_write(path) as aside:
        save_file(tensors, aside, metadata={"dalle_zoo": json.dumps(head)})
    return sha256_file(path)


def load_statistics(path: Path) -> Saved:
    """Reads a file of statistics and checks every tensor.

    Raises:
        StatisticsError: The file is missing, damaged, or of another kind.
    """
    if path.suffix not in ENDINGS:
        raise StatisticsError(f"{path}: statistics are in files that end in {' or '.join(ENDINGS)}")
    try:
        return _load_npz(path) if path.suffix == ".npz" else _load_safetensors(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise StatisticsError(f"{path} cannot be read as statistics: {error}") from None


def _load_safetensors(path: Path) -> Saved:
    with safe_open(path, "pt") as file:
        head = json.loads((file.metadata() or {}).get("dalle_zoo", "{}"))
        if head.get("format") != FORMAT:
            raise ValueError(f"expected a file that --save-reference wrote ({FORMAT}), got {head.get('format')!r}")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        if _digest(tensor) != head["sha256"].get(key):
            raise ValueError(f"{key} is not what was saved: copy the file again")
    return Saved(
        path=path,
        sha256=sha256_file(path),
        count=int(head["count"]),
        name=str(head["name"]),
        networks={name: str(record["sha256"]) for name, record in head["networks"].items()},
        tensors=tensors,
        image=(str(head["source"]["crop"]), head["source"]["size"]),
    )


def _load_npz(path: Path) -> Saved:
    with np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise ValueError(f"expected mu and sigma, got {', '.join(file.files) or 'nothing'}")
        mean, covariance = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in ("mu", "sigma"))
    if mean.shape != (NPZ_FEATURES,) or covariance.shape != (NPZ_FEATURES, NPZ_FEATURES):
        raise ValueError(
            f"expected mu ({NPZ_FEATURES},) and sigma ({NPZ_FEATURES}, {NPZ_FEATURES}) of {NPZ_EXTRACTOR}, got "
            f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    moments = Moments.exact(mean, covariance, UNKNOWN)
    if not bool(moments.outer.isfinite().all()):
        raise ValueError("it holds NaN or infinity")
    if not torch.allclose(covariance, covariance.t()) or bool((covariance.diagonal() < 0).any()):
        raise ValueError("sigma is no covariance: expected a symmetric matrix with a diagonal of at least 0")
    tensors = {f"{NPZ_EXTRACTOR}/total": moments.total, f"{NPZ_EXTRACTOR}/outer": moments.outer}
    return Saved(
        path=path,
        sha256=sha256_file(path),
        count=None,
        name=path.stem,
        networks={NPZ_EXTRACTOR: ""},
        tensors=tensors,
    )


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


class StoredReference:
    """Statistics in the place of the feature store of real images.

    Args:
        saved: The statistics.
        extractors: Opened extractors; those that the file does not have are left out.
        chunk: Samples that are read at once.

    Raises:
        StatisticsError: The file has statistics of other weights.
    """

    counts: Sequence[int] = (1,)

    def __init__(self, saved: Saved, extractors: Mapping[str, Extractor], chunk: int) -> None:
        self.saved, self.chunk = saved, chunk
        self.extractors = {name: net for name, net in extractors.items() if name in saved.networks}
        for name, net in self.extractors.items():
            stored, given = saved.networks[name], str(net.record["sha256"])
            if stored and stored != given:
                raise StatisticsError(
                    f"{saved.path.name} was computed with the {name} of sha256 {stored}, and the given one has "
                    f"{given}: distances between the two mean nothing"
                )
        self.identities = {name: {"statistics": saved.sha256} for name in self.extractors}

    def run(self, share: Share, *, label: str, images: Path | None = None) -> None:
        """Does nothing: everything is there."""

    def missing(self) -> int:
        """Number of samples without features: none."""
        return 0

    def loading_seconds(self) -> float:
        """Time in which images were read: none."""
        return 0.0

    def moments(self, extractor: str) -> Moments:
        """Mean and covariance of the features of an extractor; errors as in `Saved.moments`."""
        return self.saved.moments(extractor)

    def kinds(self, extractor: str) -> list[str]:
        """Names of the stored tensors with a row per image."""
        sums = ("total", "outer")
        keys = (key.partition("/") for key in self.saved.tensors)
        return sorted(kind for name, _, kind in keys if name == extractor and kind not in sums)

    def read(self, extractor: str, name: str) -> Iterator[Tensor]:
        """Yields a tensor in chunks, as `FeatureStore.read`.

        Raises:
            StatisticsError: The file does not have it.
        """
        prefix = FEATURES.removesuffix("features")
        tensor = (
            self.saved.tensors.get(f"{extractor}/{name.removeprefix(prefix)}") if name.startswith(prefix) else None
        )
        if tensor is None:
            raise StatisticsError(f"{self.saved.path.name} holds no {name} of {extractor}, only {self._content()}")
        yield from in_batches(tensor, self.chunk)

    def _content(self) -> str:
        return ", ".join(sorted(self.saved.tensors))
