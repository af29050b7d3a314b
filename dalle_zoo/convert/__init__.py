"""Foreign weights to folders of ours: families recognised by content, read without running what a file asks for.

To add a family, write a file beside these with a class under ``@FAMILIES.register("name")`` and import it here; a
third party adds an entry point in the group ``dalle_zoo.families``.

| file | what |
|---|---|
| `pickles` | pickles of objects, read into inert placeholders |
| `checkpoints` | files of tensors: torch's two formats and safetensors, read lazily |
| `base` | what a family offers, the registry, a location opened for looking |
| `openai_dvae` | OpenAI's discrete VAE, also its encoder as transformers stores it |
| `vqgan` | VQGANs of taming-transformers, minDALL-E, ruDALL-E and min-dalle |
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dalle_zoo.convert.base import FAMILIES, Family, Location, Source, look, read_config, read_tensors
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor, open_checkpoint
from dalle_zoo.convert.openai_dvae import OpenAIDVAE
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.vqgan import VQGANFamily
from dalle_zoo.hub import CONFIG, load_image_tokenizer, new_folder, write_json
from dalle_zoo.models.tokenizer import ImageTokenizer
from dalle_zoo.zoo import RECORD

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "Location",
    "OpenAIDVAE",
    "Source",
    "StoredTensor",
    "VQGANFamily",
    "WeightFileError",
    "convert",
    "find",
    "load_any_image_tokenizer",
    "look",
    "open_checkpoint",
    "read_tensors",
    "recognise",
]


def recognise(location: str | Path, family: str | None = None) -> Source | None:
    """Finds the family of the weights at a location, by content; no tensor is read.

    Args:
        location: File of weights, or folder of such files.
        family: Name of the only family to try; all if missing.

    Returns:
        What was found; None if no family knows it.

    Raises:
        UnknownNameError: No family has that name.
        WeightFileError: Weights of more than one family, or of one but damaged.
        FileNotFoundError: Nothing is there.
    """
    return _recognise(look(location), family)


def _recognise(seen: Location, family: str | None) -> Source | None:
    names = list(FAMILIES) if family is None else [family]
    found = [source for name in names if (source := FAMILIES[name]().recognise(seen)) is not None]
    if len(found) > 1:
        several = " and ".join(source.family for source in found)
        raise WeightFileError(f"{seen.path} holds weights of {several}: name the one to convert with --family")
    return found[0] if found else None


def find(location: str | Path, family: str | None = None) -> Source:
    """As `recognise`, but what is unknown raises `WeightFileError` with the families known and what was seen."""
    seen = look(location)
    source = _recognise(seen, family)
    if source is not None:
        return source
    known = [f"  {name}: {FAMILIES[name].expects}" for name in ([family] if family else FAMILIES)]
    there = [f"  {checkpoint.path.name}: {checkpoint.summary()}" for checkpoint in seen.checkpoints]
    there += [f"  {name}: a configuration with {', '.join(list(map(str, c))[:5])}" for name, c in seen.configs.items()]
    there += [f"  {name}: {reason}" for name, reason in seen.unread.items()]
    raise WeightFileError(
        "\n".join(
            [f"{location} holds no weights that are known. Known are", *known, "Seen was", *(there or ["  nothing"])]
        )
    )


def convert(source: Source, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes recognised weights as a folder of ours, whole or not at all.

    Args:
        source: From `recognise` or `find`.
        out: Folder to write; new or empty unless ``overwrite``.
        overwrite: Whether an older conversion is replaced.

    Returns:
        The record, which ``record.json`` holds as well.

    Raises:
        WeightFileError: A tensor is missing, of another shape, or damaged.
    """
    with new_folder(Path(out), overwrite=overwrite, marker=RECORD) as folder:
        record = {"family": source.family, **FAMILIES[source.family]().convert(source, folder)}
        write_json(folder / RECORD, record)
    return record


def load_any_image_tokenizer(folder: Path, device: str | torch.device | None = None) -> ImageTokenizer:
    """Reads an image tokenizer of ours, or of another code base, which is converted in a temporary folder.

    Args:
        folder: As `dalle_zoo.hub.load_image_tokenizer` takes it, or as `recognise` does.
        device: Where to put it; the CPU if missing.

    Raises:
        ModelFolderError: It is neither, or damaged.
        WeightFileError: It is of another code base, but damaged.
    """
    source = None if _is_ours(folder) else recognise(folder)
    if source is None:
        return load_image_tokenizer(folder, device)
    with TemporaryDirectory() as aside:
        convert(source, Path(aside) / "model")
        return load_image_tokenizer(Path(aside) / "model/dvae", device)


def _is_ours(folder: Path) -> bool:
    """Whether a configuration names the type of network, as ours do; a VQGAN's tensors have the same names."""
    try:
        return "type" in read_config(folder / CONFIG)
    except (WeightFileError, FileNotFoundError):
        return False
