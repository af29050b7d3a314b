"""Reads vocabularies in BART's format, ``vocab.json`` and ``merges.txt``, as tokenizers of DALL-E mini."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dalle_zoo.convert.location import Location
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.plain_data import PlainDataError, json_value
from dalle_zoo.tokenizers import DalleMiniTokenizer, HFTokenizer, TextTokenizer
from dalle_zoo.tokenizers.dalle_mini import bart_bpe

MAX_BYTES = 2**25
"""Size limit of a vocabulary and of merges."""
SPECIAL = {"begin_token": "<s>", "pad_token": "<pad>", "end_token": "</s>"}
"""Special tokens, by the field of the config that holds their id."""
UNTRAINED = "<mask>"
"""A token of BART that no caption contains: the weights may have no row for it."""


def vocabularies(location: Location) -> dict[str, Path]:
    """Returns the files "vocabulary" and "merges" at a location, recognized by content; both or none.

    Raises:
        WeightFileError: There are several of a kind, or one without the other.
    """
    found: dict[str, list[Path]] = {"vocabulary": [], "merges": []}
    for path in location.files.values():
        if path.suffix == ".json" and _vocabulary(path) is not None:
            found["vocabulary"].append(path)
        elif path.suffix == ".txt" and _merges_begin(path):
            found["merges"].append(path)
    for role, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise WeightFileError(
                f"{location.path} holds more than one {role} ({names}): name one with --files or files="
            )
    if len(found["vocabulary"]) != len(found["merges"]):
        has, lacks = ("vocabulary", "merges") if found["vocabulary"] else ("merges", "vocabulary")
        raise WeightFileError(f"{found[has][0]} was found without its {lacks}: give both, or neither")
    return {role: paths[0] for role, paths in found.items() if paths}


def special_tokens(files: Mapping[str, Path]) -> tuple[dict[str, int], str]:
    """Returns the config fields with ids of special tokens, and their origin."""
    if "vocabulary" not in files:
        return {}, "BART's, as no vocabulary was found"
    vocabulary = _read(files["vocabulary"])
    return {field: vocabulary[token] for field, token in SPECIAL.items()}, files["vocabulary"].name


def text_tokenizer(files: Mapping[str, Path], text_vocab: int, *, simplified: bool) -> TextTokenizer:
    """Builds the text tokenizer.

    Args:
        files: Result of `vocabularies`.
        text_vocab: Rows of the prior's text embedding; ids must be smaller.
        simplified: Whether captions were simplified for training.

    Raises:
        WeightFileError: The files do not fit the prior, or each other.
    """
    vocabulary = _read(files["vocabulary"])
    if vocabulary.get(UNTRAINED, 0) >= text_vocab:
        del vocabulary[UNTRAINED]
    if max(vocabulary.values()) >= text_vocab:
        raise WeightFileError(
            f"{files['vocabulary']} has ids up to {max(vocabulary.values())}, the weights have {text_vocab} rows: "
            "give the vocabulary they were trained with"
        )
    try:
        library = bart_bpe(vocabulary, _merges(files["merges"]), simplified=simplified)
    except ValueError as error:
        raise WeightFileError(f"{files['vocabulary']} and {files['merges']}: {error}") from None
    return DalleMiniTokenizer(library) if simplified else HFTokenizer(library)


def _vocabulary(path: Path) -> dict[str, int] | None:
    """Returns ids by token; None if the file is not a vocabulary of this kind.

    Raises:
        WeightFileError: The file is not valid JSON.
    """
    if path.stat().st_size > MAX_BYTES:
        return None
    try:
        content = json_value(path.read_bytes(), max_bytes=MAX_BYTES)
    except PlainDataError as error:
        raise WeightFileError(f"{path} {error}") from None
    if not isinstance(content, dict) or not content.keys() >= set(SPECIAL.values()):
        return None
    if any(type(number) is not int or number < 0 for number in content.values()):
        return None
    return content


def _read(path: Path) -> dict[str, int]:
    vocabulary = _vocabulary(path)
    if vocabulary is None:
        raise WeightFileError(f"{path} is no longer a vocabulary: it was changed since it was recognized")
    return vocabulary


def _merges_begin(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"#version" and path.stat().st_size <= MAX_BYTES


def _merges(path: Path) -> Sequence[tuple[str, str]]:
    """Returns the merges in order of priority.

    Raises:
        ValueError: A line does not hold two parts.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[1:], start=2):
        match line.rstrip("\r").split(" "):
            case [first, second]:
                pairs.append((first, second))
            case [""]:
                continue
            case _:
                raise ValueError(f"line {number} must hold two parts, got {line[:60]!r}")
    return pairs
