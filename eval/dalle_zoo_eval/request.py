"""What is to be evaluated, and with what."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_zoo_eval.features import Share
from dalle_zoo_eval.protocol import COPY


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and with what."""

    protocol: str
    """Name or YAML file."""
    out: Path
    """Result file (``.json``), or folder of the result."""
    data: Path | None = None
    """Folder of the dataset, where the protocol's has none of its own."""
    model: str | None = None
    """Model that generates images. Defaults to that of the protocol, unless ``images`` is given."""
    images: Path | None = None
    """Folder of images that were generated elsewhere, instead of a model."""
    layout: str | None = None
    """Layout of the dataset. Defaults to the protocol's usual one."""
    networks: Mapping[str, Path] = field(default_factory=dict)
    """File or folder of every extractor."""
    leave_out: tuple[str, ...] = ()
    """Extractors that the protocol needs and that are not at hand: their metrics are left out."""
    exclusions: Path | None = None
    """List of images of the dataset to leave out."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Protocol.changed`: captions, candidates and sampling other than the protocol's."""
    training: str | None = None
    """Training images for the memorization check: folder, shards, or a pattern of shards."""
    threshold: float = COPY
    """Cosine from which an image counts as a copy."""
    copies_network: str | None = None
    """Extractor that looks for copies. Defaults to Inception, or else the first one."""
    save_images: bool = False
    """Whether PNG files of the generated images are written too, while they are measured."""
    cache: Path | None = None
    """Folder of features and codes, which several evaluations may share. Defaults to ``.cache`` in the folder of the
    result file."""
    device: str = "cpu"
    """Where the networks compute."""
    batch_size: int | None = None
    """Images generated at once. Defaults to `BATCH`."""
    share: Share = field(default_factory=Share)
    """Which part of the work this process begins with."""
    overwrite: bool = False
    """Whether the result of another evaluation is replaced."""
    command: str | None = None
    """Command line that asks for it, for the record."""


def share_of_environment() -> Share:
    """The share that torchrun or another launcher gives this process."""
    return Share(rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")))


def device_of_environment(device: str) -> str:
    """``cuda`` becomes the GPU that torchrun gives this process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device
