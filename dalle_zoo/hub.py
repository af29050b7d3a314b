"""Folders of weights: how a network, a tokenizer or a whole model lies on disk, and how it is read back safely.

Weights are safetensors beside a ``config.json``; a model folder lists the sha256 of every file, which loading
verifies. No pickle is read. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_zoo.files import sync, written_aside
from dalle_zoo.models.dvae import DVAE  # noqa: F401 (registers itself)
from dalle_zoo.models.initial import copy_shard
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.registry import suggest

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CHECKSUMS = "sha256.json"


class ModelFolderError(ValueError):
    """A folder that does not hold what was expected; the message says what and what to do."""


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: expected a folder written by dalle-zoo") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False, marker: str = CONFIG) -> Iterator[Path]:
    """Yields a folder to fill beside ``folder``; it takes that place only when the block ends without an error.

    Args:
        folder: Where to; must be new or empty unless ``overwrite``.
        overwrite: Whether an older folder of the same kind is replaced.
        marker: File by which that kind is known; a folder without it is somebody else's and stays.

    Raises:
        FileExistsError: The folder is not empty, and may not be replaced.
        NotADirectoryError: It is a file.
    """
    folder = Path(folder).absolute()  # "." has no name to write beside
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} exists and is not empty: choose another folder or pass --overwrite")
        if not (folder / marker).is_file():
            raise FileExistsError(
                f"{folder} holds other files and is not replaced (it has no {marker}): choose another folder"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        if folder.exists():
            retired = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.replace(retired)
            aside.replace(folder)
            shutil.rmtree(retired)
        else:
            aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def config_from_dict(config_class: type, values: dict[str, Any], where: str) -> Any:
    """Builds a frozen config from plain data; an unknown key raises with the nearest right one."""
    known = [field.name for field in fields(config_class)]
    for name in values:
        if name not in known:
            raise ModelFolderError(f"{where}: {suggest('field', name, known)}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{where}: {error}") from None


# ---------------------------------------------------------------- one network


def save_network(
    net: nn.Module,
    kind: str,
    folder: Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` of a network into an existing folder.

    Args:
        net: Network with a frozen dataclass in ``net.config``.
        kind: Name under which it is found again ("dvae", "prior", …).
        folder: Where to.
        dtype: Precision of the stored weights; as they are if missing.
        weights: Instead of the network's own, which may be shards.
    """
    config: Any = net.config
    tensors = net.state_dict() if weights is None else weights
    save_weights(tensors, {"type": kind, **asdict(config)}, folder, dtype)


def save_weights(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes ``model.safetensors`` and ``config.json`` into an existing folder, as `save_network` does."""
    stored = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in tensors.items()}
    with written_aside(folder / WEIGHTS) as aside:
        save_file(stored, aside, metadata={"format": "pt"})
    write_json(folder / CONFIG, dict(config))


def load_weights(net: nn.Module, path: Path) -> None:
    """Copies a safetensors file into a network; missing, extra and mis-shaped tensors are named."""
    if not path.is_file():
        raise ModelFolderError(f"{path} is missing: expected weights as safetensors")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own bare Exception subclass
        raise ModelFolderError(f"{path} is not a readable safetensors file: {error}") from None
    expected = net.state_dict()
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ModelFolderError(f"{path} does not fit its config.json: {shown}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            copy_shard(expected[name], tensor.to(expected[name].dtype))


def load_image_tokenizer(folder: Path) -> ImageTokenizer:
    """Reads an image tokenizer of any registered kind, in float32 on the CPU, ready for evaluation."""
    values = read_json(Path(folder) / CONFIG)
    cls = IMAGE_TOKENIZERS[values.pop("type", "dvae")]
    net = cls(config_from_dict(cls.config_class, values, str(Path(folder) / CONFIG)))
    load_weights(net, Path(folder) / WEIGHTS)
    return net.eval()


def load_prior(folder: Path) -> Prior:
    """Reads a prior in float32 on the CPU, ready for evaluation."""
    values = read_json(Path(folder) / CONFIG)
    if values.pop("type", None) != "prior":
        raise ModelFolderError(f'{folder}/{CONFIG} is not a prior: expected "type": "prior"')
    net = Prior(config_from_dict(PriorConfig, values, str(Path(folder) / CONFIG)))
    load_weights(net, Path(folder) / WEIGHTS)
    return net.eval()


# ---------------------------------------------------------------- a whole model


def write_checksums(folder: Path) -> None:
    """Lists the sha256 of every file below ``folder`` in ``sha256.json``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {p.relative_to(folder).as_posix(): sha256_file(p) for p in files})


def verify_checksums(folder: Path) -> None:
    """Raises `ModelFolderError` unless every file that ``sha256.json`` lists is there and unchanged."""
    for name, digest in read_json(folder / CHECKSUMS).items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ModelFolderError(f"{folder / CHECKSUMS} names a file outside the folder: {name}")
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing: copy or download the model again")
        if sha256_file(path) != digest:
            raise ModelFolderError(
                f"{path} differs from its sha256 in {CHECKSUMS}: the file is damaged or was changed; copy or download "
                f"the model again, or run write_checksums if the change is yours"
            )
