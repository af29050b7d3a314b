"""Claims: one process does a piece of work, the others wait or refuse, and a kill releases it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from dalle_zoo import claims as module
from dalle_zoo.claims import ClaimedError, Claims


def test_a_claim_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "work.claim"
    with Claims() as first, Claims() as second:
        assert first.take(path, wait=False)
        assert not second.take(path, wait=False)
        first.release(path)
        assert not path.exists()
        assert second.take(path, wait=True)
    assert not path.exists()  # given back at the end of the block
    with Claims() as third:
        assert third.take(path, wait=False)


def test_who_waits_long_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    path = tmp_path / "000007.claim"
    with Claims() as hung, Claims() as first:
        assert hung.take(path, wait=False)
        waiting = threading.Thread(target=first.take, args=(path,), kwargs={"wait": True})
        waiting.start()
        limit = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < limit:
            time.sleep(0.01)
        hung.release(path)
        waiting.join(20)
    (message,) = caplog.messages
    assert f"for process {os.getpid()} on " in message
    assert f"has the claim {path}:" in message


def test_without_locks_everybody_may_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    assert module.fcntl is not None
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with Claims() as first, Claims() as second:
        assert first.take(tmp_path / "a", wait=False)
        assert second.take(tmp_path / "a", wait=False)
        assert not second.excludes_others(tmp_path / "a")


def test_who_refuses_names_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with Claims() as first, Claims() as second:
        first.hold(path, "codes")
        assert first.excludes_others(path)
        with pytest.raises(ClaimedError, match=rf"^process {os.getpid()} on .* writes codes: wait until it ends, or"):
            second.hold(path, "codes")


def test_who_waited_for_a_removed_file_locks_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, third = tmp_path / "claim", Claims()
    lock = module._lock

    def late(file: int, at: Path, *, wait: bool) -> bool:
        monkeypatch.setattr(module, "_lock", lock)
        first.release(path)  # between opening the file and locking it ...
        assert third.take(path, wait=False)  # ... and another process is faster
        return lock(file, at, wait=wait)

    with Claims() as first, Claims() as second, third:
        assert first.take(path, wait=False)
        monkeypatch.setattr(module, "_lock", late)
        assert not second.take(path, wait=False)


def test_a_forked_worker_does_not_keep_a_claim(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    first = Claims()
    assert first.take(path, wait=False)
    (file,) = first._files.values()
    duplicate = os.dup(file)  # what a forked child has
    module._close_in_child()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    with Claims() as second:
        assert not second.take(path, wait=False), "the parent still has it"
        os.close(duplicate)  # the parent is killed
        assert second.take(path, wait=False)
