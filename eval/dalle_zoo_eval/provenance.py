"""What a result says of where it comes from: digests, code, packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.version import __version__

PACKAGES = ("torch", "torchvision", "torch-fidelity", "transformers", "numpy", "pillow")
"""What numbers depend on besides this package: networks, decoders, arithmetic."""


def digest(plain: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """Version of this package, with the commit where it runs from a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return __version__
    commit = described.stdout.strip()
    return f"{__version__}+{commit}" if commit else __version__


def gpu_name(device: str) -> str | None:
    """Name of the GPU that computes; None where none does."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
