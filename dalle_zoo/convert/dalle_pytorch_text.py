"""The vocabulary of a DALLE-pytorch prior, which its file does not name: looked for beside it, by content and size.

| file | kind |
|---|---|
| ``tokenizer.json`` of the tokenizers library, of any name | what DALLE-pytorch's ``--hug`` and ``--chinese`` read |
| ``bpe_simple_vocab_16e6.txt``, which lies in the original's package | CLIP's, which it takes unless told otherwise |
| a text file of YouTokenToMe | what ``--bpe_path`` alone reads |
"""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.convert import youtokentome
from dalle_zoo.convert.base import Location
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.tokenizers import CLIPTokenizer, HFTokenizer, TextTokenizer
from dalle_zoo.tokenizers.clip import clip_bpe
from dalle_zoo.tokenizers.library import open_tokenizer_json

CLIP_HEADER = b'"bpe_simple_vocab_16e6.txt#version: 0.2\n'
"""First line of CLIP's list of merges."""
CLIP_MERGES = 49152 - 256 - 2
"""Merges that CLIP reads of it."""
USUAL = {
    49408: "CLIP's, which is bpe_simple_vocab_16e6.txt of the original's package",
    21128: "tokenizer.json of bert-base-chinese",
}
"""Vocabularies that the original takes by itself, by their size."""


def find_vocabulary(location: Location, vocab_size: int) -> Path | None:
    """The file that has as many ids as the prior has text tokens; None if no vocabulary is there.

    Raises:
        WeightFileError: There are such, but none of this size, or several.
    """
    sizes = {}
    for name, file in location.files.items():
        tokenizer = _read(file)
        if tokenizer is not None:
            sizes[name] = tokenizer.vocab_size
    fitting = [name for name, size in sizes.items() if size == vocab_size]
    if len(fitting) > 1:
        raise WeightFileError(
            f"{' and '.join(fitting)} have {vocab_size} ids: name the one it was trained with by --files or files="
        )
    if sizes and not fitting:
        there = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise WeightFileError(
            f"it has {vocab_size} text tokens, but {there}: put the vocabulary of its training there"
        )
    return location.files[fitting[0]] if fitting else None


def about_vocabulary(file: Path | None, vocab_size: int) -> str:
    """Which vocabulary is taken, or what is likely missing, for the record."""
    if file is not None:
        return file.name
    usual = USUAL.get(vocab_size)
    return "none lies there" + (f"; of {vocab_size} tokens is {usual}" if usual else "")


def read_vocabulary(file: Path) -> TextTokenizer:
    """Reads a file that `find_vocabulary` found.

    Raises:
        WeightFileError: It was changed since.
    """
    tokenizer = _read(file)
    if tokenizer is None:
        raise WeightFileError(f"{file} is no vocabulary any more")
    return tokenizer


def _read(file: Path) -> TextTokenizer | None:
    """A vocabulary, of whatever kind; None if the file is something else."""
    if file.suffix == ".json":
        try:
            return HFTokenizer(open_tokenizer_json(file))
        except ValueError:
            return None
    with file.open("rb") as opened:
        start = opened.read(len(CLIP_HEADER))
    if start == CLIP_HEADER:
        return _read_clip(file)
    return youtokentome.read_vocabulary(file) if youtokentome.is_vocabulary(file) else None


def _read_clip(file: Path) -> CLIPTokenizer:
    """CLIP's tokenizer.

    Raises:
        WeightFileError: The list is damaged.
    """
    lines = file.read_text("utf-8").rstrip("\n").split("\n")[1 : CLIP_MERGES + 1]
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    try:
        if len(pairs) < CLIP_MERGES:
            raise ValueError(f"it has {len(pairs)} merges of {CLIP_MERGES}")
        return CLIPTokenizer(clip_bpe(pairs))
    except ValueError as error:
        raise WeightFileError(f"{file} is not CLIP's list of merges: {error}") from None
