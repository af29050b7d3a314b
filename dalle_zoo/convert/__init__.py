"""Converts external weights to dalle-zoo model folders: families are recognized by content, and no code is run.

To add a family, write a module in this package with a class under ``@FAMILIES.register("name")`` and import it here;
CONTRIBUTING.md has an example. Third parties add an entry point in the group ``dalle_zoo.families``.

| module | content |
|---|---|
| `pickles` | pickles of plain data |
| `object_pickles` | pickles of objects, read into inert placeholders |
| `checkpoints` | opens weight files: `torch_files`, `safetensors_files`, `flax_files` |
| `stored` | tensors that are still in their file |
| `lazy` | tensors computed when they are read, networks written shard by shard |
| `location` | opens all files at a location |
| `family` | base classes of families, and their registry |
| `dalle_mini` | DALL-E mini and mega, of min-dalle or of Flax, with `dalle_mini_text` |
| `dalle_pytorch` | DALLE-pytorch's priors, with `dalle_pytorch_tensors`, `…_hparams` and `…_text` |
| `dalle_pytorch_vae` | DALLE-pytorch's own discrete VAE |
| `mindalle` | minDALL-E |
| `openai_dvae` | OpenAI's discrete VAE, also its encoder as transformers stores it |
| `rudalle` | ruDALL-E's priors |
| `youtokentome` | vocabularies of ruDALL-E, text files of YouTokenToMe |
| `vqgan` | VQGANs of taming-transformers, minDALL-E, ruDALL-E and min-dalle |
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from dalle_zoo.claims import CLAIM, Claims
from dalle_zoo.convert.checkpoints import open_checkpoint
from dalle_zoo.convert.dalle_mini import DalleMiniFamily
from dalle_zoo.convert.dalle_pytorch import DallePytorchFamily
from dalle_zoo.convert.dalle_pytorch_vae import DallePytorchVAEFamily
from dalle_zoo.convert.family import (
    FAMILIES,
    Architecture,
    Conversion,
    Family,
    Found,
    ImageTokenizerFamily,
    PriorFamily,
    Source,
    families,
)
from dalle_zoo.convert.location import Location, inspect_files
from dalle_zoo.convert.mindalle import MinDALLEFamily
from dalle_zoo.convert.openai_dvae import OpenAIDVAEFamily
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.rudalle import RuDALLEFamily
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.convert.vqgan import VQGANFamily
from dalle_zoo.files import FileError, new_folder, write_json
from dalle_zoo.model_folder import (
    CONVERSION,
    MODEL_FILES,
    RECORD,
    read_checksums,
    substitute_hint,
    verify_checksums,
    write_checksums,
    write_index,
)
from dalle_zoo.paths import user_path
from dalle_zoo.version import __version__

log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "Architecture",
    "Checkpoint",
    "Conversion",
    "DalleMiniFamily",
    "DallePytorchFamily",
    "DallePytorchVAEFamily",
    "Family",
    "Found",
    "ImageTokenizerFamily",
    "Location",
    "MinDALLEFamily",
    "OpenAIDVAEFamily",
    "PriorFamily",
    "RuDALLEFamily",
    "Source",
    "StoredTensor",
    "Tensors",
    "UnrelatedFileError",
    "VQGANFamily",
    "WeightFileError",
    "cached",
    "convert",
    "find",
    "inspect_files",
    "open_checkpoint",
    "recognize",
]


def recognize(
    location: str | Path | Sequence[str | Path], family: str | None = None, only: Sequence[str] = ()
) -> Source | None:
    """Finds the family of the weights at a location by their content; no tensor is read.

    Args:
        location: Weight file, folder of such files, or several of both that belong together.
        family: Name of the only family to try. Defaults to all families.
        only: Patterns of the file names to inspect. Defaults to all files.

    Returns:
        The recognized weights; None if no family recognizes them.

    Raises:
        UnknownNameError: No family has that name.
        WeightFileError: There are weights of several families; weights of one family are damaged or incomplete; or a
            file next to recognized weights cannot be read, which might be a part of the model.
        FileNotFoundError: The location does not exist.

    Example:
        >>> import tempfile, torch
        >>> from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
        >>> vae = DallePytorchVAE(DallePytorchVAEConfig(width=4, code_channels=4, codebook_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weights": vae.state_dict()}, Path(folder, "vae.pt"))
        ...     source = recognize(folder)
        >>> source.family, source.config["codebook_size"]
        ('dalle_pytorch_vae', 16)
    """
    return _recognize(inspect_files(location, only), family)


def _recognize(seen: Location, family: str | None) -> Source | None:
    source = _known(seen, family)
    if source is None:
        return None
    if seen.damaged:
        raise WeightFileError(
            f"{seen.path} holds weights of {source.family} and files that cannot be read: "
            f"{'; '.join(seen.damaged.values())}. Repair or remove them, or name the others with --files or files="
        )
    used = source.weight_files()
    unused = {c.path.name: c.summary() for c in seen.checkpoints if c.tensors and c.path not in used}
    return replace(source, unused_files=unused)


def _known(seen: Location, name: str | None) -> Source | None:
    """Returns the recognized prior, else the recognized image tokenizer: next to a prior it is a part of the model."""
    candidates = [*families()] if name is None else [FAMILIES[name](name)]
    for component in ("prior", "dvae"):
        found = [s for f in candidates if f.component == component and (s := f.recognize(seen)) is not None]
        if len(found) > 1:
            several = " and ".join(source.family for source in found)
            raise WeightFileError(
                f"{seen.path} holds weights of {several}: name the one to convert with --family, or its files with "
                "--files or files="
            )
        if found:
            return found[0]
    return None


def find(location: str | Path | Sequence[str | Path], family: str | None = None, only: Sequence[str] = ()) -> Source:
    """Returns the result of `recognize`, or raises `WeightFileError` with the known families and the files found.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "notes.txt").write_text("no weights")
        ...     try:
        ...         find(folder)
        ...     except WeightFileError as error:
        ...         print(str(error).rpartition("opened: ")[2])
        it is not a file of torch, safetensors or Flax
    """
    seen = inspect_files(location, only)
    return _recognize(seen, family) or _refuse(seen, family)


def _refuse(seen: Location, family: str | None) -> NoReturn:
    shown = FAMILIES.loadable() if family is None else [(family, FAMILIES[family])]
    known = [f"  {name}: {each.expects}" for name, each in shown]
    files = [f"  {checkpoint.path.name}: {checkpoint.summary()}" for checkpoint in seen.checkpoints]
    files += [f"  {name}: a configuration with {', '.join(list(map(str, c))[:5])}" for name, c in seen.configs.items()]
    files += [f"  {name}: {reason}" for name, reason in {**seen.damaged, **seen.unread}.items()]
    head = f"{seen.path} holds no known weights (folders are searched one level deep). Known families:"
    lines = [head, *known, "Files found:", *(files or ["  none"])]
    if any(name.startswith("state_dict.net.") for checkpoint in seen.checkpoints for name in checkpoint.tensors):
        lines.append(
            "This is a checkpoint of `dalle-zoo fit`: give the trained component instead, RUN/model/dvae or "
            "RUN/model/prior. `dalle-zoo export` makes a complete model of components, and `dalle-zoo consolidate` a "
            "component of a checkpoint"
        )
    raise WeightFileError("\n".join(lines))


def convert(source: Source, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes recognized weights as a dalle-zoo model folder, atomically.

    With a prior, an image tokenizer and a vocabulary the result is a model for `DallePipeline.from_pretrained`.

    Args:
        source: Result of `recognize` or `find`.
        out: Folder to write; must be new or empty unless `overwrite` is set.
        overwrite: Whether to replace an earlier conversion. A model that was saved there since is never replaced.
            Defaults to False.

    Returns:
        The content of ``record.json``: the fields of `Conversion`, "family", and "unused_files". For a prior also
        "image_tokenizer", the same fields of the image tokenizer, and "missing", the missing components.

    Raises:
        WeightFileError: A tensor is missing, has another shape, or is damaged.
        FileExistsError: The folder is not empty and may not be replaced.

    Example:
        >>> import tempfile, torch
        >>> from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
        >>> vae = DallePytorchVAE(DallePytorchVAEConfig(width=4, code_channels=4, codebook_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weights": vae.state_dict()}, Path(folder, "vae.pt"))
        ...     record = convert(find(folder), Path(folder, "model"))
        ...     sorted(path.name for path in Path(folder, "model").iterdir() if path.is_dir())
        ['dvae']
        >>> record["description"]
        "DALLE-pytorch's discrete VAE of 16 codes and factor 8"
    """
    is_prior = FAMILIES[source.family].component == "prior"
    with new_folder(Path(out), overwrite=overwrite, marker=CONVERSION, contents=MODEL_FILES) as folder:
        record = _convert(source, folder)
        record["unused_files"] = dict(source.unused_files)
        if source.image_tokenizer is not None:
            record["image_tokenizer"] = _convert(source.image_tokenizer, folder)
            record["parameters"] |= record["image_tokenizer"].pop("parameters")
        if is_prior:
            record["missing"] = [part for part in ("dvae", "tokenizer") if not (folder / part).is_dir()]
            if not record["missing"]:
                write_index(folder)
        write_json(folder / RECORD, record)
        names = sorted(path.name for path in {*source.weight_files(), *source.files.values()})
        write_json(folder / CONVERSION, {"_dalle_zoo_version": __version__, "files": names})
        write_checksums(folder)
    return record


def _convert(source: Source, folder: Path) -> dict[str, Any]:
    try:
        return {"family": source.family, **asdict(FAMILIES[source.family](source.family).convert(source, folder))}
    except WeightFileError as error:
        if source.location in str(error):
            raise
        raise WeightFileError(f"{source.location} cannot be converted: {error}") from None


def cached(location: Sequence[Path], only: Sequence[str] = ()) -> Path | None:
    """Returns a model folder with the weights at a location, which are converted on first use; None without weights.

    The folder is in ``DALLE_ZOO_CACHE`` (default ``~/.cache/dalle-zoo``). Its name is derived from paths, sizes and
    modification times of all inspected files, and from the version of dalle-zoo. Processes and threads that need the
    same conversion wait for the first one. A damaged conversion is noticed by its checksums, and made again.

    Args:
        location: As in `recognize`.
        only: As in `recognize`.

    Raises:
        WeightFileError: The weights are unknown, damaged, incomplete or of several models.
        OSError: The cache cannot be written.
    """
    seen = inspect_files(location, only)
    source = _recognize(seen, None)
    if source is None:
        ranker = any(
            config.get("model_type") == "clip" for config in seen.configs.values()
        )  # a ranker is used without conversion
        # A folder without weights may be a component; a file cannot be one, and neither can pointers of Git LFS.
        no_folder = location[0].is_file() or any(substitute_hint(file) for file in seen.files.values())
        weights = seen.damaged or ((seen.checkpoints or no_folder) and not ranker)
        return _refuse(seen, None) if only or len(location) > 1 or weights else None
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in seen.files.values()]
    digest = hashlib.sha256(json.dumps([__version__, *sorted(stats)]).encode()).hexdigest()[:16]
    root = user_path(os.environ.get("DALLE_ZOO_CACHE") or "~/.cache/dalle-zoo", "DALLE_ZOO_CACHE")
    folder = root / "converted" / f"{source.family}-{digest}"
    if not _is_intact(folder):
        try:
            _convert_once(source, folder)
        except OSError as error:
            raise OSError(
                f"{folder} cannot be written: {error}. Set DALLE_ZOO_CACHE to another folder, or convert once with "
                "`dalle-zoo convert LOCATION --out FOLDER` and use that folder"
            ) from error
    return folder


def _convert_once(source: Source, folder: Path) -> None:
    """Converts into the cache, while other processes and threads wait; a damaged conversion is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Claims() as claims:
        claims.take(folder.with_name(f".{folder.name}{CLAIM}"), wait=True)
        if _is_intact(folder):  # another process converted meanwhile
            return
        if folder.exists():
            log.warning("%s is damaged, and is converted again", folder)
            shutil.rmtree(folder)
        log.warning("converting %s (%s) once, into %s", source.location, source.family, folder)
        try:
            convert(source, folder)
        except FileExistsError:
            if not _is_intact(folder):  # else another process was faster, on a file system without locks
                raise


def _is_intact(folder: Path) -> bool:
    try:
        verify_checksums(folder)
        return RECORD in read_checksums(folder)
    except FileError:
        return False
