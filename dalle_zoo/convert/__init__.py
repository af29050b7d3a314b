"""Foreign weights to folders of ours: families recognised by content, read without running what a file asks for.

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
from pathlib import Path
from typing import Any, NoReturn

from dalle_zoo import __version__
from dalle_zoo.convert.base import FAMILIES, Family, Location, Source, look, read_tensors
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.dalle_mini import DalleMiniFamily
from dalle_zoo.convert.dalle_pytorch import DallePytorchFamily
from dalle_zoo.convert.dalle_pytorch_vae import DallePytorchVAEFamily
from dalle_zoo.convert.mindalle import MinDALLEFamily
from dalle_zoo.convert.openai_dvae import OpenAIDVAE
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.rudalle import RuDALLEFamily
from dalle_zoo.convert.vqgan import VQGANFamily
from dalle_zoo.folders import RECORD
from dalle_zoo.hub import new_folder, write_checksums, write_index, write_json

log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "Checkpoint",
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
    "VQGANFamily",
    "WeightFileError",
    "cached",
    "convert",
    "find",
    "look",
    "open_checkpoint",
    "read_tensors",
    "recognise",
]


def recognise(
    location: str | Path | Sequence[str | Path], family: str | None = None, only: Sequence[str] = ()
) -> Source | None:
    """Finds the family of the weights at a location, by content; no tensor is read.

    Args:
        location: File of weights, folder of such files, or several of both that belong together.
        family: Name of the only family to try; all if missing.
        only: Patterns of the file names to look at; all files if missing.

    Returns:
        What was found; None if no family knows it.

    Raises:
        UnknownNameError: No family has that name.
        WeightFileError: Weights of more than one family, or of one but damaged.
        FileNotFoundError: Nothing is there.
    """
    return _recognise(look(location, only), family)


def _recognise(seen: Location, family: str | None) -> Source | None:
    if family is not None:
        return FAMILIES[family]().recognise(seen)
    families = [FAMILIES[name]() for name in FAMILIES]
    for whole in (True, False):  # beside a prior, an image tokenizer is a part
        found = [source for f in families if f.whole is whole and (source := f.recognise(seen)) is not None]
        if len(found) > 1:
            several = " and ".join(source.family for source in found)
            raise WeightFileError(f"{seen.path} holds weights of {several}: name the one to convert with --family")
        if found:
            return found[0]
    return None


def find(location: str | Path | Sequence[str | Path], family: str | None = None, only: Sequence[str] = ()) -> Source:
    """As `recognise`, but what is unknown raises `WeightFileError` with the families known and what was seen."""
    seen = look(location, only)
    return _recognise(seen, family) or _refuse(seen, family)


def _refuse(seen: Location, family: str | None) -> NoReturn:
    known = [f"  {name}: {FAMILIES[name].expects}" for name in ([family] if family else FAMILIES)]
    there = [f"  {checkpoint.path.name}: {checkpoint.summary()}" for checkpoint in seen.checkpoints]
    there += [f"  {name}: a configuration with {', '.join(list(map(str, c))[:5])}" for name, c in seen.configs.items()]
    there += [f"  {name}: {reason}" for name, reason in seen.unread.items()]
    lines = [f"{seen.path} holds no weights that are known. Known are", *known, "Seen was", *(there or ["  nothing"])]
    raise WeightFileError("\n".join(lines))


def convert(source: Source, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes recognised weights as a folder of ours, whole or not at all.

    With a prior, an image tokenizer and a text tokenizer it is a model that `DallePipeline.from_pretrained` opens.

    Args:
        source: From `recognise` or `find`.
        out: Folder to write; new or empty unless ``overwrite``.
        overwrite: Whether an older conversion is replaced.

    Returns:
        The record, which ``record.json`` holds as well; of a prior, "missing" names the parts that were not there.

    Raises:
        WeightFileError: A tensor is missing, of another shape, or damaged.
    """
    family = FAMILIES[source.family]()
    with new_folder(Path(out), overwrite=overwrite, marker=RECORD) as folder:
        record = {"family": source.family, **family.convert(source, folder)}
        if source.image_tokenizer is not None:
            second = source.image_tokenizer
            codes = FAMILIES[second.family]().convert(second, folder)
            record["parameters"] |= codes.pop("parameters")
            record["image_tokenizer"] = {"family": second.family, **codes}
        if family.whole:
            record["missing"] = [part for part in ("dvae", "tokenizer") if not (folder / part).is_dir()]
            if not record["missing"]:
                write_index(folder)
        write_json(folder / RECORD, record)
        write_checksums(folder)
    return record


def cached(location: Sequence[Path], only: Sequence[str] = ()) -> Path | None:
    """Folder of ours with the weights at a location, converted when it is first asked for; None if they are unknown.

    It lies below ``DALLE_ZOO_CACHE`` (``~/.cache/dalle-zoo`` if that is not set), under a name that follows from the
    paths, sizes and times of all files looked at, and from the version that converts.

    Args:
        location: As for `recognise`.
        only: As for `recognise`.

    Raises:
        WeightFileError: They are known, but damaged, incomplete or of several models; or several locations or
            patterns were given, and they are unknown.
    """
    seen = look(location, only)
    source = _recognise(seen, None)
    if source is None:
        return _refuse(seen, None) if only or len(location) > 1 else None
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in seen.files.values()]
    digest = hashlib.sha256(json.dumps([__version__, *sorted(stats)]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("DALLE_ZOO_CACHE") or Path.home() / ".cache/dalle-zoo")
    folder = root / "converted" / f"{source.family}-{digest}"
    if not (folder / RECORD).is_file():
        log.warning("converting %s (%s) into %s, once", source.location, source.family, folder)
        convert(source, folder, overwrite=True)
    return folder
