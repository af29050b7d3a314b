"""Downloads models from the Hugging Face Hub, and uploads them.

Of a native model, only the files that its ``sha256.json`` lists are downloaded. huggingface_hub is imported only when
it is needed, so that names can be looked up without it.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dalle_zoo.files import stays_inside, try_read_json
from dalle_zoo.hub_errors import ExternalRepositoryError, HubError, checked_token, explained
from dalle_zoo.model_folder import CARD, CHECKSUMS, INDEX
from dalle_zoo.registry import UnknownNameError, suggest

APP = "app.py"
"""Code of a Space."""
ENDINGS = (".json", ".safetensors", ".md", ".yaml")
"""Types of file that are uploaded and downloaded. None of them can contain code."""
EXTERNAL = (
    *("*.bin", "*.ckpt", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.msgpack"),
    *("*.json", "*.yaml", "*.txt", "*.model"),
)
"""Files of external models that are downloaded: weights, which `dalle_zoo.convert` reads without running code from
them, and files that describe the weights."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to access the Hub."""

    revision: str | None = None
    """Branch, tag or commit. Defaults to the latest commit of the main branch."""
    token: str | None = None
    """Token of a user with read access. Defaults to ``HF_TOKEN``, or to the token stored by `hf auth login`."""
    cache_dir: str | Path | None = None
    """Folder for downloads. Defaults to the cache of huggingface_hub."""
    local_files_only: bool = False
    """Whether to use only the cache, as with ``HF_HUB_OFFLINE=1``. Defaults to False."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", checked_token(self.token))


DEFAULT = Access()


def is_hub_name(location: object) -> bool:
    """Returns whether a value is text of the form ``organization/name``, in characters that the Hub allows.

    Example:
        >>> is_hub_name("org/name"), is_hub_name("./folder"), is_hub_name("runs/prior/mine")
        (True, False, False)
    """
    return isinstance(location, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location, re.ASCII) is not None


def check_hub_name(name: object) -> None:
    """Raises `ValueError` unless a value is a name on the Hub.

    Example:
        >>> check_hub_name("org/name")
        >>> check_hub_name("my-model")
        Traceback (most recent call last):
        ValueError: 'my-model' is not a name on the Hub: expected organization/name
    """
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is not a name on the Hub: expected organization/name")


# ---------------------------------------------------------------- download


def download(name: str, access: Access = DEFAULT, component: str | None = None) -> Path:
    """Downloads a native model to the cache. Cached files are not downloaded again.

    Nothing is verified here: see `dalle_zoo.model_folder.verify_checksums`.

    Args:
        name: ``organization/name``.
        access: How to access the Hub. Defaults to the latest revision, with the stored token.
        component: Download only this component ("dvae", "prior", …) and the files that all components share. Defaults
            to the complete model.

    Returns:
        Folder of the model in the cache. It must not be modified.

    Raises:
        HubError: The repository or revision does not exist, is private, or is not a model of dalle-zoo; or the Hub
            cannot be reached and files are missing from the cache.
        UnknownNameError: The model has no such component.
    """
    check_hub_name(name)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {
        "token": access.token,
        "cache_dir": access.cache_dir,
        "local_files_only": access.local_files_only,
    }
    with _explained(name, access):
        try:
            listing = Path(hf_hub_download(name, CHECKSUMS, revision=access.revision, **options))
        except LocalEntryNotFoundError as error:
            # Offline, the cached files of the repository show whether it contains an external model.
            if _cached(name, access) is None:
                raise
            raise ExternalRepositoryError(f"{name} in the cache has no {CHECKSUMS}") from error
        names = list(_selected(listing, name, component))
        commit = listing.parent.name  # not the branch, which may change between the two requests
        if not _is_offline(access):
            snapshot_download(name, revision=commit, allow_patterns=[CHECKSUMS, *map(_literal, names)], **options)
    missing = [path for path in names if not (listing.parent / path).is_file()]
    if missing:
        raise HubError(
            f"{', '.join(missing[:3])}{' and more' if missing[3:] else ''} of {name} ({commit[:12]}) "
            + ("is not in the cache, and " + _offline(access) if _is_offline(access) else "is not on the Hub")
        )
    return listing.parent


def download_external(name: str, access: Access = DEFAULT, files: Sequence[str] = ()) -> Path:
    """Downloads the weights of an external model to the cache.

    Args:
        name: ``organization/name``.
        access: How to access the Hub. Defaults to the latest revision, with the stored token.
        files: Patterns of the files to download. Defaults to `EXTERNAL`.

    Returns:
        Folder of the files in the cache. It must not be modified.

    Raises:
        HubError: As for `download`; or no file matches the patterns.
    """
    from huggingface_hub import snapshot_download

    patterns = [*(files or EXTERNAL)]
    # A pattern without a folder matches files in any folder, as it does when folders are converted.
    anywhere = [f"*/{pattern}" for pattern in patterns]
    with _explained(name, access):
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, *anywhere], **asdict(access)))
    if not folder.is_dir():
        raise HubError(f"{name} has no file that matches {', '.join(patterns)}")
    return folder


def _cached(name: str, access: Access) -> Path | None:
    """Returns the folder of the revision in the cache, or None if it is not cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Requesting only the checksums means that no file counts as missing in a repository without them.
        options = asdict(replace(access, local_files_only=True))
        return Path(snapshot_download(name, allow_patterns=[CHECKSUMS], **options))
    except LocalEntryNotFoundError:
        return None


def _selected(listing: Path, name: str, component: str | None) -> Iterator[str]:
    """Yields the paths listed in ``sha256.json`` that belong to a component, or all of them."""
    listed = try_read_json(listing)
    if listed is None or INDEX not in listed:
        raise HubError(f"{name} is not a model of dalle-zoo: its {CHECKSUMS} does not list {INDEX}")
    for path in listed:
        if not stays_inside(path) or not path.endswith(ENDINGS):
            raise HubError(
                f"{name} lists {path!r} in {CHECKSUMS}: expected paths inside the repository that end in "
                f"{', '.join(ENDINGS)}"
            )
    components = {path.partition("/")[0] for path in listed if "/" in path}
    if component is not None and component not in components:
        raise UnknownNameError(f"{suggest('component', component, components)} of {name}")
    for path in listed:
        if component is None or path.partition("/")[0] not in components - {component}:
            yield path


def _literal(path: str) -> str:
    """Returns a pattern that matches only this path."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _explained(name: str, access: Access) -> AbstractContextManager[None]:
    """Returns a context in which errors of a download say what to do."""
    return explained(name, revision=access.revision, offline=_offline(access) if _is_offline(access) else None)


def _is_offline(access: Access) -> bool:
    from huggingface_hub import constants

    return access.local_files_only or constants.HF_HUB_OFFLINE


def _offline(access: Access) -> str:
    reason = "local_files_only is set" if access.local_files_only else "HF_HUB_OFFLINE is set"
    return f"{reason}: go online once, or copy the model and pass its folder"


# ---------------------------------------------------------------- upload


def upload(
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    kind: Literal["model", "space"] = "model",
) -> str:
    """Uploads a model, or a Space, as one commit. The repository is created if it does not exist.

    Large files are uploaded first, and are not visible to readers until the commit names all of them. An interrupted
    upload therefore changes nothing, and the next one uploads only what is missing. Files that an earlier publication
    listed in its ``sha256.json``, and that the new one no longer has, are deleted; other files stay.

    Args:
        name: ``organization/name``.
        files: Files, or their contents, by their path in the repository.
        private: Whether to create the repository as private. An existing one must already be private. Defaults to
            False.
        revision: Branch to commit to. It is created if it does not exist. Defaults to the main branch.
        token: Token of a user with write access. Defaults to the stored one.
        kind: Whether the repository is a model or a Space with a page of gradio. Defaults to a model.

    Returns:
        URL of the commit.

    Raises:
        HubError: The Hub refuses the upload or cannot be reached; or a file that was not published by dalle-zoo, or
            a card that was edited on the Hub, would be replaced. The repository is unchanged.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    token = checked_token(token)
    api = HfApi(token=token)
    with explained(name, revision=revision, writes=True):
        sdk, info = (None, api.model_info) if kind == "model" else ("gradio", api.space_info)
        api.create_repo(name, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True)
        if private and not info(name).private:
            raise HubError(f"{name} exists and is public: make it private on the Hub, or omit --private")
        if revision is not None:
            api.create_branch(name, repo_type=kind, branch=revision, exist_ok=True)
        head = info(name, revision=revision)
        existing = {file.rfilename for file in head.siblings or []} - {".gitattributes"}
        earlier = _published_files(name, kind, existing, revision=head.sha, token=token)
        if others := sorted((existing & files.keys()) - earlier - {CARD}):
            raise HubError(
                f"{name} contains {', '.join(others[:3])}, which dalle-zoo did not publish and would replace: "
                "rename or delete it on the Hub"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warnings while validating metadata")
            done = api.create_commit(
                name,
                [
                    *(CommitOperationAdd(path, file) for path, file in sorted(files.items())),
                    *(CommitOperationDelete(path) for path in sorted((existing & earlier) - files.keys())),
                ],
                commit_message=f"{kind.capitalize()} of dalle-zoo, {len(files)} files",
                repo_type=kind,
                revision=revision,
                parent_commit=head.sha,  # the Hub refuses the commit if the branch has moved on
            )
    return str(done.commit_url)


def _published_files(name: str, kind: str, existing: set[str], *, revision: str | None, token: str | None) -> set[str]:
    """Returns the files of the earlier publication in a repository, and protects all that it does not list.

    Raises:
        HubError: The repository contains something else, or its card was edited.
    """
    from huggingface_hub import hf_hub_download

    def read(path: str) -> Path:
        return Path(hf_hub_download(name, path, repo_type=kind, revision=revision, token=token))

    main = INDEX if kind == "model" else APP
    listed = try_read_json(read(CHECKSUMS)) if CHECKSUMS in existing else {}
    if listed is None or (main not in listed and existing - {CARD, "LICENSE"}):
        raise HubError(f"{name} contains files that are not a {kind} of dalle-zoo: choose another name")
    if CARD in existing and not _is_rendered(read(CARD).read_bytes()):
        raise HubError(
            f"{CARD} of {name} was written or edited on the Hub, and would be replaced by the rendered card: put your "
            f"text into the record of the model (save_pretrained(record=...)), delete {CARD} on the Hub, and publish "
            "again"
        )
    return {CHECKSUMS, *listed}


NEW_SPACE = "Check out the configuration reference at https://"
"""All text of the card that the Hub writes for a new Space, up to the address."""
STAMP = "\n<!-- Rendered by dalle-zoo; SHA-256 of the text above: {digest} -->\n"


def stamp_card(text: str) -> str:
    """Appends a digest to a rendered card, by which a card that was edited on the Hub is recognized."""
    return text + STAMP.format(digest=hashlib.sha256(text.encode()).hexdigest())


def _is_rendered(card: bytes) -> bool:
    """Returns whether a card is an unchanged rendered one, or has metadata but no text, as in a new repository."""
    text = card.decode("utf-8", errors="replace")
    own = re.sub(r"\A---\n.*?^---$", "", text, flags=re.MULTILINE | re.DOTALL).strip()
    if not re.sub(r"\A" + NEW_SPACE + r"\S*\Z", "", own):
        return True
    return stamp_card(text[: -len(stamp_card(""))]) == text
