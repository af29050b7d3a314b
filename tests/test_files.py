"""Files and folders are written atomically and synced to disk first; JSON errors name the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dalle_zoo.files import (
    FileError,
    atomic_write,
    check_ending,
    new_folder,
    parse_json,
    read_json,
    stays_inside,
    try_read_json,
    write_json,
)


def half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError("half way")


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new/file"
    with atomic_write(path) as temporary:
        temporary.write_text("complete")
        assert not path.exists()
    assert path.read_text() == "complete"
    with pytest.raises(RuntimeError, match="half way"):
        half(path)
    assert path.read_text() == "complete"
    assert list(path.parent.iterdir()) == [path]


def test_the_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with atomic_write(path) as temporary:
        temporary.write_text("complete")
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
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    with atomic_write(written) as temporary:
        temporary.touch(mode=0o600)
    assert written.stat().st_mode == plain.stat().st_mode


# ------------------------------------------------------------ JSON


def test_json_appears_atomically(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Ä"})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"name": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert read_json(tmp_path / "a.json") == {"name": "Ä"}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[" * 100_000, "nests lists and mappings more than 64 deep"),
        (b'{"score": NaN}', "is not valid JSON: it has the number NaN"),
        (b"[1]", "must contain a JSON object, got list"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"a\.json {message}"):
        read_json(path)
    with pytest.raises(FileError, match=rf"part of an archive {message}"):
        parse_json(content, "part of an archive")
    assert try_read_json(path) is None


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.json is missing: expected a JSON file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileError, match=r"a\.json is missing: expected a folder of dalle-zoo"):
        read_json(tmp_path / "a.json", "a folder of dalle-zoo")
    with pytest.raises(FileError, match="cannot be read: "):
        read_json(tmp_path)
    assert try_read_json(tmp_path / "a.json") is None


# ------------------------------------------------------------ new folders


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep/model"
    with new_folder(target) as new:
        (new / "file").write_text("x")
        assert not target.exists()
    assert names(tmp_path) == ["deep", "deep/model", "deep/model/file"]


def fill_half(folder: Path, overwrite: bool = False) -> None:
    with new_folder(folder, overwrite=overwrite) as new:
        (new / "file").write_text("x")
        raise RuntimeError("half way")


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        fill_half(tmp_path / "model")
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(FileExistsError, match=r"exists and is not empty: .* pass --overwrite"),
        new_folder(tmp_path),
    ):
        pytest.fail("the block began")
    assert names(tmp_path) == ["file"]
    with pytest.raises(NotADirectoryError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pytest.fail("the block began")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with new_folder(target) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["model", "model/file"]


def test_overwriting_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        fill_half(target, overwrite=True)
    assert names(tmp_path) == ["model", "model/config.json"]
    with new_folder(target, overwrite=True) as new:
        (new / "new").write_text("new")
    assert names(tmp_path) == ["model", "model/new"]


def test_a_folder_that_another_process_makes_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    making = new_folder(target)
    (making.__enter__() / "file").write_text("mine")
    target.mkdir()
    (target / "file").write_text("theirs")
    with pytest.raises(FileExistsError, match=r"another process created .*model in the meantime"):
        making.__exit__(None, None, None)
    assert names(tmp_path) == ["model", "model/file"]
    assert (target / "file").read_text() == "theirs"


@pytest.mark.parametrize("marker", ["config.json", "tokenizer_config.json"])
def test_only_a_folder_of_the_same_kind_is_replaced(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "model_index.json").write_text("of another kind")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(FileExistsError, match=rf"contains other files and is not replaced \(it has no {marker}\)"),
        new_folder(Path(), overwrite=True, marker=marker),
    ):
        pytest.fail("the block began")
    assert names(tmp_path) == ["model_index.json", "thesis"]
    (tmp_path / marker).write_text("ours")
    with new_folder(tmp_path, overwrite=True, marker=marker) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["file"]


def test_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, synced = tmp_path / "model", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(target.exists()))
    with new_folder(target) as new:
        (new / "part").mkdir()
        (new / "part/file").write_text("x")
    assert synced == [False]


def test_the_current_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["here", "here/file"]


def test_other_files_are_not_deleted_with_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "results").mkdir(parents=True)
    for name in ("config.json", "results/mine.json"):
        (target / name).write_text("x")
    with (
        pytest.raises(FileExistsError, match=r"model contains results/mine\.json, which would be deleted: move it"),
        new_folder(target, overwrite=True, contents=("config.json", "model*.safetensors")),
    ):
        pytest.fail("the block began")
    (target / "results/mine.json").unlink()
    replacing = new_folder(target, overwrite=True, contents=("config.json",))
    (replacing.__enter__() / "config.json").write_text("new")
    (target / "late").write_text("x")
    with pytest.raises(FileExistsError, match="model contains late, which would be deleted"):
        replacing.__exit__(None, None, None)
    assert names(tmp_path) == ["model", "model/config.json", "model/late", "model/results"]


def test_json_holds_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9 \xe2\x82\xac".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", {name: [name]})
    assert "\u20ac" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {name: [name]}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: full (os error 28)")]
)
def test_a_full_disk_names_the_file_and_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "big.bin") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(OSError, match=r"No space left on device: .*big\.bin") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("name", ["9" * 256, "é" * 128, "/".join(["a" * 200] * 6), "a\0b", "", ".."])
def test_names_that_no_file_in_the_folder_can_have_do_not_stay_inside(name: str) -> None:
    assert not stays_inside(name)


def test_the_longest_name_stays_inside() -> None:
    assert stays_inside("shards/" + "9" * 255)
