"""Finds models and their components by name, in local folders, or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_zoo import hub
from dalle_zoo.files import read_json, try_read_json
from dalle_zoo.hub import Access
from dalle_zoo.hub_errors import ExternalRepositoryError, HubError
from dalle_zoo.model_folder import CHECKSUMS, COMPONENTS, CONFIG, INDEX, RECORD, verify_checksums
from dalle_zoo.model_results import Figure, figures, results_of
from dalle_zoo.paths import user_path
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.values import check_type
from dalle_zoo.workspaces import recover

if TYPE_CHECKING:
    from dalle_zoo.tokenizers import TextTokenizer

BUNDLED = Path(__file__).parent / "_models"
DEFAULT_MODEL = "composition"
"""Name of the bundled model that commands use where none is named."""


@dataclass(frozen=True)
class ModelRecord:
    """Description of a model, available without loading it."""

    name: str
    """Name to pass to ``from_pretrained``."""
    description: str
    """One sentence."""
    license: str
    """SPDX identifier of the license of the weights."""
    data: str
    """Training data."""
    parameters: dict[str, int]
    """Number of parameters of each component."""
    folder: Path
    """Folder of the model."""

    @property
    def num_bytes(self) -> int:
        """Total size of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def figures(self) -> list[Figure]:
        """Measured results, from the result files for these weights."""
        return [figure for result in results_of(self.folder).values() for figure in figures(result)]


def list_models() -> list[ModelRecord]:
    """Returns the records of the bundled models, without importing torch.

    Example:
        >>> [(model.name, model.license) for model in list_models()]
        [('composition', 'Apache-2.0')]
    """
    return [
        ModelRecord(name=path.parent.name, folder=path.parent, **read_json(path))
        for path in sorted(BUNDLED.glob(f"*/{RECORD}"))
    ]


def model_names() -> list[str]:
    """Returns the names of the bundled models, without importing torch."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


def find_model(
    location: str | Path | Sequence[str | Path], access: Access = hub.DEFAULT, files: Sequence[str] = ()
) -> Path:
    """Returns the folder of a bundled, local, downloaded or converted model.

    External weights are converted once, and the result is cached (`dalle_zoo.convert.cached`).

    Args:
        location: Name or path of the model. Text is looked up as the name of a bundled model first, then as a local
            path, then as ``organization/name`` on the Hub. To open a local folder that has the name of a bundled
            model, write ``./composition`` or pass a `Path`. An external model may also be a single file, or several
            locations that belong together.
        access: How to access the Hub. Defaults to the latest revision, with the stored token.
        files: Patterns of the files of an external model to download and to read. Defaults to all.

    Raises:
        UnknownNameError: There is no model of that name; the message suggests the closest one.
        FileNotFoundError: There is no folder at a path.
        TypeError: A location is neither text nor a path.
        HubError: The Hub does not have the model, or cannot be reached.
        WeightFileError: The model is external, and is damaged, incomplete, or more than one model.
    """
    locations = [location] if isinstance(location, str | Path) else location
    check_type("location", locations, Sequence, "a name, a path or a list of them")
    locations = [_as_typed(one) for one in locations]
    check_type("files", files, Sequence, "a list of patterns")
    files = [files] if isinstance(files, str) else files
    if not locations:
        raise ValueError("no location is given: expected a name, a folder, or several locations that belong together")
    places = [find_place(one, access, files) for one in locations]
    if len(places) == 1 and not files and _is_native(places[0]):
        return places[0]
    from dalle_zoo.convert import cached

    folder = cached(places, files)
    if folder is None and not Path(locations[0]).exists():
        raise HubError(
            f"{locations[0]} on the Hub is not a model of dalle-zoo, as it has no {CHECKSUMS}, and it contains no "
            "weights that `dalle-zoo convert` recognizes"
        )
    return folder or places[0]


def _as_typed(location: str | Path) -> str | Path:
    """Checks a location, and resolves one in a home folder; a name remains text."""
    path = user_path(location, "location")
    return path if str(location).startswith("~") else location


def find_place(location: str | Path, access: Access = hub.DEFAULT, files: Sequence[str] = ()) -> Path:
    """Returns the local file or folder of one location, without converting it. Arguments are those of `find_model`."""
    check_location(location)
    if isinstance(location, str) and location in model_names():
        return BUNDLED / location
    if not is_remote(location):
        return Path(location)
    try:
        return hub.download(str(location), access)
    except ExternalRepositoryError:
        return hub.download_external(str(location), access, files)


def check_location(location: str | Path) -> None:
    """Raises an error unless a location is a bundled name, exists here or may be on the Hub, which is not asked.

    Raises:
        UnknownNameError: There is no bundled model of that name; the message suggests the closest one.
        FileNotFoundError: There is nothing at a path.
    """
    if isinstance(location, str) and location in model_names():
        return
    recover(Path(location).absolute())
    if Path(location).exists() or is_remote(location):
        return
    if isinstance(location, Path) or "/" in location:
        raise FileNotFoundError(_missing(location))
    raise UnknownNameError(
        f"{suggest('model', location, model_names())}. A local folder (./my-model) or a model on the Hub "
        "(organization/name) can be given as well"
    )


def _is_native(folder: Path) -> bool:
    """Returns whether a folder is a native or converted model, or has components that name their type."""
    if (folder / INDEX).is_file() or (folder / RECORD).is_file():
        return True
    configs = (try_read_json(folder / name / CONFIG) for name in ("", *COMPONENTS))
    return any(config is not None and "type" in config for config in configs)


def find_component(
    location: str | Path | Sequence[str | Path],
    component: str,
    access: Access = hub.DEFAULT,
    files: Sequence[str] = (),
) -> Path:
    """Returns the folder of one component of a model.

    Args:
        location: A model as for `find_model`, or the folder of the component itself. Of a native model on the Hub,
            only the component is downloaded, and its checksums are verified.
        component: Name of the component ("dvae", "prior", "ranker", "tokenizer").
        access: How to access the Hub. Defaults to the latest revision, with the stored token.
        files: As for `find_model`.

    Raises:
        UnknownNameError: The model has no such component. Other errors are those of `find_model`.
    """
    check_type("component", component, str, f"one of {', '.join(COMPONENTS)}")
    folder = _download_component(location, component, access) or find_model(location, access, files)
    if (folder / component).is_dir():
        return folder / component
    if not (folder / INDEX).is_file() and not (folder / RECORD).is_file():
        return folder
    known = [path.name for path in folder.iterdir() if path.is_dir()]
    raise UnknownNameError(f"{suggest('component', component, known)} of {folder}")


def model_component(location: str | Path | None, component: str) -> Path | None:
    """Returns the folder of a component of a complete model; None if the location is not one or lacks the component.

    Args:
        location: As for `find_component`; None for no model.
        component: Name of the component.
    """
    if location is None:
        return None
    try:
        folder = find_component(location, component)
    except UnknownNameError:
        return None
    return folder if folder.name == component else None  # a component of another kind is returned as it is


def open_text_tokenizer(location: str | Path) -> TextTokenizer:
    """Opens the text tokenizer of a model or in a folder, or builds one of a kind that needs no training.

    Args:
        location: As for `find_component`, or the name of such a kind, ``byte``, which wins over a folder: write
            ``./byte`` for that.
    """
    from dalle_zoo.tokenizers import fresh_text_tokenizer, load_text_tokenizer

    fresh = fresh_text_tokenizer(location) if isinstance(location, str) else None
    return fresh or load_text_tokenizer(find_component(location, "tokenizer"))


def _download_component(location: object, component: str, access: Access) -> Path | None:
    """Downloads one component of a native model; returns None if the location is not a native model on the Hub."""
    if not isinstance(location, str) or not is_remote(location):
        return None
    try:
        folder = hub.download(location, access, component)
    except ExternalRepositoryError:
        return None
    verify_checksums(folder, component)
    return folder


def is_remote(location: str | Path) -> bool:
    """Returns whether a location has the form of a name on the Hub, and no folder here has its organization's name."""
    return hub.is_hub_name(location) and not Path(location).parent.exists()


def _missing(location: str | Path) -> str:
    """Error message for a path where there is no file or folder."""
    text = f"no folder {location}: check its name"
    if hub.is_hub_name(location):
        return f"{text}, or run the command where there is no folder {Path(location).parent} to look it up on the Hub"
    return f"{text}. Names of models: {', '.join(model_names())}, or organization/name on the Hub"
