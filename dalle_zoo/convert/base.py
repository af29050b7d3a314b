"""What a family of external weights offers, the registry of families, and a location opened for looking."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from torch import Tensor

from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.registry import Registry
from dalle_zoo.weights import Lazy

CONFIGS = (".json", ".yaml", ".yml")
"""Endings of files that are read as configurations."""
MAX_CONFIG_BYTES = 2**20
"""Longer text is no configuration; vocabularies and merges lie in files of this size and more."""
UNKNOWN = "unknown"
"""License and data of weights that anybody may have trained."""
LICENSE_OF_CHECKPOINT = "that of the checkpoint"
"""What is to be said of an unknown license."""
MAX_FILES = 1000
"""Files of a location; what has more is no folder of weights."""


@dataclass(frozen=True)
class Location:
    """Files of external weights, opened for looking: no tensor has been read."""

    path: str
    """What was given, for messages."""
    checkpoints: tuple[Checkpoint, ...]
    """Files of weights, by name."""
    configs: Mapping[str, dict[str, Any]]
    """JSON and YAML files that hold a mapping, by file name."""
    unread: Mapping[str, str]
    """Files that are something else, and why, by file name."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Files that begin as weights do, or are called configurations, and cannot be read; why, by file name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """All files, by name; one of a sub-folder as ``tokenizer/vocab.json``."""


@dataclass(frozen=True)
class Source:
    """What a family recognized."""

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
    unused_files: Mapping[str, str] = field(default_factory=dict)
    """Files of weights at the same place of which nothing is taken, and what they hold, by file name."""

    def weight_files(self) -> set[Path]:
        """Files that tensors are read from."""
        own = {tensor.storage.path for part in self.parts.values() for tensor in part.values()}
        return own | (self.image_tokenizer.weight_files() if self.image_tokenizer is not None else set())


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is known of weights that a family converted, as plain data, for ``record.json``."""

    description: str
    """One sentence."""
    license: str = UNKNOWN
    """SPDX identifier of the weights' license, "other" where there is none, or "unknown"."""
    license_name: str = ""
    """Its usual name, where it is "other"."""
    license_note: str = ""
    """What to know of it in words."""
    license_text: str = ""
    """Its text, where that must be passed on with the weights."""
    data: str = UNKNOWN
    """What the weights were trained on."""
    inferred: Mapping[str, Any]
    """The architecture: "type", and fields of our config."""
    notes: Mapping[str, str]
    """Where fields come from that the tensors do not tell."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Tensors that were left out: how many of what."""
    parameters: Mapping[str, int]
    """Parameters of every component."""


class Family(Protocol):
    """Weights of one code base. A class without arguments, registered in `FAMILIES`."""

    title: str
    """What it is called in messages: "OpenAI's discrete VAE"."""
    expects: str
    """How it is known, for the message when nothing is recognized."""
    complete: ClassVar[bool]
    """Whether it has a prior, beside which image tokenizers are parts and not models of their own."""

    def recognize(self, location: Location) -> Source | None:
        """The weights of this family at a location, known by keys, shapes and classes; None if there are none.

        Raises:
            WeightFileError: It is this family, but cannot be converted; the message says why.
        """

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes component folders (``dvae/`` …) into the existing folder ``out``.

        Raises:
            WeightFileError: A tensor is missing, of another shape, or damaged.
        """


FAMILIES: Registry[type[Family]] = Registry("family of weights", group="dalle_zoo.families")


def inspect_files(paths: str | Path | Sequence[str | Path], only: Sequence[str] = ()) -> Location:
    """Opens every file that may hold weights or a configuration.

    Args:
        paths: A file, a folder, which is searched with its sub-folders but no deeper, or several of both, which
            together make one location. Where no configuration is among them, those at the usual places belong to
            it: ``NAME.yaml`` beside ``NAME.ckpt``, and a folder ``configs`` beside that of the file.
        only: Patterns of file names to look at, such as ``*_mini.pt``. Defaults to all files.

    Raises:
        FileNotFoundError: Nothing is there, or nothing that a pattern matches.
        WeightFileError: Two files have one name, there are more than a folder of weights has, or something given is
            neither file nor folder.
        ValueError: No path is given, or patterns are not given one by one.
    """
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise ValueError("no location is given: expected files or folders of weights")
    if isinstance(only, str):
        raise ValueError(f"patterns of files must be given as a list, such as [{only!r}], got the text {only!r}")
    files: dict[str, Path] = {}
    for path in given:
        for name, file in _files(path):
            if files.setdefault(name, file) != file:
                raise WeightFileError(f"{file} and {files[name]} have one name: rename one, or give only one")
            if len(files) > MAX_FILES:
                raise WeightFileError(f"{path} has more than {MAX_FILES} files: give the folder of the weights alone")
    if not any(file.suffix in CONFIGS for file in files.values()):
        files |= _companions(files.values())
    for pattern in only:
        if not any(Path(name).match(pattern) for name in files):
            raise FileNotFoundError(f"no file matches {pattern!r}: there are {', '.join(files) or 'none'}")
    if only:
        files = {name: file for name, file in files.items() if any(Path(name).match(pattern) for pattern in only)}
    checkpoints, configs, unread, damaged = [], {}, {}, {}
    for name, file in files.items():
        try:
            if file.suffix in CONFIGS:
                configs[name] = read_config(file)
            else:
                checkpoints.append(open_checkpoint(file))
        except UnrelatedFileError as error:
            unread[name] = str(error)
        except WeightFileError as error:
            damaged[name] = str(error)
    return Location(" and ".join(map(str, given)), tuple(checkpoints), configs, unread, damaged, files)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Names and files of one path that was given."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a file of weights, or a folder of such files")
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise WeightFileError(
            f"{path} is neither a file nor a folder: expected a file of weights, or a folder of such"
        )
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            yield entry.name, entry
        elif entry.is_dir() and not entry.name.startswith("."):
            yield from ((f"{entry.name}/{file.name}", file) for file in sorted(entry.iterdir()) if file.is_file())


def _companions(weights: Iterable[Path]) -> dict[str, Path]:
    """Configurations that belong to files by their place, by name."""
    places = [(file.with_suffix(".yaml"), file.parent.parent / "configs") for file in weights]
    beside = {file.name: file for file, _ in places if file.is_file()}
    runs = [file for folder in dict.fromkeys(folder for _, folder in places) for file in folder.glob("*.yaml")]
    return beside | {f"configs/{file.name}": file for file in sorted(runs) if file.is_file()}


def check_single(location: Location, paths: Sequence[Path], what: str) -> None:
    """Raises `WeightFileError` where several files hold what a model has once ("priors of minDALL-E")."""
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise WeightFileError(
            f"{location.path} holds several {what} ({names}): name the files of one with --files or files="
        )


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
    found = [source for f in families if not f.complete and (source := f.recognize(rest)) is not None]
    if len(found) > 1:
        several = " and ".join(source.family for source in found)
        raise WeightFileError(
            f"{location.path} holds image tokenizers of {several}: name the files of one with --files or files="
        )
    return found[0] if found else None


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON or YAML file that holds a mapping.

    Raises:
        UnrelatedFileError: It is too long, or holds something else.
        WeightFileError: It is not of its format, or has aliases, by which a short file can have any number of values.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        _check_end(path)
        raise UnrelatedFileError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: too long for a configuration")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, _WithoutAliases)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise WeightFileError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise UnrelatedFileError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value


def _check_end(path: Path) -> None:
    """Raises `WeightFileError` if a JSON file, such as a vocabulary too long to be parsed here, was truncated."""
    with path.open("rb") as file:
        file.seek(-64, 2)
        if path.suffix == ".json" and not file.read().rstrip().endswith((b"}", b"]")):
            raise WeightFileError(f"{path} ends within its content: it is truncated or damaged")


class _WithoutAliases(yaml.SafeLoader):
    """Reads plain data in which nothing stands for something else."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not read: write out what they stand for")
        return super().compose_node(parent, index)


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
    """Reads the tensors that a native network expects; those of the wrong name, shape or dtype are named.

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
