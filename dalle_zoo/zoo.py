"""Models that are known by name, and where their parts lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dalle_zoo.registry import UnknownNameError, suggest

BUNDLED = Path(__file__).parent / "_models"
RECORD = "record.json"


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model without loading it."""

    name: str
    """Name for ``from_pretrained``."""
    description: str
    """One sentence."""
    license: str
    """SPDX identifier of the weights' licence."""
    data: str
    """What it was trained on."""
    parameters: dict[str, int]
    """Parameters of every component."""
    folder: Path
    """Where it lies."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def list_models() -> list[ModelRecord]:
    """Records of the bundled models; answers without importing torch."""
    return [
        ModelRecord(name=path.parent.name, folder=path.parent, **json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(BUNDLED.glob(f"*/{RECORD}"))
    ]


def model_names() -> list[str]:
    """Names of the bundled models; answers without importing torch."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/model_index.json"))


def find_model(location: str | Path) -> Path:
    """Folder of a model: a bundled name, or a path as it is.

    Raises:
        UnknownNameError: Neither a folder nor a bundled name; the message has the nearest name.
    """
    if Path(location).is_dir():
        return Path(location)
    bundled = BUNDLED / str(location)
    if (bundled / "model_index.json").is_file():
        return bundled
    raise UnknownNameError(f"{suggest('model', str(location), model_names())}. A folder works as well.")


def find_component(location: str | Path, component: str) -> Path:
    """Folder of one part ("dvae", "prior", "ranker", "tokenizer").

    Args:
        location: A model by name or folder, or directly the folder of the part.
        component: Which part.
    """
    own = Path(location)
    folder = own if own.is_dir() else BUNDLED / str(location)
    if (folder / component).is_dir():
        return folder / component
    if own.is_dir() and not (own / "model_index.json").is_file():
        return own
    known = [part.name for part in find_model(location).iterdir() if part.is_dir()]
    raise UnknownNameError(f"{suggest('component', component, known)} of {folder}")
