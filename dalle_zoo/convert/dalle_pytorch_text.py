"""Finds the vocabulary of a DALLE-pytorch prior, which its file does not name, by content and size.

| file | kind |
|---|---|
| ``tokenizer.json`` of the tokenizers library, under any name | read by DALLE-pytorch's ``--hug`` and ``--chinese`` |
| ``bpe_simple_vocab_16e6.txt`` of the original's package | CLIP's vocabulary, the default |
| a text file of YouTokenToMe | read by ``--bpe_path`` without other options |
"""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.convert import youtokentome
from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.tokenizers import CLIPTokenizer, HFTokenizer, TextTokenizer
from dalle_zoo.tokenizers.clip import HEADER, NUM_MERGES, clip_bpe
from dalle_zoo.tokenizers.library import open_tokenizer_json

USUAL = {
    49408: "CLIP's, which is bpe_simple_vocab_16e6.txt of the original's package",
    21128: "tokenizer.json of bert-base-chinese",
}
"""Default vocabularies of the original, by size."""


def find_vocabulary(location: Location, vocab_size: int) -> Path | None:
    """Returns the vocabulary that has as many ids as the prior has text tokens; None if there is no vocabulary.

    Raises:
        WeightFileError: There are vocabularies, but none or several of this size.
    """
    sizes = {}
    for name, file in location.files.items():
        tokenizer = _read(file)
        if tokenizer is not None:
            sizes[name] = tokenizer.vocab_size
    fitting = [name for name, size in sizes.items() if size == vocab_size]
    if len(fitting) > 1:
        raise WeightFileError(
            f"{' and '.join(fitting)} have {vocab_size} ids: name the one it was trained with, with --files or files="
        )
    if sizes and not fitting:
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise WeightFileError(f"it has {vocab_size} text tokens, but {found}: give the vocabulary it was trained with")
    return location.files[fitting[0]] if fitting else None


def about_vocabulary(file: Path | None, vocab_size: int) -> str:
    """Returns which vocabulary was found, or which one is probably missing, for the record."""
    if file is not None:
        return file.name
    usual = USUAL.get(vocab_size)
    return "none was found" + (f"; {vocab_size} tokens suggest {usual}" if usual else "")


def read_vocabulary(file: Path) -> TextTokenizer:
    """Reads a file that `find_vocabulary` found.

    Raises:
        WeightFileError: It was changed since.
    """
    tokenizer = _read(file)
    if tokenizer is None:
        raise WeightFileError(f"{file} is no longer a vocabulary: it was changed since it was recognized")
    return tokenizer


def _read(file: Path) -> TextTokenizer | None:
    """Reads a vocabulary of any kind; None if the file is something else."""
    if file.suffix == ".json":
        try:
            return HFTokenizer(open_tokenizer_json(file))
        except ValueError:
            return None
    with file.open("rb") as opened:
        start = opened.read(len(HEADER) + 1)
    if start == f"{HEADER}\n".encode():
        return _read_clip(file)
    return youtokentome.read_vocabulary(file) if youtokentome.is_vocabulary(file) else None


def _read_clip(file: Path) -> CLIPTokenizer:
    """Reads CLIP's list of merges.

    Raises:
        WeightFileError: The list is damaged.
    """
    lines = file.read_text("utf-8").rstrip("\n").split("\n")[1 : NUM_MERGES + 1]
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    try:
        if len(pairs) < NUM_MERGES:
            raise ValueError(f"it has {len(pairs)} merges of {NUM_MERGES}")
        return CLIPTokenizer(clip_bpe(pairs))
    except ValueError as error:
        raise WeightFileError(f"{file} is not CLIP's list of merges: {error}") from None
