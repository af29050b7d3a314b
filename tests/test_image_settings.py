"""An image carries what it was generated with, in a form that other tools read too."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from dalle_zoo.files import FileError
from dalle_zoo.image_settings import FORMAT, KEY, ImageSettings, read_settings

SETTINGS = ImageSettings(
    prompt='a "red" apple,\nりんご 🍎', seed=2**62 + 1, model="org/name", model_digest="0123456789abcdef",
    temperature=0.7, top_k=5, top_p=0.9, guidance_scale=2.0, negative_prompt="a pear", given=((1, -1), (-1, 3)),
    score=0.25,
)  # fmt: skip


def write(path: Path, settings: ImageSettings = SETTINGS) -> Path:
    Image.new("RGB", (4, 2)).save(path, pnginfo=settings.to_png(4, 2))
    return path


def test_settings_survive_the_file(tmp_path: Path) -> None:
    assert read_settings(write(tmp_path / "a.png")) == SETTINGS
    plain = ImageSettings(prompt="", seed=0, model="composition")
    assert read_settings(write(tmp_path / "b.png", plain)) == plain


def test_a_model_in_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    settings = ImageSettings(prompt="a", seed=0, model="models/caf\udce9")
    assert read_settings(write(tmp_path / "a.png", settings)) == settings


def test_images_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(FileError, match=r"text.png is not an image: expected a PNG file of dalle-zoo"):
        read_settings(tmp_path / "text.png")
    data = bytearray(write(tmp_path / "large.png").read_bytes())
    data[16:24] = (10**5).to_bytes(4, "big") * 2  # width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(FileError, match=r"large.png: Image size \(10000000000 pixels\) exceeds limit"):
        read_settings(tmp_path / "large.png")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:60])
    with pytest.raises(FileError, match=r"cut\.png is damaged \(Truncated File Read\): copy or download it again"):
        read_settings(tmp_path / "cut.png")


def test_other_tools_read_the_parameters(tmp_path: Path) -> None:
    with Image.open(write(tmp_path / "a.png")) as image:
        text = image.info["parameters"]
    assert text.startswith(
        'a "red" apple,\nりんご 🍎\nNegative prompt: a pear\nCFG scale: 2, Seed: 4611686018427387905, '
    )
    assert "Size: 4x2, Model hash: 0123456789, Model: name, Temperature: 0.7, Top k: 5, Top p: 0.9, Version: " in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no settings of dalle-zoo"),
        ("{", "a.png"),
        ("[]", "must contain a JSON object, got list"),
        ({"format": 2}, "settings have format 2, this version of dalle-zoo reads 1"),
        ({"sampler": 1}, "unknown names: sampler"),
        ({"seed": "1"}, "seed of its settings has an invalid value, '1'"),
        ({"seed": True}, "seed of its settings has an invalid value, True"),
        ({"given": [[1.5]]}, "given of its settings must be rows of integers"),
        ({"given": [[1, 2], [3]]}, "given of its settings must be rows of equal length, of codes or -1"),
        ({"given": [[2**63]]}, "given of its settings must be rows of equal length, of codes or -1"),
        ({"given": []}, "given of its settings must be rows of equal length, of codes or -1"),
        ({"seed": 2**63}, r"seed of its settings must be in 0\.\.2\^63 - 1, got 9223372036854775808"),
        ({"given": [1]}, "given of its settings must be rows of integers"),
        ({"dtype": "nn"}, "dtype of its settings has an invalid value, 'nn'"),
        ({"quantize": "int9"}, "quantize of its settings has an invalid value, 'int9'"),
        ({"prompt": None}, "prompt of its settings has an invalid value, None"),
        ("[" * 100_000, "a.png"),
        ('{"prompt": "' + "x" * 2**20 + '"}', "too large"),
    ],
    ids=range(18),
)
def test_other_settings_are_named(tmp_path: Path, change: Any, message: str) -> None:
    info = PngImagePlugin.PngInfo()
    valid = {"format": FORMAT, "prompt": "a", "seed": 1, "model": "m"}
    if change is not None:
        info.add_itxt(KEY, change if isinstance(change, str) else json.dumps(valid | change), zip=True)
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(FileError, match=message):
        read_settings(tmp_path / "a.png")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps({"format": FORMAT, "prompt": "a"}))
    Image.new("RGB", (4, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(FileError, match="lack seed, model"):
        read_settings(tmp_path / "a.png")
