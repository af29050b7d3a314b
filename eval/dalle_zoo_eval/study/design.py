"""The design of a study: pairs of images, controls, and what each rater sees in which order and on which side."""

from __future__ import annotations

import base64
import itertools
import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from dalle_zoo.files import FileError, read_json, write_json
from dalle_zoo.seeds import seeded_rng
from dalle_zoo_eval.data_files import DataFileError, build
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.questions import Question

STUDY = "study.json"
"""File of the organizer: which image is from which system, and the codes of the raters."""
PAGE = "page"
"""Folder for raters: ``index.html`` and ``images``."""
MAX_RATERS = 10_000
"""Largest number of raters of a study."""
RATERS = "raters.txt"
"""Addresses of the page for the raters, for the organizer."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images that raters compare. Their order is that of their hashed names, which says nothing."""

    caption: int
    """Number of the caption."""
    images: tuple[str, str]
    """File names of the images."""
    systems: tuple[int | None, int | None]
    """Numbers of their systems; None is the scrambled image of a control pair."""

    @property
    def is_control(self) -> bool:
        """Whether one of the images is scrambled."""
        return None in self.systems


@dataclass(frozen=True, kw_only=True)
class Rater:
    """What one rater sees."""

    code: str
    """Number and secret of the rater, such as ``3-k7dq2mzaxe``."""
    order: tuple[int, ...]
    """Numbers of the pairs, in the order in which they appear."""
    flipped: tuple[bool, ...]
    """For each of them, whether its second image is on the left."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study."""

    title: str
    seed: int
    votes: int
    """Votes per pair and question."""
    systems: tuple[str, ...]
    questions: tuple[Question, ...]
    captions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    raters: tuple[Rater, ...]

    @cached_property
    def id(self) -> str:
        """Digest of everything but the codes; votes name it."""
        shown = asdict(self)
        for rater in shown["raters"]:
            del rater["code"]
        return digest(shown)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number of each rater, from 0, by code."""
        return {rater.code: number for number, rater in enumerate(self.raters)}

    @cached_property
    def question(self) -> dict[str, Question]:
        """Questions by id."""
        return {question.id: question for question in self.questions}

    @cached_property
    def flips(self) -> tuple[dict[int, bool], ...]:
        """For each rater, whether the second image of a pair is on the left, by number of the pair."""
        return tuple(dict(zip(rater.order, rater.flipped, strict=True)) for rater in self.raters)

    def write(self, folder: Path) -> None:
        """Writes ``study.json``."""
        write_json(folder / STUDY, {"kind": "dalle-zoo study", "id": self.id, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the study of a folder.

        Raises:
            StudyError: There is none, or its file was changed.
        """
        path = folder / STUDY
        try:
            values = read_json(path, "the folder of a study, as dalle-zoo study make writes it")
            kind, stated = values.pop("kind", None), values.pop("id", None)
            if kind != "dalle-zoo study":
                raise DataFileError(f"kind must be 'dalle-zoo study', got {kind!r}")
            values["questions"] = [build(Question, entry, "question") for entry in values["questions"]]
            values["pairs"] = [build(Pair, entry, "pair") for entry in values["pairs"]]
            values["raters"] = [build(Rater, entry, "rater") for entry in values["raters"]]
            study = build(cls, values, "study")
            found = study.id
        except FileError as error:
            raise StudyError(str(error)) from None
        except (DataFileError, KeyError, TypeError, ValueError) as error:
            raise StudyError(f"{path} cannot be used ({error}): make the study again") from None
        if found != stated:
            raise StudyError(f"{path} was changed after the study was made: restore the original file")
        return study


def system_pairs(count: int) -> list[tuple[int, int]]:
    """Returns the pairs of numbers of systems that are compared: each with each."""
    return list(itertools.combinations(range(count), 2))


def plan_raters(
    pairs: Sequence[Pair], *, seed: int, votes: int, per_rater: int | None = None, spare: int = 0
) -> tuple[Rater, ...]:
    """Assigns pairs to raters.

    The pairs are divided at random into sheets of equal size. Each sheet is assigned to ``votes`` raters, and all
    control pairs to every rater. Each rater has an own random order. The sides of a pair are random for the first
    rater of its sheet and alternate from rater to rater, so that each image is on the left for half of the raters.

    Args:
        pairs: All pairs of the study.
        seed: Seed of sheets, orders and sides.
        votes: Votes per pair.
        per_rater: Largest number of pairs per rater, without controls. Defaults to all.
        spare: Number of further raters, who replace those that are excluded. Defaults to 0.

    Raises:
        StudyError: There would be more than `MAX_RATERS` raters.
    """
    numbers = [number for number, pair in enumerate(pairs) if not pair.is_control]
    controls = [number for number, pair in enumerate(pairs) if pair.is_control]
    seeded_rng("study sheets", seed).shuffle(numbers)
    count = math.ceil(len(numbers) / (per_rater or len(numbers)))
    if votes * count + spare > MAX_RATERS:
        raise StudyError(
            f"the study needs {votes * count + spare} raters, more than {MAX_RATERS}: choose fewer --votes or "
            "--spare, or more pairs --per-rater"
        )
    sheets = [numbers[sheet::count] for sheet in range(count)]
    sides = seeded_rng("study sides", seed)
    first = [sides.random() < 0.5 for _ in pairs]
    raters = []
    for number in range(votes * count + spare):
        order = [*sheets[number % count], *controls]
        seeded_rng("study order", seed, number).shuffle(order)
        turned = (number // count) % 2 == 1
        secret = base64.b32encode(secrets.token_bytes(10)).decode().lower()[:10]
        flipped = tuple(first[pair] != turned for pair in order)
        raters.append(Rater(code=f"{number + 1}-{secret}", order=tuple(order), flipped=flipped))
    return tuple(raters)
