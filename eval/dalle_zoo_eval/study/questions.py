"""Questions of a study: those of the paper, or those of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dalle_zoo_eval.data_files import DataFileError, build, check_bool, check_keys, read_yaml, sequence
from dalle_zoo_eval.study.errors import StudyError

MAX_QUESTIONS = 8
"""Largest number of questions of a study."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a pair of images."""

    id: str
    """Name in votes and results, of lowercase letters, digits and ``_``."""
    text: str
    """What raters read."""
    neither: bool = False
    """Whether raters may answer "neither". Defaults to False."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", self.id):
            raise DataFileError(f"id must be of lowercase letters, digits and _, such as realism, got {self.id!r}")
        if not isinstance(self.text, str) or not self.text.strip():
            raise DataFileError(f"text must be the text of the question {self.id}, got {self.text!r}")
        check_bool("neither", self.neither)


PAPER = (
    Question(id="realism", text="Which image is more realistic?"),
    Question(id="match", text="Which image matches the caption better?", neither=True),
)
"""The two questions of the paper's appendix on human evaluation; only the second one allows "neither"."""


def read_questions(path: Path | None) -> tuple[Question, ...]:
    """Reads the questions of a YAML file with a list ``questions``, whose entries have the fields of `Question`.

    Args:
        path: The file. Defaults to the questions of the paper, for None.

    Raises:
        StudyError: The file cannot be read, a field is wrong, or an id is repeated.
    """
    if path is None:
        return PAPER
    try:
        values = read_yaml(path)
        check_keys(values, ("questions",), str(path), required=("questions",))
        entries = sequence("questions", values["questions"])
        questions = tuple(build(Question, entry, f"question {number}") for number, entry in enumerate(entries, 1))
    except DataFileError as error:
        raise StudyError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if not 1 <= len(questions) <= MAX_QUESTIONS:
        raise StudyError(f"{path}: expected 1 to {MAX_QUESTIONS} questions, got {len(questions)}")
    ids = [question.id for question in questions]
    for each in ids:
        if ids.count(each) > 1:
            raise StudyError(f"{path}: the id {each} is repeated: give each question its own id")
    return questions
