"""Files appear atomically or not at all, and only after they have reached the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dalle_zoo.files import check_ending, written_aside


def half(path: Path) -> None:
    with written_aside(path) as aside:
        aside.write_text("ha")
        raise RuntimeError("half way")


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new/file"
    with written_aside(path) as aside:
        aside.write_text("complete")
        assert not path.exists()
    assert path.read_text() == "complete"
    with pytest.raises(RuntimeError, match="half way"):
        half(path)
    assert path.read_text() == "complete"
    assert list(path.parent.iterdir()) == [path]


def test_the_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with written_aside(path) as aside:
        aside.write_text("complete")
    assert synced == [False]


def test_endings() -> None:
    check_ending("--out", Path("a.png"))
    check_ending("--out", Path("a.PNG"))
    check_ending("path", Path("a.svg"), (".png", ".svg"))
    with pytest.raises(ValueError, match=r"--out must end in \.png, got 'a\.jpg'"):
        check_ending("--out", Path("a.jpg"))
    with pytest.raises(ValueError, match=r"path must end in one of \.png, \.svg, got 'a'"):
        check_ending("path", Path("a"), (".png", ".svg"))


def test_a_file_may_be_read_by_whom_the_system_lets(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    with written_aside(ours) as aside:
        aside.touch(mode=0o600)
    assert ours.stat().st_mode == plain.stat().st_mode
