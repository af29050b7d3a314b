"""Converts external weights to dalle-zoo model folders: families recognized by content, read without running code.

To add a family, write a file beside these with a class under ``@FAMILIES.register("name")`` and import it here; a
third party adds an entry point in the group ``dalle_zoo.families``.

| file | what |
|---|---|
| `pickles` | pickles of objects, read into inert placeholders |
| `checkpoints` | files of tensors, opened: `torch_files`, `safetensors_files`, `flax_files` |
| `stored` | tensors that are still in their file |
| `lazy` | tensors made when they are read, networks written shard by shard |
| `base` | what a family offers, the registry, a location opened for looking |
| `dalle_mini` | DALL-E mini and mega, of min-dalle or of Flax, with `dalle_mini_text` |
| `dalle_pytorch` | DALLE-pytorch's priors, with `dalle_pytorch_hparams` and `dalle_pytorch_text` |
| `dalle_pytorch_vae` | DALLE-pytorch's own discrete VAE |
| `mindalle` | minDALL-E, with the VQGAN beside it |
| `openai_dvae` | OpenAI's discrete VAE, also its encoder as transformers stores it |
| `rudalle` | ruDALL-E's priors |
| `youtokentome` | text files of vocabularies, as ruDALL-E has them |
| `vqgan` | VQGANs of taming-transformers, minDALL-E, ruDALL-E and min-dalle |
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from dalle_zoo.convert.base import FAMILIES, Conversion, Family, Location, Source, inspect_files, read_tensors
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.dalle_mini import DalleMiniFamily
from dalle_zoo.convert.dalle_pytorch import DallePytorchFamily
from dalle_zoo.convert.dalle_pytorch_vae import DallePytorchVAEFamily
from dalle_zoo.convert.mindalle import MinDALLEFamily
from dalle_zoo.convert.openai_dvae import OpenAIDVAE
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.rudalle import RuDALLEFamily
from dalle_zoo.convert.vqgan import VQGANFamily
from dalle_zoo.files import new_folder, write_json
from dalle_zoo.model_folder import CONVERSION, RECORD, write_checksums, write_index
from dalle_zoo.version import __version__

log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Conversion",
    "DalleMiniFamily",
    "DallePytorchFamily",
    "DallePytorchVAEFamily",
    "Family",
    "Location",
    "MinDALLEFamily",
    "OpenAIDVAE",
    "RuDALLEFamily",
    "Source",
    "StoredTensor",
    "UnrelatedFileError",
    "VQGANFamily",
    "WeightFileError",
    "cached",
    "convert",
    "find",
    "inspect_files",
    "open_checkpoint",
    "read_tensors",
    "recognize",
]


def recognize(
    location: str | Path | Sequence[str | Path], family: str | None = None, only: Sequence[str] = ()
) -> Source | None:
    """Finds the family of the weights at a location, by content; no tensor is read.

    Args:
        location: File of weights, folder of such files, or several of both that belong together.
        family: Name of the only family to try. Defaults to all.
        only: Patterns of the file names to look at. Defaults to all files.

    Returns:
        What was found; None if no family knows it.

    Raises:
        UnknownNameError: No family has that name.
        WeightFileError: Weights of more than one family, or of one but damaged, or beside them a file that begins like
            weights and cannot be read: what it was would be missing without a word.
        FileNotFoundError: Nothing is there.
    """
    return _recognize(inspect_files(location, only), family)


def _recognize(seen: Location, family: str | None) -> Source | None:
    source = _known(seen, [family] if family is not None else [*FAMILIES])
    if source is None:
        return None
    if seen.damaged:
        raise WeightFileError(
            f"{seen.path} holds weights of {source.family} and files that cannot be read: "
            f"{'; '.join(seen.damaged.values())}. Mend or remove them, or name the others with --files or files="
        )
    used = source.weight_files()
    unused = {c.path.name: c.summary() for c in seen.checkpoints if c.tensors and c.path not in used}
    return replace(source, unused_files=unused)


def _known(seen: Location, names: Sequence[str]) -> Source | None:
    families = [FAMILIES[name]() for name in names]
    for complete in (True, False):  # beside a prior, an image tokenizer is a part
        found = [source for f in families if f.complete is complete and (source := f.recognize(seen)) is not None]
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
    """As `recognize`, but what is unknown raises `WeightFileError` with the families known and what was seen."""
    seen = inspect_files(location, only)
    return _recognize(seen, family) or _refuse(seen, family)


def _refuse(seen: Location, family: str | None) -> NoReturn:
    known = [f"  {name}: {FAMILIES[name].expects}" for name in ([family] if family else FAMILIES)]
    there = [f"  {checkpoint.path.name}: {checkpoint.summary()}" for checkpoint in seen.checkpoints]
    there += [f"  {name}: a configuration with {', '.join(list(map(str, c))[:5])}" for name, c in seen.configs.items()]
    there += [f"  {name}: {reason}" for name, reason in {**seen.damaged, **seen.unread}.items()]
    head = f"{seen.path} holds no weights that are known (sub-folders are searched, theirs are not). Known are"
    lines = [head, *known, "Seen was", *(there or ["  nothing"])]
    if any(name.startswith("state_dict.net.") for checkpoint in seen.checkpoints for name in checkpoint.tensors):
        lines.append(
            "Of a run of `dalle-zoo fit` the trained part is taken, RUN/model/dvae or RUN/model/prior; "
            "`dalle-zoo export` makes a complete model of parts, and `dalle-zoo consolidate` a part of a checkpoint"
        )
    raise WeightFileError("\n".join(lines))


def convert(source: Source, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes recognized weights as a dalle-zoo model folder, atomically.

    With a prior, an image tokenizer and a text tokenizer it is a model that `DallePipeline.from_pretrained` opens.

    Args:
        source: From `recognize` or `find`.
        out: Folder to write; new or empty unless ``overwrite``.
        overwrite: Whether an older conversion is replaced; a model that was saved since is not.

    Returns:
        The record, which ``record.json`` holds as well: what `Conversion` has, and "family"; "unused_files", what
        lies there besides; "image_tokenizer", the same of it; of a prior "missing", the parts that were not there.

    Raises:
        WeightFileError: A tensor is missing, of another shape, or damaged.
        FileExistsError: The folder is not empty, and may not be replaced.
    """
    complete = FAMILIES[source.family]().complete
    with new_folder(Path(out), overwrite=overwrite, marker=CONVERSION) as folder:
        record = _convert(source, folder)
        record["unused_files"] = dict(source.unused_files)
        if source.image_tokenizer is not None:
            record["image_tokenizer"] = _convert(source.image_tokenizer, folder)
            record["parameters"] |= record["image_tokenizer"].pop("parameters")
        if complete:
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
        return {"family": source.family, **asdict(FAMILIES[source.family]().convert(source, folder))}
    except WeightFileError as error:
        if source.location in str(error):
            raise
        raise WeightFileError(f"{source.location} cannot be converted: {error}") from None


def cached(location: Sequence[Path], only: Sequence[str] = ()) -> Path | None:
    """A dalle-zoo folder with the weights at a location, converted when it is first asked for; None if there are none.

    It lies below ``DALLE_ZOO_CACHE`` (``~/.cache/dalle-zoo`` if that is not set), under a name that follows from the
    paths, sizes and times of all files looked at, and from the version that converts.

    Args:
        location: As for `recognize`.
        only: As for `recognize`.

    Raises:
        WeightFileError: They are unknown, damaged, incomplete or of several models.
        OSError: The cache cannot be written to.
    """
    seen = inspect_files(location, only)
    source = _recognize(seen, None)
    if source is None:
        ranker = any(config.get("model_type") == "clip" for config in seen.configs.values())  # taken as it is
        weights = seen.damaged or (seen.checkpoints and not ranker)
        return _refuse(seen, None) if only or len(location) > 1 or weights else None
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in seen.files.values()]
    digest = hashlib.sha256(json.dumps([__version__, *sorted(stats)]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("DALLE_ZOO_CACHE") or Path.home() / ".cache/dalle-zoo")
    folder = root / "converted" / f"{source.family}-{digest}"
    if not (folder / RECORD).is_file():
        log.warning("converting %s (%s) into %s, once", source.location, source.family, folder)
        try:
            convert(source, folder)
        except OSError as error:
            if (folder / RECORD).is_file():  # another process was faster
                return folder
            raise OSError(
                f"{folder} cannot be written: {error}. Let DALLE_ZOO_CACHE name another place, or convert once with "
                "`dalle-zoo convert LOCATION --out FOLDER` and name that folder"
            ) from error
    return folder
