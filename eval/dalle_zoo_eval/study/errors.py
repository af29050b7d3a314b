"""The error of studies and votes that cannot be used."""

from __future__ import annotations


class StudyError(ValueError):
    """A study, its inputs or its votes cannot be used. The message says what was expected and what to do."""
