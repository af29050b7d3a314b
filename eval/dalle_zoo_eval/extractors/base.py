"""What the extractors share: the interface, checked files, and arithmetic that no setting changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dalle_zoo.files import sha256_file
from dalle_zoo.registry import Registry

# B images, H W pixels, d features, c classes


class ExtractorFileError(ValueError):
    """A file of a network that is missing or another one; the message says which, and where to put it."""


class Extractor(Protocol):
    """Images to features."""

    @property
    def name(self) -> str:
        """Name in `EXTRACTORS`."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What a result file says of it: ``name``, ``sha256`` of the weights, ``pixels``, ``resize``.

        A network of several files adds ``files_sha256``, the digest of each.
        """

    def prepare(self, images: Tensor) -> Tensor:
        """Does what can be done to uint8 images (B, 3, H, W) in another thread: scaling on the CPU.

        Returns:
            uint8 images for `__call__`, which gives the same features for them as for the first ones.
        """

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Extracts features of images, uint8 (B, 3, H, W).

        Returns:
            Tensors on the CPU, a row per image: ``features`` (B, d) in float32, ``logits`` (B, c) where there are
            classes. Metrics ask for them by these names.
        """


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """A network that reads captions too."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Features of B captions in the space of those of images: float32 (B, d) on the CPU."""


@runtime_checkable
class PairExtractor(Extractor, Protocol):
    """An extractor that sees images together with captions."""

    def pairs(self, images: Tensor, captions: Sequence[str], others: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of B images with their captions, and with captions of other images; called instead of `__call__`."""


Opener = Callable[[Path, torch.device, str | None], Extractor]
"""Of the file or folder, the device, and the sha256 that is expected."""

EXTRACTORS: Registry[Opener] = Registry("feature extractor", group="dalle_zoo.extractors")


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A published file of weights."""

    name: str
    """File name."""
    sha256: str
    """Its digest."""
    url: str
    """Where it is published."""

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256}) from {self.url}"


def find_weights(location: Path, files: Sequence[WeightsFile], expected_sha256: str | None) -> tuple[Path, str]:
    """Finds one of several equivalent files and checks its digest.

    Args:
        location: The file, or the folder that holds it under its name.
        files: The published files, best first.
        expected_sha256: Digest that counts instead of the published ones.

    Returns:
        The file and its sha256.

    Raises:
        ExtractorFileError: There is no such file, or its digest is another.
    """
    paths = [location / file.name for file in files] if location.is_dir() else [location]
    path = next((path for path in paths if path.is_file()), None)
    choice = " or ".join(map(str, files))
    if path is None:
        raise ExtractorFileError(
            f"the weights {' or '.join(map(str, paths))} are missing: fetch {choice}, and put it there"
        )
    digest = sha256_file(path)
    if digest not in ([expected_sha256] if expected_sha256 else [file.sha256 for file in files]):
        wanted = f"sha256 {expected_sha256}" if expected_sha256 else choice
        raise ExtractorFileError(f"{path} has sha256 {digest}, expected {wanted}: fetch the right file again")
    return path, digest


def check_images(images: Tensor) -> None:
    """Raises `ValueError` unless images are uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inference in float32 whatever the caller's settings are: no autocast, no TF32, no choice by timing."""
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
