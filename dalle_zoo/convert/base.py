"""What a family of foreign weights offers, the registry of families, and a location opened for looking."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from torch import Tensor

from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.hub import Lazy
from dalle_zoo.registry import Registry

MAX_CONFIG_BYTES = 2**20
"""Longer text is no configuration; vocabularies and merges lie in files of this size and more."""
MAX_FILES = 1000
"""Files of a location; what has more is no folder of weights."""


@dataclass(frozen=True)
class Location:
    """Files of foreign weights, opened for looking: no tensor has been read."""

    path: str
    """What was given, for messages."""
    checkpoints: tuple[Checkpoint, ...]
    """Files of weights, by name."""
    configs: Mapping[str, dict[str, Any]]
    """JSON and YAML files that hold a mapping, by file name."""
    unread: Mapping[str, str]
    """Other files and why they were not read, by file name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """All files, by name; one of a sub-folder as ``tokenizer/vocab.json``."""


@dataclass(frozen=True)
class Source:
    """What a family recognised."""

    family: str
    """Name in `FAMILIES`."""
    location: str
    """Where it lies, for messages."""
    parts: Mapping[str, Mapping[str, StoredTensor]]
    """State dicts by their role ("encoder", "decoder"), prefixes taken off, tensors still on disk."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What was inferred of the architecture: fields of the config of our network."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Where fields come from that the tensors do not tell; for the record."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Vocabularies and the like, by their role."""
    image_tokenizer: Source | None = None
    """Beside a prior: weights of the image tokenizer that lie at the same place."""


class Family(Protocol):
    """Weights of one code base. A class without arguments, registered in `FAMILIES`."""

    title: str
    """What it is called in messages: "OpenAI's discrete VAE"."""
    expects: str
    """How it is known, for the message when nothing is recognised."""
    whole: ClassVar[bool]
    """Whether it has a prior, beside which image tokenizers are parts and not models of their own."""

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


def look(paths: str | Path | Sequence[str | Path], only: Sequence[str] = ()) -> Location:
    """Opens every file that may hold weights or a configuration.

    Args:
        paths: A file, a folder, which is searched with its sub-folders but no deeper, or several of both, which
            together make one location.
        only: Patterns of file names to look at, such as ``*_mini.pt``; all files if missing.

    Raises:
        FileNotFoundError: Nothing is there, or nothing that a pattern matches.
        WeightFileError: Two files have one name, or there are more than a folder of weights has.
    """
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    files: dict[str, Path] = {}
    for path in given:
        for name, file in _files(path):
            if files.setdefault(name, file) != file:
                raise WeightFileError(f"{file} and {files[name]} have one name: rename one, or give only one")
            if len(files) > MAX_FILES:
                raise WeightFileError(f"{path} has more than {MAX_FILES} files: give the folder of the weights alone")
    for pattern in only:
        if not any(Path(name).match(pattern) for name in files):
            raise FileNotFoundError(f"no file matches {pattern!r}: there are {', '.join(files) or 'none'}")
    if only:
        files = {name: file for name, file in files.items() if any(Path(name).match(pattern) for pattern in only)}
    checkpoints, configs, unread = [], {}, {}
    for name, file in files.items():
        try:
            if file.suffix in (".json", ".yaml", ".yml"):
                configs[name] = read_config(file)
            else:
                checkpoints.append(open_checkpoint(file))
        except WeightFileError as error:
            unread[name] = str(error)
    return Location(" and ".join(map(str, given)), tuple(checkpoints), configs, unread, files)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Names and files of one path that was given."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, or a folder of such files")
    if path.is_file():
        yield path.name, path
        return
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            yield entry.name, entry
        elif entry.is_dir() and not entry.name.startswith("."):
            yield from ((f"{entry.name}/{file.name}", file) for file in sorted(entry.iterdir()) if file.is_file())


def image_tokenizer_in(location: Location, without: Collection[Checkpoint] = ()) -> Source | None:
    """The image tokenizer that lies beside a prior; None if there is none.

    Args:
        location: Where the prior lies.
        without: Files to leave out: those of the prior, unless they hold the image tokenizer too.

    Raises:
        WeightFileError: There are several, or it is damaged.
    """
    rest = replace(location, checkpoints=tuple(c for c in location.checkpoints if c not in without))
    families = [FAMILIES[name]() for name in FAMILIES]
    found = [source for f in families if not f.whole and (source := f.recognise(rest)) is not None]
    if len(found) > 1:
        several = " and ".join(source.family for source in found)
        raise WeightFileError(f"{location.path} holds image tokenizers of {several}: give only the one of the prior")
    return found[0] if found else None


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


def check_fit(tensors: Mapping[str, Lazy], expected: Mapping[str, Tensor]) -> None:
    """Raises `WeightFileError` with names unless all tensors are there, no other, each of its shape and of floats."""
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
    check_fit(tensors, expected)
    read = {name: stored.read().float() for name, stored in tensors.items()}
    damaged = [name for name, tensor in read.items() if not tensor.isfinite().all()]
    if damaged:
        raise WeightFileError(
            f"{', '.join(damaged[:5])} hold values that are not finite in float32: the weights are damaged"
        )
    return read
