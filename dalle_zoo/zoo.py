"""Models that are known by name, and where their parts lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dalle_zoo import remote
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.remote import Access
from dalle_zoo.results import Figure, figures, results_of

BUNDLED = Path(__file__).parent / "_models"
INDEX = "model_index.json"
RECORD = "record.json"
COMPONENTS = ("dvae", "prior", "tokenizer", "ranker")
"""Parts of a model, each in its folder; the first three make a pipeline."""


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

    @property
    def figures(self) -> list[Figure]:
        """What was measured of it, from result files that belong to its weights."""
        return [figure for result in results_of(self.folder).values() for figure in figures(result)]


def list_models() -> list[ModelRecord]:
    """Records of the bundled models; answers without importing torch."""
    return [
        ModelRecord(name=path.parent.name, folder=path.parent, **json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(BUNDLED.glob(f"*/{RECORD}"))
    ]


def model_names() -> list[str]:
    """Names of the bundled models; answers without importing torch."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


def find_model(location: str | Path, access: Access = remote.DEFAULT) -> Path:
    """Folder of a model: that of a bundled name, a path as it is, or a download from the Hub.

    Args:
        location: Name or folder. Text that is a bundled name is that model, whatever lies in the working directory:
            write a folder of the same name as ``./emoji64``, or pass a `Path`. Text that is neither that nor a folder
            here, ``organisation/name``, is a model of the Hub.
        access: How the Hub is asked.

    Raises:
        UnknownNameError: Neither of the three; the message has the nearest name.
        HubError: The Hub does not have it, or cannot be reached.
    """
    if isinstance(location, str) and location in model_names():
        return BUNDLED / location
    if Path(location).is_dir():
        return Path(location)
    if is_remote(location):
        return remote.download(str(location), access)
    raise UnknownNameError(
        f"{suggest('model', str(location), model_names())}. A folder works as well: ./my-model; "
        "and a model of the Hub: organisation/name"
    )


def find_component(location: str | Path, component: str, access: Access = remote.DEFAULT) -> Path:
    """Folder of one part ("dvae", "prior", "ranker", "tokenizer").

    Args:
        location: A model as `find_model` takes it, or directly the folder of the part. Of a model of the Hub only
            that part is downloaded, and held against its checksums.
        component: Which part.
        access: How the Hub is asked.
    """
    if is_remote(location):
        from dalle_zoo.hub import verify_checksums

        folder = remote.download(str(location), access, component)
        verify_checksums(folder, component)
        return folder / component
    folder = find_model(location)
    if (folder / component).is_dir():
        return folder / component
    if not (folder / INDEX).is_file():
        return folder
    known = [part.name for part in folder.iterdir() if part.is_dir()]
    raise UnknownNameError(f"{suggest('component', component, known)} of {folder}")


def is_remote(location: str | Path) -> bool:
    """Whether a location is a name on the Hub: of that form, and no folder here."""
    return remote.is_hub_name(location) and not Path(location).is_dir()
