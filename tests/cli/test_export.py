"""``dalle-zoo export``: trained stages become a folder that generates."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main
from dalle_zoo.cli.runs import trained
from dalle_zoo.zoo import find_component


@pytest.fixture
def runs(model: Path, scratch: Path) -> Path:
    """Two finished runs, as far as export reads them."""
    for stage in ("dvae", "prior"):
        shutil.copytree(model / stage, scratch / "runs" / stage / "model" / stage)
        (scratch / "runs" / stage / "checkpoints").mkdir()
    return scratch / "runs"


def export(runs: Path, model: Path, *options: str) -> int:
    parts = ["--dvae", str(runs / "dvae"), "--prior", str(runs / "prior"), "--tokenizer", str(model)]
    return main(["export", *parts, "--out", "mine", *options])


def test_exported_model_generates_same_images(
    runs: Path, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(runs, model) == 0
    assert capsys.readouterr().out.strip() == str(scratch / "mine")
    for folder, out in ((model, "a.png"), (scratch / "mine", "b.png")):
        assert main(["generate", "a cat", "--model", str(folder), "-n", "2", "--seed", "3", "--out", out]) == 0
    assert (scratch / "a.png").read_bytes() == (scratch / "b.png").read_bytes()
    assert DallePipeline.from_pretrained(scratch / "mine").ranker is None


def test_stored_precision_is_as_requested(runs: Path, model: Path, scratch: Path) -> None:
    assert export(runs, model, "--dtype", "bfloat16") == 0
    # A code is an argmax, so the image tokenizer retains its precision.
    for stage, dtype in (("dvae", torch.float32), ("prior", torch.bfloat16)):
        tensors = load_file(scratch / "mine" / stage / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert main(["generate", "a cat", "--model", "mine", "-n", "1"]) == 0


def test_existing_folder_is_replaced_only_with_overwrite(
    runs: Path, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "mine").mkdir()
    (scratch / "mine" / "notes").write_text("mine")
    for options, message in (([], "exists and is not empty"), (["--overwrite"], "is not replaced")):
        assert export(runs, model, *options) == 2
        assert message in capsys.readouterr().err
        assert (scratch / "mine" / "notes").read_text() == "mine"
    (scratch / "mine" / "model_index.json").touch()
    assert export(runs, model, "--overwrite") == 2
    assert "mine contains notes, which would be deleted: move it" in capsys.readouterr().err
    (scratch / "mine" / "notes").unlink()
    assert export(runs, model, "--overwrite") == 0
    assert DallePipeline.from_pretrained(scratch / "mine")
    assert export(runs, model, "--overwrite") == 0, "all that export writes may be replaced"


def test_name_that_is_not_utf8_raises_before_work(
    model: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises an error
    for command in (
        ["export", "--dvae", str(model), "--prior", str(model), "--tokenizer", str(model), "--out", "caf\udce9"],
        ["encode", "composition:train", "--model", str(model), "--out", "caf\udce9/codes"],
        ["reconstruct", "a.png", "--model", str(model), "--out", "caf\udce9.png"],
    ):
        assert main(command) == 2
        assert r"--out has a name that is not UTF-8 ('caf\udce9" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("command", [["consolidate", "a.ckpt"], ["tokenizer", "composition:val-concepts"]])
def test_complete_model_is_not_replaced_by_part(
    command: list[str], model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, scratch / "mine")
    (scratch / "mine" / "tokenizer_config.json").write_text("{}")  # as in a folder of transformers
    (scratch / "a.ckpt").touch()
    before = sorted((scratch / "mine").rglob("*"))
    assert main([*command, "--out", "mine", "--overwrite"]) == 2
    assert "would be deleted: move it, or choose another folder" in capsys.readouterr().err
    assert sorted((scratch / "mine").rglob("*")) == before


def test_bundled_name_precedes_run_name(runs: Path) -> None:
    (runs / "dvae").rename(runs.parent / "composition")
    assert trained("composition", "dvae") == find_component("composition", "dvae") != trained("./composition", "dvae")


def test_unfinished_run_is_reported(
    runs: Path, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(runs / "prior" / "model")
    assert export(runs, model) == 2
    assert "is a run that has not finished" in capsys.readouterr().err
    assert not (scratch / "mine").exists()


def test_plot_without_run_raises(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "nowhere"]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []
