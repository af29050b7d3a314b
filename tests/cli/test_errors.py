"""Errors of the command: one line and an exit status for every exception."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import dalle_zoo.cli.main as command
from dalle_zoo.cli import parser_errors
from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.main import main
from dalle_zoo.cli.outputs import check_file, check_folder
from dalle_zoo.files import atomic_write
from dalle_zoo.values import as_integer


def fails(error: BaseException) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        raise error

    return run


def nested(depth: int) -> int:
    return nested(depth + 1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command with the given function; returns its exit status and the text on stderr."""

    def run(function: Callable[[list[str]], object], *options: str) -> tuple[int, str]:
        monkeypatch.setitem(sys.modules, "a_command", SimpleNamespace(run=function))
        monkeypatch.setitem(command.COMMANDS, "masks", ("a_command:run", ""))
        return command.main(["masks", *options]), capsys.readouterr().err

    return run


FULL = OSError(errno.ENOSPC, "No space left on device", "big.bin")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("choose another"), 2, "choose another"),
        (ModuleNotFoundError("No module named 'torchao'"), 2, "No module named 'torchao'"),
        (FULL, 2, "big.bin cannot be written: no space left on the disk. Free some space, then run the same"),
        (SafetensorError("I/O error: No space left (os error 28)"), 2, "a file cannot be written: no space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), 2, "check the free space"),
        (OSError(errno.ENOSPC, "full", "m/.new.writing/0a1b/dvae/config.json"), 2, "m/new/dvae/config.json cannot be"),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), 2, "a.png: Permission denied"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), 2, "a and b: Invalid link"),
        (RuntimeError("Could not determine home directory."), 2, "set the variable HOME"),
        (MemoryError(), 2, "not enough memory: use a smaller batch or a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"), 2, "use a smaller batch"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "not enough memory (CUDA out of memory.)"),
        (SafetensorError("header too large"), 2, "safetensors cannot be read or written (header too large)"),
        (pickle.UnpicklingError("invalid load key"), 2, "a file of weights is damaged or of another kind"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "a text file is not UTF-8"),
        (RuntimeError("mat1 and mat2\nshapes cannot be multiplied"), 1,
         "unexpected RuntimeError: mat1 and mat2 shapes cannot be multiplied. Run the command again with --debug"),
        (TypeError("unsupported operand"), 1, "unexpected TypeError: unsupported operand. Run the command again"),
        (AssertionError(), 1, "unexpected AssertionError"),
        (ValueError("from a library"), 1, "unexpected ValueError: from a library"),
    ],
)  # fmt: skip
def test_every_exception_is_one_line(
    error: Exception, status: int, line: str, run: Callable[..., tuple[int, str]]
) -> None:
    found, said = run(fails(error))
    assert found == status
    assert said.startswith("dalle-zoo masks: ")
    assert line in said
    assert said.count("\n") == 1


def test_package_messages_are_distinguished_from_python_messages(run: Callable[..., tuple[int, str]]) -> None:
    assert run(lambda _: as_integer("seed", "x")) == (2, "dalle-zoo masks: seed must be an integer, got 'x'\n")
    status, said = run(lambda _: nested(0))
    assert (status, said.count("\n")) == (2, 1)
    assert "an input is nested too deeply" in said
    status, said = run(lambda _: int("x"))
    assert status == 1
    assert "unexpected ValueError: invalid literal" in said


def test_debug_prints_the_traceback_without_secrets(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
    leak = RuntimeError("Illegal header value b'Bearer hf_abcdefghi', secret-of-the-environment")
    for options in ([], ["--debug"]):
        status, said = run(fails(leak), *options)
        assert status == 1
        assert ("Traceback" in said) == bool(options)
        assert "hf_abcdefghi" not in said
        assert "secret-of" not in said
        assert "***" in said


def test_debug_is_an_option_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "eval", "coco"], ["eval", "coco", "--debug"], ["recipes", "nothing", "--debug"]):
        assert command.main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err
    assert command.main(["--help"]) == 0
    assert "--debug" in capsys.readouterr().out


def test_output_is_checked_before_work(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    check_file("--out", tmp_path / "new" / "deeper" / "a.png")
    check_file("--out", tmp_path / "file")
    check_folder("--out", tmp_path / "folder.png" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"], "the check left something"
    with pytest.raises(UserError, match=r"folder.png is a folder: expected the name of a file"):
        check_file("--out", tmp_path / "folder.png")
    with pytest.raises(UserError, match=r"a.png cannot be written: .*file is a file"):
        check_file("--out", tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match=r"file is a file: expected a folder"):
        check_folder("--out", tmp_path / "file")
    with pytest.raises(UserError, match=r"--out has a name of 240 bytes \(n{20}…\): choose one of at most 200"):
        check_file("--out", tmp_path / ("n" * 236 + ".png"))
    with pytest.raises(UserError, match=r"has a name of 241 bytes"):
        check_folder("--out", tmp_path / ("é" * 120 + "x"))
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        check_file("--out", tmp_path / "file", overwrite=False)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, a folder that even root cannot write to")
def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out /proc/x.png cannot be written \(/proc: .*\): choose another place"):
        check_file("--out", Path("/proc/x.png"))


def test_full_disk_is_reported_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"a.png cannot be written \(.*: No space left on device\)"):
        check_file("--out", tmp_path / "a.png")


def test_checkpoint_on_full_disk_is_reported(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: object) -> None:
        with atomic_write(tmp_path / "1.ckpt"):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 278848 vs 278740")

    status, said = run(write)
    assert (status, "check the free space of the disk" in said) == (2, True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    status, said = run(write)
    assert (status, f"{tmp_path / '1.ckpt'} cannot be written: no space left on the disk" in said) == (2, True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_a_constructor_raises_is_one_line() -> None:
    listed = "Subtypes: [<class 'Stage'>, <class 'NoneType'>]\nErrors:\n  - model.tune lora needs\n    ddp: use it\n"
    text = f"Does not validate against any of the Union subtypes\n{listed}  - Expected a <class 'NoneType'>\nGiven: x"
    assert parser_errors.explain(ValueError(text)) == "model.tune lora needs ddp: use it"
    assert parser_errors.explain(ValueError("no recipe")) == "no recipe"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.5", "momentum must be in [0, 1), got 1.5"),
        ("high", "model.init_args.muon.momentum must be a number, got high"),
    ],
)
def test_a_wrong_field_of_an_optional_part_is_named(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "prior/composition", "--model.muon.momentum", value]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"dalle-zoo fit: {message}"
