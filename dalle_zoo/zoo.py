"""Models that are known by name, and where their parts lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_zoo import remote
from dalle_zoo.folders import COMPONENTS, INDEX, RECORD
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.remote import Access
from dalle_zoo.results import Figure, figures, results_of

BUNDLED = Path(__file__).parent / "_models"


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model without loading it."""

    name: str
    """Name for ``from_pretrained``."""
    description: str
    """One sentence."""
    license: str
    """SPDX identifier of the weights' license."""
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


def find_model(
    location: str | Path | Sequence[str | Path], access: Access = remote.DEFAULT, files: Sequence[str] = ()
) -> Path:
    """Folder of a model: that of a bundled name, a path as it is, a download from the Hub, or a conversion.

    Weights of another code base are converted, once, into a cache (`dalle_zoo.convert.cached`).

    Args:
        location: Name or folder. Text that is a bundled name is that model, whatever lies in the working directory:
            write a folder of the same name as ``./emoji64``, or pass a `Path`. Text that is neither that nor a path
            here, ``organisation/name``, is a model of the Hub. Of other code bases also a file, or several locations
            that belong together.
        access: How the Hub is asked.
        files: Of another code base, patterns of the file names to look at and to download. Defaults to all.

    Raises:
        UnknownNameError: Neither of these; the message has the nearest name.
        HubError: The Hub does not have it, or cannot be reached.
        WeightFileError: It is of another code base, but damaged, incomplete or of several models.
    """
    locations = [location] if isinstance(location, str | Path) else list(location)
    files = [files] if isinstance(files, str) else files
    if not locations:
        raise ValueError("no location was given: expected a name, a folder, or several that belong together")
    places = [find_place(one, access, files) for one in locations]
    if len(places) == 1 and not files and _is_native(places[0]):
        return places[0]
    from dalle_zoo.convert import cached

    folder = cached(places, files)
    if folder is None and not Path(locations[0]).exists():
        raise remote.HubError(
            f"{locations[0]} on the Hub is no model of dalle-zoo, it has no {remote.LIST}, and holds no weights of a "
            "code base that `dalle-zoo convert` knows"
        )
    return folder or places[0]


def find_place(location: str | Path, access: Access = remote.DEFAULT, files: Sequence[str] = ()) -> Path:
    """File or folder of one location as `find_model` takes it, whatever lies there; nothing is converted."""
    if isinstance(location, str) and location in model_names():
        return BUNDLED / location
    if Path(location).exists():
        return Path(location)
    if is_remote(location):
        try:
            return remote.download(str(location), access)
        except remote.ExternalRepositoryError:
            return remote.download_external(str(location), access, files)
    raise UnknownNameError(
        f"{suggest('model', str(location), model_names())}. A folder works as well: ./my-model; "
        "and a model of the Hub: organisation/name"
    )


def _is_native(folder: Path) -> bool:
    """Whether it is a native model, a conversion, a part, or several, whose configurations name their type."""
    if (folder / INDEX).is_file() or (folder / RECORD).is_file():
        return True
    return any(_names_its_type(folder / part / "config.json") for part in ("", *COMPONENTS))


def _names_its_type(config: Path) -> bool:
    try:
        return "type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def find_component(
    location: str | Path | Sequence[str | Path],
    component: str,
    access: Access = remote.DEFAULT,
    files: Sequence[str] = (),
) -> Path:
    """Folder of one part ("dvae", "prior", "ranker", "tokenizer").

    Args:
        location: A model as `find_model` takes it, or directly the folder of the part. Of a native model on the Hub
            only that part is downloaded, and held against its checksums.
        component: Which part.
        access: How the Hub is asked.
        files: As for `find_model`.
    """
    folder = _remote_component(location, component, access) or find_model(location, access, files)
    if (folder / component).is_dir():
        return folder / component
    if not (folder / INDEX).is_file() and not (folder / RECORD).is_file():
        return folder
    known = [part.name for part in folder.iterdir() if part.is_dir()]
    raise UnknownNameError(f"{suggest('component', component, known)} of {folder}")


def _remote_component(location: object, component: str, access: Access) -> Path | None:
    """Download of a native model with this part alone; None if it is not on the Hub or not ours."""
    if not isinstance(location, str) or not is_remote(location):
        return None
    from dalle_zoo.hub import verify_checksums

    try:
        folder = remote.download(location, access, component)
    except remote.ExternalRepositoryError:
        return None
    verify_checksums(folder, component)
    return folder


def is_remote(location: str | Path) -> bool:
    """Whether a location is a name on the Hub: of that form, and no path here."""
    return remote.is_hub_name(location) and not Path(location).exists()
