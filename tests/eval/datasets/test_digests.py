"""Digests of contents: each file is read once, and again after a change."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from dalle_zoo_eval.datasets import digests
from dalle_zoo_eval.datasets.digests import MEMO, content_digests, remember

from dalle_zoo.files import sha256_file


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(digests, "sha256_file", noted)
    return names


def old(path: Path, text: str) -> Path:
    """A file that was written an hour ago."""
    path.write_text(text)
    then = time.time() - 3600
    os.utime(path, (then, then))
    return path


def test_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    paths = [old(tmp_path / name, name) for name in "ab"]
    expected = [sha256_file(path) for path in paths]
    assert content_digests(paths) == content_digests(paths) == expected
    assert sorted(read) == ["a", "b"]


def test_other_process_reads_memo(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, memo = old(tmp_path / "a", "one"), tmp_path / "cache" / MEMO
    (expected,) = content_digests([path], memo)
    assert not memo.parent.exists()
    remember([path], memo)
    monkeypatch.setattr(digests, "_known", {})
    assert content_digests([path], memo) == [expected]
    assert read == ["a"]
    memo.write_text('{"damaged": 1}')
    monkeypatch.setattr(digests, "_known", {})
    assert content_digests([path], memo) == [expected]
    assert read == ["a", "a"]


@pytest.mark.parametrize("text", ["two", "longer"])
def test_changed_file_is_read_again(tmp_path: Path, text: str) -> None:
    path, memo = old(tmp_path / "a", "one"), tmp_path / MEMO
    (before,) = content_digests([path])
    remember([path], memo)
    time.sleep(0.05)  # the clock of a file system goes in steps
    old(path, text)  # of an older time, perhaps of equal size: the entry in the folder is new
    assert content_digests([path], memo) == [sha256_file(path)] != [before]


def test_recently_changed_file_is_not_cached(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "a"
    for text in ("one", "two"):
        path.write_text(text)
        assert content_digests([path]) == [sha256_file(path)]
    assert read == ["a", "a"]
