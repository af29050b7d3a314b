"""``dalle-zoo demo | generate | reconstruct``: images, and what is never overwritten."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_zoo.cli.main import main

SHEET = 2 + 18, 2 + 18
"""A grid of one image of 16 pixels with rims of 2."""


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def generate(model: Path, *options: str) -> int:
    return main(["generate", "a cat", "--model", str(model), "--seed", "1", *options])


def test_a_grid_and_every_image(model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "-n", "5", "--out", "new/grid.png", "--folder", "each") == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(scratch / "new/grid.png")
    assert "sampling" in said.err
    # Five images make three columns and two rows, twice as large, below a line with the caption.
    assert size(scratch / "new/grid.png") == (2 * (2 + 3 * 18), 2 * (2 + 2 * 18) + 18)
    names = sorted(path.name for path in (scratch / "each").iterdir())
    assert names == [f"000-{number:03d}.png" for number in range(5)]
    assert {size(path) for path in (scratch / "each").iterdir()} == {(16, 16)}


def test_the_same_seed_gives_the_same_images_whatever_the_batch(model: Path, scratch: Path) -> None:
    calls = {"a": [], "b": ["--batch-size", "2"], "c": ["--window", "3"], "d": ["--seed", "2"]}
    for name, options in calls.items():
        assert generate(model, "-n", "4", "--out", f"{name}.png", *options) == 0
    a, b, c, d = ((scratch / f"{name}.png").read_bytes() for name in calls)
    assert a == b == c
    assert a != d


def test_several_captions_have_a_row_each(model: Path, scratch: Path) -> None:
    assert main(["generate", "a cat", "a dog", "--model", str(model), "-n", "3", "--folder", "each"]) == 0
    assert size(scratch / "grid.png") == (2 * (2 + 3 * 18), 2 * (2 * (2 + 18) + 18))
    assert sorted(path.name for path in (scratch / "each").iterdir())[2:4] == ["000-002.png", "001-000.png"]


def test_nothing_is_overwritten_unasked(model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "grid.png").write_text("mine")
    assert generate(model, "-n", "1") == 2
    assert "grid.png exists: pass --overwrite to replace it, or choose another --out" in capsys.readouterr().err
    assert (scratch / "grid.png").read_text() == "mine"
    (scratch / "each").mkdir()
    (scratch / "each" / "000-000.png").write_text("mine")
    assert generate(model, "-n", "1", "--out", "other.png", "--folder", "each") == 2
    assert "each is not empty: pass --overwrite" in capsys.readouterr().err
    assert not (scratch / "other.png").exists()
    assert generate(model, "-n", "1", "--folder", "each", "--overwrite") == 0
    assert size(scratch / "each" / "000-000.png") == (16, 16)


def test_priming_keeps_the_top_of_an_image(model: Path, images: Path, scratch: Path) -> None:
    prime = ["--prime", str(images / "0.png"), "--folder"]
    assert generate(model, "-n", "2", *prime, "all", "--prime-rows", "4") == 0
    assert main(["reconstruct", str(images / "0.png"), "--model", str(model)]) == 0
    retained = [np.asarray(Image.open(path)) for path in sorted((scratch / "all").iterdir())]
    assert np.array_equal(retained[0], retained[1]), "all rows were given"
    assert generate(model, "-n", "2", *prime, "half", "--out", "half.png") == 0
    generated = [np.asarray(Image.open(path)) for path in sorted((scratch / "half").iterdir())]
    assert not np.array_equal(generated[0], generated[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rerank", "1"], "rerank needs a ranker, and this model has none"),
        (["--rerank", "17"], "it must be in 1..num_images_per_prompt (16), got 17"),
        (["-n", "0"], "num_images_per_prompt must be at least 1, got 0"),
        (["--prime-rows", "2"], "prime_rows needs prime"),
        (["--prime", "nowhere.png"], "nowhere.png"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "0"], "top_k"),
        (["--temperature", "-1"], "temperature"),
        (["--device", "cdua"], "device 'cdua' cannot be used"),
        (["--window", "8"], "window is faster only for at most 4 images at once, got 16"),
        (["-n", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_options_stop_before_work_begins(
    options: list[str], message: str, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = generate(model, *options)
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("command", [["generate", "a cat"], ["reconstruct", "a.png"]])
def test_a_wrong_model(command: list[str], scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--model", "emoji46"]) == 2
    said = capsys.readouterr().err
    assert "unknown model 'emoji46'" in said
    assert "A local folder" in said
    (scratch / "empty").mkdir()
    assert main([*command, "--model", "empty"]) == 2
    assert "empty" in capsys.readouterr().err


def test_reconstructions_are_measured(
    model: Path, images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(images / f"{number}.png") for number in range(3)]
    assert main(["reconstruct", *files, "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"-?\d+\.\d dB", "? dB", line) for line in lines[:3]] == [f"{file}: ? dB" for file in files]
    assert lines[3] == str(scratch / "reconstructions.png")
    assert size(scratch / "reconstructions.png") == (2 + 3 * 18, 2 + 2 * 18)
    assert main(["reconstruct", *files, "--model", str(model)]) == 2
    assert "reconstructions.png exists: pass --overwrite" in capsys.readouterr().err
    assert main(["reconstruct", *files, "--model", str(model), "--overwrite"]) == 0


@pytest.mark.parametrize(("name", "message"), [("no.png", "no.png"), ("words.png", "words.png"), (".", "'.'")])
def test_what_is_no_image(
    name: str, message: str, model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "words.png").write_text("words")
    assert main(["reconstruct", name, "--model", str(model)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in scratch.iterdir()] == ["words.png"]


def test_the_demo_samples_with_the_bundled_model(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", "sheet.png"]) == 0
    assert str(scratch / "sheet.png") in capsys.readouterr().out
    width, height = size(scratch / "sheet.png")
    assert (width, height) == (2 * (2 + 4 * 66), 4 * (2 * (2 + 66) + 18))
    with Image.open(scratch / "sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 500, "colorful, not blank"
    before = (scratch / "sheet.png").read_bytes()
    assert main(["demo", "--out", "sheet.png"]) == 0
    assert (scratch / "sheet.png").read_bytes() == before, "the same seed, and a demo may be sampled again"


@pytest.mark.parametrize("command", [["plot", "."], ["demo"], ["generate", "a cat"], ["reconstruct", "a.png"]])
def test_an_image_is_a_png(command: list[str], scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--out", "a.jpg"]) == 2
    assert "--out must end in .png, got 'a.jpg'" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


def test_other_precisions(model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bfloat16", "float32"):
        assert generate(model, "-n", "2", "--out", f"{name}.png", "--dtype", name) == 0
    assert generate(model, "-n", "2", "--out", "plain.png") == 0
    assert (scratch / "plain.png").read_bytes() == (scratch / "float32.png").read_bytes()
    with pytest.raises(SystemExit):
        generate(model, "--dtype", "bfloat")
    assert "bfloat16" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_rounded_weights(model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "-n", "2", "--out", "int8.png", "--quantize", "int8") == 0
    assert size(scratch / "int8.png") == (2 * (2 + 2 * 18), 2 * (2 + 1 * 18) + 18)
    with pytest.raises(SystemExit):
        generate(model, "--quantize", "int9")
    assert "int8" in capsys.readouterr().err
