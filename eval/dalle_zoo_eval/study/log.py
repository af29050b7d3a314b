"""The log of the server: votes in an append-only file, on disk before a rater is told that they are stored."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dalle_zoo.claims import CLAIM, Claims
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.votes import VOTES, log_votes, parse_votes

LOG = "server.jsonl"
"""File of the log, in the folder of the votes."""


class VoteLog:
    """Appends votes to ``votes/server.jsonl``; threads may share it, but only one process may write.

    Args:
        study: The study.
        folder: Folder of the study.

    Raises:
        StudyError: The log has a line that is not of this study.
        ClaimedError: Another server writes the log.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.path = study, folder / VOTES / LOG
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock, self._claims = threading.Lock(), Claims()
        self._claims.hold(self.path.parent / CLAIM, f"the votes of {folder}")
        self._file: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            data = self.path.read_bytes()
            self._known: set[object] = {vote.key for vote in log_votes(study, data, self.path)}
            self._end = data.rfind(b"\n") + 1
            os.ftruncate(self._file, self._end)  # a line that was being written at a kill; no rater was told of it
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Number of stored votes."""
        with self._lock:
            return len(self._known)

    def append(self, values: Mapping[str, Any]) -> int:
        """Stores votes as the page sends them; a vote of the same rater, pair and question exists only once.

        Args:
            values: What `parse_votes` takes.

        Returns:
            Number of votes that are new. The others are ignored, so that a page may send votes again after a failure.

        Raises:
            StudyError: A vote is wrong; none is stored then.
            OSError: The disk is full; none is stored then.
        """
        votes = parse_votes(self.study, values)
        with self._lock:
            new: dict[object, Any] = {}
            for vote, entry in zip(votes, values["votes"], strict=True):
                if vote.key not in self._known:
                    new.setdefault(vote.key, entry)
            if new:
                self._write({**values, "votes": list(new.values())})
                self._known.update(new)
            return len(new)

    def _write(self, values: Mapping[str, Any]) -> None:
        assert self._file is not None  # not closed
        line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Closes the file and lets other servers write it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._claims.release(self.path.parent / CLAIM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
