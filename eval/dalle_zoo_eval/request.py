"""The request of an evaluation: what to evaluate, with what, and where to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_zoo.sharing import Share
from dalle_zoo_eval.datasets import load_exclusions
from dalle_zoo_eval.protocol import COPY, Protocol


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, with what, and where to write."""

    protocol: str | Protocol
    """Name of a protocol, a YAML file, or a protocol."""
    out: Path
    """Result file (``.json``), or output folder."""
    data: Path | None = None
    """Folder of the dataset. Defaults to None, for datasets that need none."""
    model: str | None = None
    """Model that generates images. Defaults to that of the protocol, unless ``images`` is given."""
    images: Path | None = None
    """Images of another system, instead of a model: a folder, or a manifest."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the result file says of the evaluated images besides what is found; a ``name`` replaces that of the
    folder."""
    dataset_record: Mapping[str, Any] = field(default_factory=dict)
    """The same for the real images."""
    reference: Path | None = None
    """File of statistics in the place of the real images."""
    save_reference: Path | None = None
    """File to which the statistics of the real images are written."""
    layout: str | None = None
    """Layout of the dataset. Defaults to the protocol's first layout."""
    networks: Mapping[str, Path] = field(default_factory=dict)
    """File or folder of every extractor."""
    leave_out: tuple[str, ...] = ()
    """Extractors to omit, with their metrics."""
    exclusions: Path | None = None
    """List of dataset images to exclude."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Protocol.changed`: captions, candidates and sampling other than the protocol's."""
    training: str | None = None
    """Training images for the memorization check: folder, shards, or a pattern of shards."""
    threshold: float = COPY
    """Minimum cosine similarity of a copy."""
    copies_network: str | None = None
    """Extractor that searches for copies. Defaults to Inception, or else the first one."""
    save_images: bool = False
    """Whether the generated images are also written as PNG files."""
    cache: Path | None = None
    """Folder of features and codes, which several evaluations may share. Defaults to ``.cache`` next to the result
    file."""
    device: str = "cpu"
    """Device of the networks."""
    batch_size: int | None = None
    """Images generated at once. Defaults to `BATCH`."""
    share: Share = field(default_factory=Share)
    """Part of the work that this process begins with."""
    overwrite: bool = False
    """Whether the result of another evaluation is replaced."""
    command: str | None = None
    """Command line, for the record."""

    def excluded(self, protocol: Protocol) -> frozenset[str]:
        """Returns the keys of the images that a protocol excludes.

        Raises:
            ValueError: The protocol excludes images and there is no list, or the reverse; or the list is wrong.
        """
        excludes = any(group.captions.exclusions for group in protocol.groups.values())
        if excludes and self.exclusions is None:
            raise ValueError(
                f"{protocol.name} excludes images that overlap with the training set: give their list with "
                "--exclusions FILE (dalle-zoo overlap writes one)"
            )
        if self.exclusions is not None and not excludes:
            raise ValueError(
                f"{protocol.name} excludes no images: leave out --exclusions, or write a protocol that excludes them"
            )
        return load_exclusions(self.exclusions) if self.exclusions is not None else frozenset()
