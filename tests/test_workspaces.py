"""A kill at any moment leaves the old contents or the new ones, and the next writer removes everything else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dalle_zoo import claims, workspaces
from dalle_zoo.claims import ClaimedError, Claims
from dalle_zoo.files import atomic_write, new_folder
from dalle_zoo.workspaces import RESUMABLE, recover, remove_abandoned, workspace

Recorder = Callable[[Path], AbstractContextManager[None]]


def write(root: Path, content: str, *, overwrite: bool = True) -> None:
    """A model folder of two files."""
    with new_folder(root / "model", overwrite=overwrite) as new:
        (new / "part").mkdir()
        for name in ("config.json", "part/weights"):
            (new / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def model(content: str) -> dict[str, str]:
    return {"config.json": content, "part/weights": content}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "_exchange", lambda *_: False)


def killed(tmp_path: Path) -> Iterable[Path]:
    states = sorted((tmp_path / "killed").iterdir())
    assert len(states) >= 8
    return states


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_folder_is_never_lost(
    exchanges: bool, tmp_path: Path, killed_states: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    write(root, "old")
    if not exchanges:
        without_exchange(monkeypatch)
    with killed_states(root):
        write(root, "new")
    seen = set()
    for state in killed(tmp_path):
        if not exchanges:  # a reader finds the old folder again
            recover(state / "model")
        assert contents(state / "model") in (model("old"), model("new"))
        seen.add(contents(state / "model")["config.json"])
        write(state, "newer")  # the same command again
        assert contents(state) == {f"model/{name}": text for name, text in model("newer").items()}
        assert [path.name for path in state.iterdir()] == ["model"], "nothing is left"
    assert seen == {"old", "new"}


def test_a_file_is_never_lost(tmp_path: Path, killed_states: Recorder) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("old")
    with killed_states(root), atomic_write(root / "file") as temporary:
        temporary.write_text("new")
    for state in killed(tmp_path):
        assert (state / "file").read_text() in ("old", "new")
        with atomic_write(state / "file") as temporary:
            temporary.write_text("newer")
        assert contents(state) == {"file": "newer"}
        assert [path.name for path in state.iterdir()] == ["file"], "nothing is left"


def test_this_system_exchanges_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    if not workspaces._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("neither this system nor this file system can exchange two folders")
    assert (tmp_path / "a/name").read_text() == "b"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        workspaces._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_a_second_writer_waits_and_then_refuses(tmp_path: Path) -> None:
    results, started = [], threading.Event()

    def second() -> None:
        started.set()
        try:
            write(tmp_path, "second", overwrite=False)
        except FileExistsError as error:
            results.append(str(error))

    thread = threading.Thread(target=second)
    with new_folder(tmp_path / "model") as new:
        thread.start()
        started.wait()
        (new / "config.json").write_text("first")
        assert thread.is_alive()
    thread.join(20)
    assert len(results) == 1
    assert "model exists and is not empty" in results[0]
    assert contents(tmp_path) == {"model/config.json": "first"}


def test_what_a_live_process_writes_stays(tmp_path: Path) -> None:
    with workspace(tmp_path / "model") as folder:
        (folder / "half").write_text("x")
        remove_abandoned(tmp_path)
        assert (folder / "half").exists()
        with (
            pytest.raises(ClaimedError, match=r"writes .*model: wait until it ends"),
            workspace(tmp_path / "model", wait=False),
        ):
            pytest.fail("the block began")
        assert (folder / "half").exists()
        (folder / "half").unlink()
    assert list(tmp_path.iterdir()) == []


def test_abandoned_work_is_removed_and_resumable_work_stays(tmp_path: Path) -> None:
    folder = tmp_path / ".model.writing"
    (folder / "0123/part").mkdir(parents=True)
    for name in (".claim", "4567", RESUMABLE):
        (folder / name).write_text("x")
    with workspace(tmp_path / "model"):
        assert sorted(path.name for path in folder.iterdir()) == [".claim", RESUMABLE]
    assert [path.name for path in folder.iterdir()] == [RESUMABLE]
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_locks_names_are_unique_and_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "fcntl", None)
    with atomic_write(tmp_path / "file") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "file") as second:
            second.write_text("second")
            remove_abandoned(tmp_path)
        assert first.read_text() == "first"
        assert (tmp_path / "file").read_text() == "second"
    assert contents(tmp_path) == {"file": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_leaves_a_folder_that_is_being_replaced_to_its_writer(tmp_path: Path) -> None:
    folder = tmp_path / ".model.writing"
    (folder / "replaced").mkdir(parents=True)
    reader = threading.Thread(target=recover, args=(tmp_path / "model",))
    with Claims() as writer:
        writer.take(folder / ".claim", wait=False)
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()
        (tmp_path / "model").mkdir()  # the new folder
    reader.join(20)
    assert (folder / "replaced").exists()
    recover(tmp_path / "missing")  # nothing to do


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real/model")
    with new_folder(tmp_path / "link", overwrite=True) as new:
        (new / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"model/config.json": "new"}
