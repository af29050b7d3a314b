"""The rule by which files become data: what training, evaluation and the commands read of a folder or an archive.

docs/train/data.md states the rule for users.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff"}
    | {"ppm", "pgm", "pbm", "pnm", "pfm", "avif", "avifs"}
)
"""Suffixes of image files, in lower case and without the dot: all that Pillow knows of the decoded formats."""
CAPTION_SUFFIXES = frozenset({"txt", "json"})
"""Suffixes of caption files, which have the name of their image."""
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")

OUTPUTS = (
    ("an evaluation", {"run.json", "report.html"}),
    ("an evaluation", {"run.json", ".cache"}),
    ("a report", {"report.md", "report.html"}),
    ("a training run", {"config.yaml", "checkpoints"}),
    ("a training run", {"config.yaml", "metrics"}),
    ("a model", {"model_index.json"}),
)
"""Names of files that together mark a folder written by dalle-zoo, whose images are sheets and plots."""

_NAMED = 3


def suffix_of(path: Path | PurePosixPath) -> str:
    """Suffix in lower case, without the dot."""
    return path.suffix.lower().removeprefix(".")


def is_hidden(path: PurePosixPath) -> bool:
    """Whether a relative path is hidden: a part of it begins with a dot, or is the folder of Mac's archives."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def is_shard(path: Path | PurePosixPath) -> bool:
    """Whether a path has the name of a shard; hidden files such as ``._0.tar`` are not shards."""
    return path.name.lower().endswith(SHARD_ENDINGS) and not is_hidden(PurePosixPath(path.name))


def valid_name(name: str) -> str:
    r"""Returns a name as valid Unicode: bytes that are not UTF-8 are spelled out, so that names stay different.

    Example:
        >>> valid_name(b"caf\xe9.png".decode("utf-8", "surrogateescape"))
        'caf\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Selection:
    """The data in a folder and its subfolders. Paths are relative to the folder."""

    images: tuple[Path, ...]
    """Image files, sorted. Links to missing files and special files are included, and named when they are read."""
    captions: dict[Path, dict[str, Path]]
    """Caption files by suffix, by the path of their image without its suffix."""
    shards: tuple[Path, ...]
    """Shards directly in the folder, sorted."""
    passed_over: dict[str, list[str]]
    """Names of everything else, by the reason."""

    def describe(self) -> str:
        """Describes the read and the ignored files in one line."""
        reasons = [
            f"{len(names)} {reason} ({', '.join(sorted(map(valid_name, names))[:_NAMED])})"
            for reason, names in sorted(self.passed_over.items())
        ]
        return f"{len(self.images)} images" + (f"; ignored: {', '.join(reasons)}" if reasons else "")


def output_kind(names: set[str]) -> str | None:
    """Returns the kind of output of dalle-zoo that a folder with these files is; None for any other folder."""
    return next((kind for kind, marks in OUTPUTS if marks <= names), None)


def select(root: Path) -> Selection:
    """Selects the data in a folder and its subfolders.

    Linked folders are read like others, unless they lead back to a folder that contains them.

    Args:
        root: The folder.

    Raises:
        ValueError: The folder is an output of dalle-zoo.
        OSError: The folder cannot be read.
    """
    images: list[Path] = []
    texts: dict[Path, dict[str, Path]] = defaultdict(dict)
    shards: list[Path] = []
    passed_over: dict[str, list[str]] = defaultdict(list)
    for path in _files(root, passed_over):
        suffix = suffix_of(path)
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix in CAPTION_SUFFIXES:
            known = texts[path.with_suffix("")]
            if suffix not in known or path.suffix == f".{suffix}":  # of two that differ in case, the lower-case one
                known[suffix] = path
        elif is_shard(path) and path.parent == Path():
            shards.append(path)
        else:
            passed_over["archives" if is_shard(path) else "files of other kinds"].append(path.as_posix())
    stems = {path.with_suffix("") for path in images}
    for stem in texts.keys() - stems:
        passed_over["texts without an image"].extend(path.as_posix() for path in texts.pop(stem).values())
    if shards and not images:
        passed_over.pop("texts without an image", None)  # manifest.json, and img2dataset's statistics of shards
    return Selection(tuple(sorted(images)), dict(texts), tuple(sorted(shards)), dict(passed_over))


def _files(root: Path, passed_over: dict[str, list[str]]) -> Iterator[Path]:
    """Yields relative paths of files, also of links to missing ones, that are not hidden."""
    # Every folder with the real paths of those that contain it, which a link must not lead back to.
    pending: list[tuple[Path, tuple[str, ...]]] = [(Path(), (os.path.realpath(root),))]
    while pending:
        folder, above = pending.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            if folder == Path():
                raise
            passed_over["folders that cannot be read"].append(folder.as_posix())
            continue
        if kind := output_kind({entry.name for entry in entries}):
            if folder == Path():
                raise ValueError(
                    f"folder {str(root)!r} is the output of dalle-zoo ({kind}), whose images are sheets and plots: "
                    "name a folder of images"
                )
            passed_over["folders written by dalle-zoo"].append(folder.as_posix())
            continue
        for entry in entries:
            path = folder / entry.name
            if is_hidden(PurePosixPath(entry.name)):
                passed_over["hidden files"].append(path.as_posix())
            elif not entry.is_dir():
                yield path
            elif not entry.is_symlink():
                pending.append((path, (*above, os.path.join(above[-1], entry.name))))  # noqa: PTH118 (plain text)
            else:
                real = os.path.realpath(entry.path)
                if any(Path(parent).is_relative_to(real) for parent in above):
                    passed_over["links to a folder above them"].append(path.as_posix())
                else:
                    pending.append((path, (*above, real)))
