"""Describes images, models and the environment as JSON values, for display and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, sha256_file, try_read_json
from dalle_zoo.model_folder import CHECKSUMS, COMPONENTS, CONFIG, RECORD
from dalle_zoo.paths import user_path
from dalle_zoo.tokenizers.words import WORDS_FILE
from dalle_zoo.version import __version__
from dalle_zoo.zoo import find_model

PACKAGES = (
    "torch", "lightning", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow",
    "torchmetrics", "torchao",
)  # fmt: skip
"""Distributions whose versions `describe_environment` states."""


def describe_image(path: str | Path) -> dict[str, Any]:
    """Describes an image that dalle-zoo generated.

    Args:
        path: Path of the PNG file.

    Returns:
        Its size and everything that it was generated with, see `ImageSettings`.

    Raises:
        FileError: The file has no settings, or damaged ones.
        OSError: The file cannot be read, or is no image.
    """
    from PIL import Image

    from dalle_zoo.image_settings import read_settings  # loads torch, which a description of a model does not need

    path = user_path(path)
    settings = read_settings(path)
    with Image.open(path) as image:
        width, height = image.size
    return {"image": str(path), "width": width, "height": height, **asdict(settings)}


def describe_model(location: str | Path) -> dict[str, Any]:
    """Describes a model without loading its weights.

    Args:
        location: Name, folder or repository, as for `find_model`.

    Returns:
        License, training data, digest, the known words (None if they are not recorded) and, per component, its
        configuration, number of parameters (None if it is not recorded), size and checksums.

    Raises:
        UnknownNameError: There is no such model.
        FileError: The folder has no component of a model.
        HubError: The Hub does not have the model, or cannot be reached.
    """
    folder = find_model(location)
    record = try_read_json(folder / RECORD) or {}
    checksums = try_read_json(folder / CHECKSUMS) or {}
    parameters = record["parameters"] if isinstance(record.get("parameters"), dict) else {}
    components = {}
    for name in COMPONENTS:
        if (folder / name).is_dir():
            files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
            components[name] = {
                "parameters": parameters.get(name),
                "bytes": sum(path.stat().st_size for path in files),
                "sha256": {path.name: checksums.get(path.relative_to(folder).as_posix()) for path in files},
                "config": try_read_json(folder / name / CONFIG),
            }
    if not components and not record:
        raise FileError(f"{folder} is not a model: expected a folder with some of {', '.join(COMPONENTS)}")
    return {
        "model": str(location),
        "folder": str(folder),
        "description": record.get("description"),
        "license": record.get("license"),
        "data": record.get("data"),
        "digest": sha256_file(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else None,
        "components": components,
        "words": try_read_json(folder / "tokenizer" / WORDS_FILE),
    }


def describe_environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describes what dalle-zoo runs on; contains no paths, names of users or tokens.

    Args:
        packages: Distributions whose versions are stated, None for those that are not installed.
    """
    import torch

    return {
        "dalle_zoo": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "cuda": torch.version.cuda,
        "devices": [
            {"name": properties.name, "memory_bytes": properties.total_memory}
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "mps": torch.backends.mps.is_available(),
    }


def code_version() -> str:
    """Returns the version of this package, with the commit in a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return __version__
    commit = described.stdout.strip()
    return f"{__version__}+{commit}" if commit else __version__


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    """Main memory, bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
