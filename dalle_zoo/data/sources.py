"""Opens data given as text: shards, patterns, folders, or composed data."""

from __future__ import annotations

import difflib
import glob
import itertools
from pathlib import Path, PurePosixPath

from dalle_zoo.composition import CompositionConfig
from dalle_zoo.data.composition import SPLITS, CompositionSource
from dalle_zoo.data.folder import FolderSource
from dalle_zoo.data.remote import RemotePath
from dalle_zoo.data.samples import SampleSource
from dalle_zoo.data.selection import IMAGE_SUFFIXES, SHARD_ENDINGS, is_shard, suffix_of
from dalle_zoo.data.shards import ShardSource, listed_counts
from dalle_zoo.paths import user_path

COMPOSITION = "composition"
"""The bundled composition, as in ``composition:train``."""

_EXPECTED = (
    f"Expected a shard ({', '.join(SHARD_ENDINGS)}), a folder of shards, a pattern such as "
    "'shards/*.tar' or 'shards/{00000..00009}.tar', a folder of images with captions in .txt "
    "files of the same name, or 'composition:train'"
)


def open_source(location: str | Path, *, processes: int = 1) -> SampleSource:
    """Recognizes the kind of a location and opens it.

    | location | kind |
    |---|---|
    | ``file.tar``, ``.tar.gz``, ``.tgz`` | one WebDataset shard |
    | a folder with shards | its shards, from img2dataset or `webdataset` |
    | ``https://…``, ``s3://…``, ``gs://…``, ``hf://…`` | remote shards: one, a pattern, or a folder |
    | a pattern with ``*``, ``?``, ``[...]``, ``{a..b}`` or ``{a,b}`` | the shards that match |
    | another folder | the images in it and its subfolders, captions in files of the same name: docs/train/data.md |
    | ``composition:train``, ``my.yaml:train`` | samples composed on the fly, see `dalle_zoo.composition` |

    img2dataset adds white borders to images unless it is run with ``--resize_mode keep_ratio``. The borders are not
    removed, so use that mode (docs/train/conceptual-captions.md).

    Args:
        location: The location.
        processes: Number of processes that count the samples of shards without a manifest. Defaults to 1.

    Raises:
        ValueError: The location does not exist, or has no usable image.

    Example:
        >>> open_source("composition:train").num_samples
        20000
    """
    text = str(location)
    composition, _, split = text.rpartition(":")
    if composition == COMPOSITION or composition.endswith((".yaml", ".yml")):
        source: SampleSource = _composition(composition, split)
    elif "://" in text:
        source = ShardSource(_remote_shards(text), processes=processes)
    elif text.startswith("pipe:"):
        raise ValueError(f"location {text!r} starts a program, which is not supported. {_EXPECTED}")
    else:
        source = _open_path(user_path(text, "location of the data"), text, processes)
    if source.num_samples == 0:
        raise ValueError(f"location {text!r} holds no image{_reason(source)}. {_EXPECTED}")
    return source


def _reason(source: SampleSource) -> str:
    """Returns the known reason why a source has no samples; empty if it is unknown."""
    if isinstance(source, ShardSource):
        return "".join(f" ({problem})" for problem in itertools.islice(source.problems(), 1))
    if isinstance(source, FolderSource) and source.selection.passed_over:
        return f" ({source.selection.describe()})"
    return ""


def _composition(location: str, split: str) -> SampleSource:
    return CompositionSource(CompositionConfig.load(None if location == COMPOSITION else location), split)


def _open_path(path: Path, text: str, processes: int) -> SampleSource:
    if path.is_file():
        if not is_shard(path):
            raise ValueError(f"location {text!r} is a file but not a shard. {_EXPECTED}")
        return ShardSource([path], processes=processes)
    if path.is_dir():
        folder = FolderSource(path)
        shards = [path / name for name in folder.selection.shards]
        if shards and all(p.name.startswith("codes-") for p in shards):
            raise ValueError(f"location {text!r} has code shards, not images: use CodeDataModule (CodeDataset)")
        return ShardSource(shards, processes=processes) if shards else folder
    if any(sign in text for sign in "*?[{"):
        return ShardSource(_matching_shards(str(path), text), processes=processes)
    near = _nearest_composition(text) or _nearest_neighbor(path)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ValueError(f"location {text!r} does not exist.{hint} {_EXPECTED}")


def _nearest_composition(text: str) -> str | None:
    """Suggests the bundled composition and a split: ``composition:train`` for ``compositoin``."""
    name, _, split = text.partition(":")
    if not difflib.get_close_matches(name, [COMPOSITION]):
        return None
    return f"{COMPOSITION}:{(difflib.get_close_matches(split, SPLITS, n=1) or SPLITS)[0]}"


def _nearest_neighbor(path: Path) -> str | None:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return str(path.with_name(near[0])) if near else None


def _matching_shards(pattern: str, text: str) -> list[Path]:
    found: set[Path] = set()
    for part in _expand_braces(pattern):
        # Path.glob rejects absolute patterns
        names = [part] if Path(part).is_file() else glob.glob(part)  # noqa: PTH207
        matches = [Path(name) for name in names]
        shards = [p for p in matches if is_shard(p) and p.is_file()]
        if not shards:
            kinds = "images, not shards: name their folder" if _images(matches) else "no shard"
            raise ValueError(f"location {text!r}: {part!r} matches {kinds}. {_EXPECTED}")
        found.update(shards)
    return sorted(found)


def _remote_shards(text: str) -> list[RemotePath]:
    """Finds the shards of a URL: itself, those that match a pattern, or those of a folder."""
    found: list[RemotePath] = []
    for url in map(RemotePath, _expand_braces(text)):
        if is_shard(PurePosixPath(url.name)) and "*" not in str(url):
            found.append(url)
        elif "*" in str(url):
            found += [path for path in url.glob() if is_shard(PurePosixPath(path.name))]
        elif listed := listed_counts(url):
            found += [url / name for name in sorted(listed)]
        else:
            found += [path for path in (url / "*").glob() if is_shard(PurePosixPath(path.name))]
    if not found:
        raise ValueError(f"location {text!r} has no shard, and no manifest.json that lists some. {_EXPECTED}")
    return found


def _images(paths: list[Path]) -> bool:
    return any(suffix_of(p) in IMAGE_SUFFIXES for p in paths)


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"location {pattern!r} has unbalanced braces: {error}") from error
