"""Models from the Hub: what a repository lists in its ``sha256.json`` is downloaded to the cache, and nothing else.

The Hub's client is imported when it is needed, so that names can be looked up without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dalle_zoo.files import stays_inside
from dalle_zoo.registry import UnknownNameError, suggest

LIST = "sha256.json"
"""Names every file that loading may read, with its digest."""
ENDINGS = (".json", ".safetensors", ".md", ".yaml")
"""Kinds of file that are published and downloaded: none of them can hold code."""
EXTERNAL = (
    *("*.bin", "*.ckpt", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.msgpack"),
    *("*.json", "*.yaml", "*.txt", "*.model"),
)
"""Files of other code bases that are downloaded: weights, which `dalle_zoo.convert` reads without running anything,
and what describes them."""


class HubError(ValueError):
    """The Hub does not have what was asked for, does not give it, or cannot be reached; the message says which."""


class ExternalRepositoryError(HubError):
    """A repository without the list of files that ours have: weights of another code base, or no model."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the Hub is asked."""

    revision: str | None = None
    """Branch, tag or commit. Defaults to the newest of the main branch."""
    token: str | None = None
    """Of a user who may read; the one that `hf auth login` stored, or of ``HF_TOKEN``, if missing."""
    cache_dir: str | Path | None = None
    """Where downloads lie. Defaults to the Hub's own cache."""
    local_files_only: bool = False
    """Ask only the cache, as with ``HF_HUB_OFFLINE=1``."""


DEFAULT = Access()


def is_hub_name(location: object) -> bool:
    """Whether text has the form ``organisation/name``, of which the Hub allows letters, digits, points, and dashes.

    Example:
        >>> is_hub_name("org/name"), is_hub_name("./folder"), is_hub_name("runs/prior/mine")
        (True, False, False)
    """
    return isinstance(location, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location, re.ASCII) is not None


def download(name: str, access: Access = DEFAULT, component: str | None = None) -> Path:
    """Brings a model of the Hub into the cache; what is there already is not asked for again.

    Nothing is verified: see `hub.verify_checksums`.

    Args:
        name: ``organisation/name``.
        access: How to ask.
        component: Only this part ("dvae", "prior", …) and what belongs to all.

    Returns:
        Folder of the model, to read and not to change.

    Raises:
        HubError: There is no such repository or revision, it is private, it is no model of dalle-zoo, or the Hub
            cannot be reached and the cache lacks something.
        UnknownNameError: It has no such component.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: dict[str, Any] = {
        "token": access.token,
        "cache_dir": access.cache_dir,
        "local_files_only": access.local_files_only,
    }
    with _explained(name, access):
        try:
            listing = Path(hf_hub_download(name, LIST, revision=access.revision, **asked))
        except LocalEntryNotFoundError as error:  # offline; what is there of the repository says whose it is
            if _cached(name, access) is None:
                raise
            raise ExternalRepositoryError(f"{name} in the cache has no {LIST}") from error
        names = list(_wanted(listing, name, component))
        commit = listing.parent.name  # not the branch, which may move on between two questions
        if not _is_offline(access):
            snapshot_download(name, revision=commit, allow_patterns=[LIST, *map(_literal, names)], **asked)
    missing = [path for path in names if not (listing.parent / path).is_file()]
    if missing:
        raise HubError(
            f"{', '.join(missing[:3])}{' and more' if missing[3:] else ''} of {name} ({commit[:12]}) "
            + ("is not in the cache, and " + _offline(access) if _is_offline(access) else "is not on the Hub")
        )
    return listing.parent


def download_external(name: str, access: Access = DEFAULT, files: Sequence[str] = ()) -> Path:
    """Brings weights of another code base into the cache.

    Args:
        name: ``organisation/name``.
        access: How to ask.
        files: Patterns of the files to download. Defaults to `EXTERNAL`.

    Returns:
        Folder of the files, to read and not to change.

    Raises:
        HubError: As of `download`.
    """
    from huggingface_hub import snapshot_download

    patterns = [*(files or EXTERNAL)]
    # As `dalle_zoo.convert.look` does, a pattern without folders means files in any.
    anywhere = [f"*/{pattern}" for pattern in patterns]
    with _explained(name, access):
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, *anywhere], **asdict(access)))
    if not folder.is_dir():
        raise HubError(f"{name} has no file that matches {', '.join(patterns)}")
    return folder


def _cached(name: str, access: Access) -> Path | None:
    """Folder of the revision in the cache; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Only the list is asked for: of a repository without one nothing is then missing.
        asked = asdict(replace(access, local_files_only=True))
        return Path(snapshot_download(name, allow_patterns=[LIST], **asked))
    except LocalEntryNotFoundError:
        return None


def _wanted(listing: Path, name: str, component: str | None) -> Iterator[str]:
    """Paths that the list of a repository names, as far as they are asked for."""
    try:
        listed = json.loads(listing.read_text(encoding="utf-8"))
    except ValueError:
        listed = None
    if not isinstance(listed, dict) or "model_index.json" not in listed:
        raise HubError(f"{name} is no model of dalle-zoo: its {LIST} does not list a model_index.json")
    for path in listed:
        if not stays_inside(path) or not path.endswith(ENDINGS):
            raise HubError(f"{name} lists {path!r} in {LIST}: expected files inside it, of {', '.join(ENDINGS)}")
    parts = {path.partition("/")[0] for path in listed if "/" in path}
    if component is not None and component not in parts:
        raise UnknownNameError(f"{suggest('component', component, parts)} of {name}")
    for path in listed:
        if component is None or path.partition("/")[0] not in parts - {component}:
            yield path


def _literal(path: str) -> str:
    """A path as a pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


@contextmanager
def _explained(name: str, access: Access) -> Iterator[None]:
    """Turns the errors of the Hub's client into ones that say what to do."""
    from huggingface_hub import constants, errors

    where = f"{name} on {constants.ENDPOINT}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{where} is gated: ask for access on its page, and give the token of that user") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no {where}, or it is private and the token may not read it: check the name and `hf auth login`,"
            f" or pass token= (a folder must be there: {name!r} is none here)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{where} has no revision {access.revision!r}: see its branches and tags") from error
    except errors.LocalEntryNotFoundError as error:
        if _is_offline(access):
            at = f" at revision {access.revision!r}" if access.revision else ""
            raise HubError(
                f"{name}{at} is neither a folder here nor in the cache of the Hub, and {_offline(access)}"
            ) from error
        raise HubError(
            f"{where} cannot be reached, and the cache does not have it: check the network, or name a folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ExternalRepositoryError(f"{where} is no model of dalle-zoo: it has no {LIST}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{where} answered: {error}") from error


def _is_offline(access: Access) -> bool:
    from huggingface_hub import constants

    return access.local_files_only or constants.HF_HUB_OFFLINE


def _offline(access: Access) -> str:
    reason = "local_files_only is set" if access.local_files_only else "HF_HUB_OFFLINE is set"
    return f"{reason}: go online once, or copy the model and name its folder"
