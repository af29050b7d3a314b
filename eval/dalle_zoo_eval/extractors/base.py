"""Common parts of the extractors: interface, registry, checked files, and arithmetic that no setting changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dalle_zoo.files import sha256_file
from dalle_zoo.registry import SpecRegistry

# B images, H W pixels, d features, c classes


class ExtractorFileError(ValueError):
    """A file of a network is missing or is the wrong one; the message states which file is needed, and where.

    Example:
        >>> from dalle_zoo_eval.extractors import load_extractor
        >>> load_extractor("prior", "prior.safetensors")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dalle_zoo_eval.extractors.base.ExtractorFileError: prior is a part of the evaluated model, ...
    """


class Extractor(Protocol):
    """Images to features.

    Example:
        >>> from dalle_zoo_eval.extractors import load_extractor
        >>> pixels: Extractor = load_extractor("pixels", "")
        >>> pixels.record["title"]
        '8 x 8 pixels'
    """

    @property
    def name(self) -> str:
        """Name in `EXTRACTORS`."""

    @property
    def record(self) -> Mapping[str, Any]:
        """Entry of the result file: ``name``, ``sha256`` of the weights, ``pixels``, ``resize``.

        A network of several files adds ``files_sha256``, the digest of each. A network that takes no part in
        generation, and so can evaluate images independently, adds ``title``, its name for people.
        """

    def prepare(self, images: Tensor) -> Tensor:
        """Prepares uint8 images (B, 3, H, W) in another thread: scaling on the CPU.

        Returns:
            uint8 images for `__call__`, which returns the same features for them as for the original images.
        """

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Extracts features of images, uint8 (B, 3, H, W).

        Returns:
            Tensors on the CPU, one row per image: ``features`` (B, d) in float32, and ``logits`` (B, c) if there are
            classes. Metrics request them by these names.
        """


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """An extractor that also encodes captions.

    Example:
        >>> from dalle_zoo_eval.extractors import load_extractor
        >>> isinstance(load_extractor("pixels", ""), TextExtractor)
        False
    """

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Returns features of B captions in the same space as those of images: float32 (B, d) on the CPU."""


@runtime_checkable
class PairExtractor(Extractor, Protocol):
    """An extractor of images together with captions.

    Example:
        >>> from dalle_zoo_eval.extractors import load_extractor
        >>> isinstance(load_extractor("pixels", ""), PairExtractor)
        False
    """

    def pairs(self, images: Tensor, captions: Sequence[str], others: Sequence[str]) -> dict[str, Tensor]:
        """Returns tensors of B images, given their captions and captions of other images; replaces `__call__`."""


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A published file of weights."""

    name: str
    """File name."""
    sha256: str
    """Digest of the file."""
    url: str
    """Page from which it can be downloaded."""

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256}) from {self.url}"


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """What is known of an extractor before it is opened.

    Example:
        >>> from dalle_zoo_eval.extractors import EXTRACTORS
        >>> [EXTRACTORS.spec(name).fid for name in ("inception-2015", "dinov2")]
        [True, False]
    """

    name: str
    """Name in `EXTRACTORS`."""
    weights: tuple[WeightsFile, ...] = ()
    """Equivalent published files: the only weights with which it is what its name says. Empty if any may be used."""
    file: str = ""
    """Name of its file or folder in the folder of networks. Defaults to the first of ``weights``, or else ``name``."""
    obtain: str = ""
    """What to download or copy, for messages. Defaults to the first of ``weights``, or else ``name``."""
    fid: bool = False
    """Whether Fréchet distances in its features are called FID."""
    model_folder: str = ""
    """Folder in a model folder that holds it, if models may contain one of their own."""
    bundled: Path | None = None
    """Its file or folder in the package, if it is part of that."""
    model_part: bool = False
    """Whether it is a required part of the evaluated model, opened with its pipeline instead of a file."""

    @property
    def default_file(self) -> str:
        """Name of its file or folder in the folder of networks."""
        return self.file or (self.weights[0].name if self.weights else self.name)

    @property
    def source(self) -> str:
        """What to download or copy, for messages."""
        return self.obtain or (str(self.weights[0]) if self.weights else self.name)


Opener = Callable[..., Extractor]
"""``(location, device, expected_sha256)``, with a file or folder; for parts of a model ``(pipe, files_sha256)``."""


EXTRACTORS: SpecRegistry[Opener, ExtractorSpec] = SpecRegistry(
    "feature extractor", group="dalle_zoo.extractors", spec=ExtractorSpec
)


def find_weights(location: Path, files: Sequence[WeightsFile], expected_sha256: str | None) -> tuple[Path, str]:
    """Finds one of several equivalent files and checks its digest.

    Args:
        location: The file, or the folder that holds it under its name.
        files: The published files, best first.
        expected_sha256: Digest to accept instead of the published ones.

    Returns:
        The file and its sha256.

    Raises:
        ExtractorFileError: There is no such file, or its digest differs.
    """
    paths = [location / file.name for file in files] if location.is_dir() else [location]
    path = next((path for path in paths if path.is_file()), None)
    choice = " or ".join(map(str, files))
    if path is None:
        raise ExtractorFileError(
            f"the weights {' or '.join(map(str, paths))} are missing: download {choice} to that path"
        )
    digest = sha256_file(path)
    if digest not in ([expected_sha256] if expected_sha256 else [file.sha256 for file in files]):
        wanted = f"sha256 {expected_sha256}" if expected_sha256 else choice
        raise ExtractorFileError(f"{path} has sha256 {digest}, expected {wanted}: download the right file again")
    return path, digest


def check_images(images: Tensor) -> None:
    """Raises `ValueError` unless images are uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Runs inference in float32 with any settings of the caller: no autocast, no TF32, no selection by timing."""
    precision = torch.get_float32_matmul_precision()
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
