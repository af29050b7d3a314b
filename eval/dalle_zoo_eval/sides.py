"""The two sides of a comparison: folders, manifests, archives, models, and files of statistics."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dalle_zoo.data import open_source
from dalle_zoo.data.decoding import MAX_IMAGE_BYTES
from dalle_zoo.data.selection import IMAGE_SUFFIXES, is_hidden, is_shard, select, suffix_of
from dalle_zoo.files import new_folder
from dalle_zoo.model_folder import INDEX
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sharing import Share
from dalle_zoo.zoo import is_remote, model_names
from dalle_zoo_eval.datasets import DatasetError
from dalle_zoo_eval.datasets.manifest import MANIFEST
from dalle_zoo_eval.extractors import load_extractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.generation import BATCH, GeneratedImages, model_sha256
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.rules import SamplingRule
from dalle_zoo_eval.statistics import ENDINGS

Kind = Literal["folder", "archive", "model", "statistics"]
MAX_TEXT_BYTES = 2**20
"""Largest text file of captions in an archive."""
EXPECTED = (
    "expected a folder of images, a manifest (manifest.jsonl), an archive (.zip, .tar, .tar.gz), a folder or pattern "
    "of shards, data in the package such as composition:train, a model, or a file of statistics (.safetensors, .npz)"
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison."""

    location: str
    """As it was given."""
    name: str
    """Name in the report."""
    kind: Kind
    """What the location is; a manifest counts as a folder."""


def find_side(location: str, name: str | None = None) -> Side:
    """Recognizes a side; nothing is opened.

    Args:
        location: Any of `EXPECTED`.
        name: Name in the report. Defaults to the last part of the location.

    Raises:
        DatasetError: The location is none of them.
    """
    plain = PurePosixPath(location.rstrip("/")).name or location
    return Side(location=location, name=name or plain, kind=_kind(location))


def _kind(location: str) -> Kind:
    path = Path(location)
    if location in model_names():
        return "model"
    if path.is_dir():
        if (path / INDEX).is_file():
            return "model"
        return "archive" if not (path / MANIFEST).is_file() and select(path).shards else "folder"
    if path.is_file():
        if path.suffix in ENDINGS:
            return "statistics"
        if path.suffix == ".jsonl":
            return "folder"
        if path.suffix == ".zip" or is_shard(path):
            return "archive"
        raise DatasetError(f"{location} is a file of another kind: {EXPECTED}")
    if ":" in location or any(sign in location for sign in "*?[{"):
        return "archive"  # `open_source` says what is wrong with it
    if is_remote(location):
        return "model"
    raise DatasetError(f"{location} does not exist: {EXPECTED}")


def unpack(location: str, folder: Path) -> Path:
    """Writes the images and captions of an archive to a folder, unless they are there from an earlier run.

    Memory does not grow with the archive. Files are numbered in the order of the archive.

    Args:
        location: A zip file, or any location of `dalle_zoo.data.open_source`.
        folder: Folder in which a folder of the images is created.

    Raises:
        ValueError: The archive cannot be read or has no image.
    """
    path = Path(location)
    if path.suffix == ".zip":
        status = path.stat()
        fingerprint, images = digest([path.name, status.st_size, status.st_mtime_ns]), _of_zip(path)
    else:
        source = open_source(location)
        fingerprint, images = source.fingerprint(), ((s.image, s.captions) for s in source.stream())
    target = folder / f"unpacked-{fingerprint[:16]}"
    if target.is_dir():
        return target
    try:
        with new_folder(target) as aside:
            if not _write(images, aside):
                raise DatasetError(f"{location} holds no image: {EXPECTED}")
    except FileExistsError:  # another process was faster
        pass
    return target


def _write(images: Iterable[tuple[bytes, tuple[str, ...]]], folder: Path) -> int:
    count = 0
    for image, captions in images:
        path = folder / f"{count:07d}.png"  # decoders recognize other formats by their contents
        path.write_bytes(image)
        if captions:
            path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        count += 1
    return count


def _of_zip(path: Path) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    """Yields the images of a zip file in the order of their names, each with the text file of the same name."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for name in sorted(members):
                place = PurePosixPath(name)
                if suffix_of(place) not in IMAGE_SUFFIXES or is_hidden(place):
                    continue
                if members[name].file_size > MAX_IMAGE_BYTES:
                    raise DatasetError(f"{path}: {name} has more than {MAX_IMAGE_BYTES} bytes")
                text = members.get(str(place.with_suffix(".txt")))
                if text is not None and text.file_size > MAX_TEXT_BYTES:
                    raise DatasetError(f"{path}: {text.filename} has more than {MAX_TEXT_BYTES} bytes")
                captions = archive.read(text).decode("utf-8", "replace").splitlines() if text is not None else []
                yield archive.read(members[name]), tuple(line.strip() for line in captions if line.strip())
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise DatasetError(f"{path} cannot be read as a zip file: {error}") from None


def generate_side(
    model: str, captions: list[str], folder: Path, *, seed: int, batch_size: int | None, device: str, share: Share
) -> tuple[Path, dict[str, Any]]:
    """Generates an image per caption into a folder, unless they are there from an earlier run.

    The noise of an image depends on the seed and the number of its caption, as in every protocol, so a killed run
    continues, and processes share the work. Features of the pixels show which chunks of images are complete.

    Args:
        model: Name or folder of a model.
        captions: The captions.
        folder: Folder in which folders of the images, their codes and their features are created.
        seed: Seed of the noise.
        batch_size: Images generated at once. Defaults to `BATCH`.
        device: Device of the model.
        share: Chunks with which this process begins.

    Returns:
        The folder of the images, which is complete, and what a result file says of the model.
    """
    pipe = DallePipeline.from_pretrained(model, device=device)
    source = GeneratedImages(
        pipe, captions, SamplingRule(), seed=seed, batch_size=BATCH if batch_size is None else batch_size, cache=folder
    )
    target = folder / f"generated-{digest(source.identity)[:16]}"
    networks = {"pixels": load_extractor("pixels", "")}
    store = FeatureStore(source, networks, (0,), source.sampling.chunk, folder, device)
    for part in (share, Share()):  # then what no other process has begun, and a wait for the rest
        store.run(part, label=f"images of {model}", images=target)
    weights = {name: sha256 for name, sha256 in model_sha256(pipe).items() if name.endswith(".safetensors")}
    return target, {"model": model, "seed": seed, "weights_sha256": weights}
