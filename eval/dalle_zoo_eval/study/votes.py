"""Votes: their form, and how they are read from exported files and from the log of the server."""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, parse_json, read_json
from dalle_zoo_eval.study.design import STUDY, Study
from dalle_zoo_eval.study.errors import StudyError

LEFT, RIGHT, NEITHER = 1, 2, 0
"""Answers."""
VOTES = "votes"
"""Folder in that of the study in which the server stores votes, and in which exported files are expected."""


class CodeError(StudyError):
    """The code of a rater is not one of this study."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """An answer of one rater to one question about one pair."""

    rater: int
    """Number of the rater, from 0."""
    pair: int
    """Number of the pair."""
    question: str
    """Id of the question."""
    answer: int
    """`LEFT`, `RIGHT` or `NEITHER`, as displayed."""
    seconds: float
    """Time from when both images were visible."""

    @property
    def key(self) -> tuple[int, int, str]:
        """What there is one vote of: rater, pair and question."""
        return self.rater, self.pair, self.question


@dataclass(frozen=True, kw_only=True)
class Votes:
    """All votes of a study."""

    votes: tuple[Vote, ...]
    """One vote per rater, pair and question."""
    repeated: int
    """Later votes of the same rater, pair and question with another answer, which do not count."""


def parse_votes(study: Study, values: Mapping[str, Any]) -> list[Vote]:
    """Checks what the page exports or sends: ``study``, ``rater`` and ``votes``.

    Raises:
        CodeError: The code of the rater is not one of this study.
        StudyError: The votes are from another study, or one of them is wrong.
    """
    if values.keys() != {"study", "rater", "votes"} or not isinstance(values["votes"], list):
        raise StudyError("expected an object with study, rater and a list votes, as the page exports it")
    if values["study"] != study.id:
        raise StudyError("the votes are from another study, or the study was made again after the page was opened")
    rater = _rater(study, values["rater"])
    return [_vote(study, rater, entry) for entry in values["votes"]]


def _rater(study: Study, code: object) -> int:
    """Returns the number of a rater; the comparison takes equally long for all wrong codes."""
    text = code.encode("utf-8", "surrogatepass") if isinstance(code, str) else b""
    found = [number for known, number in study.numbers.items() if hmac.compare_digest(known.encode(), text)]
    if not found:
        raise CodeError("the code of the rater is not one of this study: correct it, or leave the votes out")
    return found[0]


def _vote(study: Study, rater: int, entry: object) -> Vote:
    if not isinstance(entry, dict) or entry.keys() != {"pair", "question", "answer", "seconds"}:
        raise StudyError("a vote must have exactly pair, question, answer and seconds")
    pair, question, answer, seconds = (entry[key] for key in ("pair", "question", "answer", "seconds"))
    if not _is_integer(pair) or pair not in study.flips[rater]:
        raise StudyError(f"pair must be one that the rater was asked about, got {str(pair)[:50]!r}")
    if not isinstance(question, str) or question not in study.question:
        raise StudyError(f"question must be one of {', '.join(study.question)}, got {str(question)[:50]!r}")
    allowed = (LEFT, RIGHT, NEITHER) if study.question[question].neither else (LEFT, RIGHT)
    if not _is_integer(answer) or answer not in allowed:
        raise StudyError(f"answer to {question} must be one of {allowed}, got {str(answer)[:50]!r}")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or seconds < 0:
        raise StudyError(f"seconds must be a number of at least 0, got {str(seconds)[:50]!r}")
    return Vote(rater=rater, pair=pair, question=question, answer=answer, seconds=float(seconds))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------- files


def study_folder(paths: Sequence[Path]) -> Path:
    """Returns the folder of the study that votes belong to: the nearest one at or above the first path.

    Raises:
        StudyError: There is none.
    """
    first = paths[0].resolve()
    for folder in (first, *list(first.parents)[:2]):
        if (folder / STUDY).is_file():
            return folder
    raise StudyError(f"no {STUDY} at or above {paths[0]}: give the folder of the study with --study")


def read_votes(study: Study, paths: Sequence[Path]) -> Votes:
    """Reads votes from exported ``.json`` files, logs of the server (``.jsonl``), and folders of both.

    Args:
        study: The study.
        paths: Files and folders; the folder of a study stands for its votes. The first vote of a rater, pair and
            question counts, in the order of the files.

    Raises:
        StudyError: A path is missing, a file cannot be used, or there is no vote.
    """
    counted: dict[tuple[int, int, str], Vote] = {}
    repeated = 0
    for file in dict.fromkeys(file for path in paths for file in _files(path)):
        for vote in _read(study, file):
            first = counted.setdefault(vote.key, vote)
            repeated += first.answer != vote.answer
    if not counted:
        raise StudyError(
            f"there are no votes in {', '.join(map(str, paths))}: put the files that raters return, votes-N.json, "
            "into the folder votes of the study, or collect votes with 'dalle-zoo study serve'"
        )
    return Votes(votes=tuple(counted.values()), repeated=repeated)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path.resolve()]
    folder = path / VOTES if (path / STUDY).is_file() else path
    if not folder.is_dir():
        raise StudyError(f"{folder} does not exist: expected exported votes, or the votes of the server")
    return sorted(file.resolve() for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))


def _read(study: Study, path: Path) -> Iterator[Vote]:
    try:
        if path.suffix == ".jsonl":
            yield from log_votes(study, path.read_bytes(), path)
        else:
            yield from parse_votes(study, read_json(path, "votes that the page has exported"))
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from None
    except FileError as error:
        raise StudyError(str(error)) from None
    except StudyError as error:
        raise StudyError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def log_votes(study: Study, data: bytes, path: Path) -> Iterable[Vote]:
    """Yields the votes of a log, one object per line as `parse_votes` reads it.

    A last line without a line break was being written when the server was killed. No rater was told that its votes are
    stored, so it is left out.
    """
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            yield from parse_votes(study, parse_json(line, where))
        except StudyError as error:
            raise StudyError(f"{where}: {error}") from None
