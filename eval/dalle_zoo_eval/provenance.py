"""Provenance of a result: digests, code, packages, and the identity of the evaluation in a folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle_zoo.files import read_json, write_json

IDENTITY = "run.json"
"""File that identifies the evaluation, or the features, in a folder."""
PACKAGES = ("torch", "torchvision", "torch-fidelity", "transformers", "numpy", "pillow")
"""Packages that numbers depend on besides this one: networks, decoders, arithmetic."""


def digest(plain: Any) -> str:
    """Returns the sha256 of plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def gpu_name(device: str) -> str | None:
    """Returns the name of a GPU; None for any other device."""
    import torch  # here, so that commands without networks start fast

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Returns the versions of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def refuse_other_run(folder: Path, identity: dict[str, Any]) -> None:
    """Raises `ValueError` if a result folder holds another evaluation; the message lists the differences."""
    path = folder / IDENTITY
    if not path.is_file():
        return
    there, now = _leaves(read_json(path)), _leaves(json.loads(json.dumps(identity)))
    differing = sorted(key for key in {*there, *now} if there.get(key) != now.get(key))
    if differing:
        shown = "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(f"{folder} holds another evaluation ({shown}{more}): choose another --out")


def bind(folder: Path, identity: dict[str, Any]) -> None:
    """Records which evaluation a result folder holds."""
    write_json(folder / IDENTITY, identity)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Returns nested mappings as one flat mapping with dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found
