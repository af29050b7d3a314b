"""Where a result comes from: digests, code, packages, and which evaluation a folder holds."""

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

from dalle_zoo.files import read_json, write_json
from dalle_zoo.version import __version__

IDENTITY = "run.json"
"""File that says which evaluation, or which features, a folder holds."""
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


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` if a result folder holds another evaluation; the message names what differs."""
    path = folder / IDENTITY
    if not path.is_file():
        return
    there, now = _leaves(read_json(path)), _leaves(json.loads(json.dumps(identity)))
    differing = sorted(key for key in {*there, *now} if there.get(key) != now.get(key))
    if differing:
        shown = "; ".join(f"{key}: there {there.get(key)!r}, now {now.get(key)!r}" for key in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"{folder} holds another evaluation ({shown}{more}): choose another --out")


def bind(folder: Path, identity: dict[str, Any]) -> None:
    """Records which evaluation a result folder holds."""
    write_json(folder / IDENTITY, identity)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found
