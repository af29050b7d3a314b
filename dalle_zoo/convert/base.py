"""What a family of foreign weights offers, the registry of families, and a location opened for looking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.registry import Registry

MAX_CONFIG_BYTES = 2**20
"""Longer text is no configuration; vocabularies and merges lie in files of this size and more."""


@dataclass(frozen=True)
class Location:
    """A file or folder of foreign weights, opened for looking: no tensor has been read."""

    path: Path
    checkpoints: tuple[Checkpoint, ...]
    """Files of weights, by name."""
    configs: Mapping[str, dict[str, Any]]
    """JSON and YAML files that hold a mapping, by file name."""
    unread: Mapping[str, str]
    """Other files and why they were not read, by file name."""


@dataclass(frozen=True)
class Source:
    """What a family recognised."""

    family: str
    """Name in `FAMILIES`."""
    location: Path
    """Where it lies."""
    parts: Mapping[str, Mapping[str, StoredTensor]]
    """State dicts by their role ("encoder", "decoder"), prefixes taken off, tensors still on disk."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What was inferred of the architecture: fields of the config of our network."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Where fields come from that the tensors do not tell; for the record."""


class Family(Protocol):
    """Weights of one code base. A class without arguments, registered in `FAMILIES`."""

    title: str
    """What it is called in messages: "OpenAI's discrete VAE"."""
    expects: str
    """How it is known, for the message when nothing is recognised."""

    def recognise(self, location: Location) -> Source | None:
        """The weights of this family at a location, known by keys, shapes and classes; None if there are none.

        Raises:
            WeightFileError: It is this family, but cannot be converted; the message says why.
        """

    def convert(self, source: Source, out: Path) -> dict[str, Any]:
        """Writes component folders (``dvae/`` …) into the existing folder ``out``.

        Returns:
            What was inferred, as plain data, for ``record.json``; with ``description``, ``license`` and ``data`` as in
            `ModelRecord`.
        """


FAMILIES: Registry[type[Family]] = Registry("family of weights", group="dalle_zoo.families")


def look(path: str | Path) -> Location:
    """Opens every file of a location that may hold weights or a configuration. Sub-folders are not searched.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, or a folder of such files")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    checkpoints, configs, unread = [], {}, {}
    for file in files:
        if file.suffix in (".json", ".yaml", ".yml"):
            try:
                configs[file.name] = read_config(file)
            except WeightFileError as error:
                unread[file.name] = str(error)
            continue
        try:
            checkpoints.append(open_checkpoint(file))
        except WeightFileError as error:
            unread[file.name] = str(error)
    return Location(path, tuple(checkpoints), configs, unread)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML file that holds a mapping.

    Raises:
        WeightFileError: It is too long, not of its format, or holds something else.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise WeightFileError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: too long for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise WeightFileError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise WeightFileError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value


def read_tensors(tensors: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the tensors that a network of ours expects; those of the wrong name, shape or dtype are named.

    Args:
        tensors: Stored ones, under our names.
        expected: The network's state dict; may be on the meta device.

    Returns:
        Finite float32 tensors on the CPU.

    Raises:
        WeightFileError: Some are missing, left over, of another shape, not floating point, or not finite.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        stored = tensors[name]
        if stored.shape != tuple(expected[name].shape):
            problems.append(f"{name} has shape {stored.shape}, expected {tuple(expected[name].shape)}")
        elif not stored.dtype.is_floating_point:
            problems.append(f"{name} is {stored.dtype}, expected floating point")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise WeightFileError(f"the weights do not fit: {shown}")
    read = {name: stored.read().float() for name, stored in tensors.items()}
    damaged = [name for name, tensor in read.items() if not tensor.isfinite().all()]
    if damaged:
        raise WeightFileError(
            f"{', '.join(damaged[:5])} hold values that are not finite in float32: the weights are damaged"
        )
    return read
