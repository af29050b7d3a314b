"""Layout of a model folder: the names of its files, its index, and its checksums.

A model folder has one subfolder per component, with a ``config.json`` and weights in safetensors. ``sha256.json``
lists the digest of every file; loading verifies them. Nothing here needs torch.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dalle_zoo.files import FileError, read_json, sha256_file, stays_inside, write_json
from dalle_zoo.registry import suggest
from dalle_zoo.version import __version__

COMPONENTS = ("dvae", "prior", "tokenizer", "ranker")
"""Names of the components and of their subfolders. A pipeline needs the first three."""

INDEX = "model_index.json"
"""Lists the components. A folder with this file is a complete model."""
RECORD = "record.json"
"""Describes the model: description, license, training data, and number of parameters."""
CONVERSION = "conversion.json"
"""Lists the external files that the model was converted from. A folder with this file can be converted again, so it
may be replaced."""
SAMPLING = "generation_config.json"
"""How the model is sampled where a call does not say, see `SamplingDefaults`. Without it: plainly."""
CHECKSUMS = "sha256.json"
"""Lists the SHA-256 digest of every file that loading may read."""
CARD = "README.md"
"""The model card."""

CONFIG = "config.json"
"""Configuration of a component. The one of the model folder itself lets the Hub count downloads."""
WEIGHTS = "model.safetensors"
"""Weights of a component."""
ADAPTER = "adapter"
"""Subfolder of the adapters of a prior. A model folder with it has no other component, and is opened on top of the
model that the adapters name."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of adapters, as peft names them."""

NETWORK_FILES = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", "model-[0-9]*-of-[0-9]*.safetensors")
"""Patterns of the files that are written for a network. Nothing else is removed when it is written again."""
MODEL_FILES = (
    *(INDEX, RECORD, CONVERSION, CHECKSUMS, CONFIG, SAMPLING),
    *(f"{component}/{name}" for component in ("dvae", "prior") for name in NETWORK_FILES),
    *("tokenizer/*", "ranker/*", f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}"),
)
"""Patterns of the files that are written for a model. A folder with other files is not replaced."""


class ModelFolderError(FileError):
    """A model folder, or the folder of a component, lacks something or does not match its configuration."""


def config_from_dict(config_class: type, values: dict[str, Any], where: str) -> Any:
    """Builds a configuration dataclass from plain data.

    Args:
        config_class: The dataclass.
        values: Value of each field.
        where: Where the values come from, for errors.

    Raises:
        ModelFolderError: A field is unknown, and the message suggests the closest name; or a value has another type
            than its field, or is not finite; or the dataclass rejects a value.
    """
    known, hints = [field.name for field in fields(config_class)], get_type_hints(config_class)
    for name, value in values.items():
        if name not in known:
            raise ModelFolderError(f"{where}: {suggest('field', name, known)}")
        if not has_type(value, hints[name]):
            if get_origin(hints[name]) is Literal:
                raise ModelFolderError(f"{where}: {suggest(name, str(value)[:100], map(str, get_args(hints[name])))}")
            kind = getattr(hints[name], "__name__", str(hints[name]))
            got = f"{value!r}" if isinstance(value, str | int | float | None) else type(value).__name__
            raise ModelFolderError(f"{where}: {name} must be of the type {kind}, got {got[:100]}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{where}: {error}") from None


def has_type(value: Any, hint: Any) -> bool:
    """Returns whether plain data has the type of a configuration field; a list counts as a tuple.

    Args:
        value: A value of JSON or YAML.
        hint: The annotation. Only plain types, None, literals, tuples and unions of these are checked.

    Example:
        >>> has_type([1, 2], tuple[int, ...]), has_type(True, int), has_type(float("nan"), float)
        (True, False, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str | int) and value in arguments
    if origin is tuple and isinstance(value, list | tuple):
        repeated = arguments[-1] is Ellipsis
        parts = arguments[:1] * len(value) if repeated else arguments
        return len(parts) == len(value) and all(map(has_type, value, parts))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if hint in (int, bool, str, NoneType):
        return type(value) is hint
    return origin is not tuple


def write_index(folder: Path) -> None:
    """Writes ``model_index.json`` and the ``config.json`` of a model folder from the components that it contains."""
    components = {name: ["dalle_zoo", name] for name in (*COMPONENTS, ADAPTER) if (folder / name).is_dir()}
    index = {"_class_name": "DallePipeline", "_dalle_zoo_version": __version__, **components}
    write_json(folder / INDEX, index)
    write_json(folder / CONFIG, {"model_type": "dalle-zoo", "components": sorted(components)})


def write_checksums(folder: Path) -> None:
    """Writes ``sha256.json`` with the digest of every file in a folder, except itself and the model card."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p not in (folder / CHECKSUMS, folder / CARD))
    write_json(folder / CHECKSUMS, {p.relative_to(folder).as_posix(): sha256_file(p) for p in files})


def read_checksums(folder: Path) -> dict[str, str]:
    """Reads ``sha256.json``.

    Returns:
        Digest of each file, keyed by its path relative to the folder.

    Raises:
        FileError: ``sha256.json`` is missing or damaged.
    """
    return read_json(folder / CHECKSUMS, "a folder written by dalle-zoo")


def substitute_hint(path: Path) -> str:
    """Returns a suggestion, for the end of an error, if a file only stands for another; else an empty string."""
    with path.open("rb") as file:
        begin = file.read(200)
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        return ". It is a pointer of Git LFS and not the file itself: run `git lfs pull` in its repository"
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return ". It is an HTML page, such as a login or an error page, and not the file itself: download it again"
    return ""


def verify_checksums(folder: Path, component: str | None = None) -> None:
    """Checks that every file listed in ``sha256.json`` exists and is unchanged.

    Args:
        folder: A model folder.
        component: Check only the files of this component. Defaults to all files.

    Raises:
        ModelFolderError: A listed file is missing or changed, or is outside the folder.
        FileError: ``sha256.json`` is missing or damaged.
    """
    converted = (folder / CONVERSION).is_file()
    suggestion = f"delete {folder} and convert again" if converted else "copy or download the model again"
    for name, digest in read_checksums(folder).items():
        if component is not None and not name.startswith(f"{component}/"):
            continue
        path = folder / name
        if not stays_inside(name):  # only the name is checked: files in the Hub's cache are links
            raise ModelFolderError(f"{folder / CHECKSUMS} names a file outside the folder: {name}")
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing: {suggestion}")
        if sha256_file(path) != digest:
            if hint := substitute_hint(path):
                raise ModelFolderError(f"{path} is not the file that {CHECKSUMS} lists{hint}")
            raise ModelFolderError(
                f"{path} differs from its sha256 in {CHECKSUMS}: the file is damaged or was changed; {suggestion}, or "
                f"run write_checksums if you changed it yourself"
            )
