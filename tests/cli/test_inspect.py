"""``dalle-zoo inspect | env``: output as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_zoo.cli.main import main
from dalle_zoo.files import sha256_file
from dalle_zoo.image_settings import ImageSettings
from dalle_zoo.images import save_png
from dalle_zoo.inspection import describe_environment, describe_model
from dalle_zoo.model_folder import CHECKSUMS
from dalle_zoo.version import __version__
from dalle_zoo.zoo import list_models

SETTINGS = ImageSettings(prompt="a りんご", seed=2**62, model="tiny", given=((1, -1), (2, 3)), score=-1.5)


def test_image_is_described(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_png(Image.new("RGB", (6, 4)), scratch / "a.png", SETTINGS)
    assert main(["inspect", "a.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["width"], found["height"], found["prompt"], found["seed"]) == (6, 4, "a りんご", 2**62)
    assert found["given"] == [[1, -1], [2, 3]]
    assert main(["inspect", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"prompt: a りんご", f"seed: {2**62}", "given: 3 of 4 codes were kept", "score: -1.5"} <= set(lines)
    assert not any("None" in line for line in lines)


def test_model_is_described(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == describe_model(model)
    assert list(found["components"]) == ["dvae", "prior", "tokenizer"]
    assert found["digest"] == sha256_file(model / CHECKSUMS)
    prior = found["components"]["prior"]
    assert prior["config"]["image_height"] == 4
    assert prior["sha256"]["model.safetensors"] == sha256_file(model / "prior/model.safetensors")
    assert prior["bytes"] == sum(path.stat().st_size for path in (model / "prior").iterdir())


def test_a_folder_without_a_model_is_refused(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "photos").mkdir()
    assert main(["inspect", "./photos"]) == 2
    assert "photos is not a model: expected a folder with some of dvae, prior" in capsys.readouterr().err


def test_bundled_model_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "composition"]) == 0
    said = capsys.readouterr().out
    (record,) = list_models()
    parameters = f"    parameters: {record.parameters['prior']:,}"
    for line in ("license: Apache-2.0", "  prior:", "    type: prior", parameters, "  ranker:"):
        assert line in said.splitlines()


def test_vocabulary_words_are_listed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in model.iterdir():
        (copy / entry.name).symlink_to(entry)
    (copy / "tokenizer").unlink()
    (copy / "tokenizer").mkdir()
    (copy / "tokenizer/words.json").write_text(json.dumps({f"w{k}": 1 for k in range(14)}))
    assert main(["inspect", str(copy)]) == 0
    assert "words: 14: w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, …" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("plain.png", "has no settings of dalle-zoo"),
        ("text.png", "text.png"),
        ("compositoin", "unknown model 'compositoin'"),
    ],
)
def test_unknown_files_raise(target: str, message: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (2, 2)).save(scratch / "plain.png")
    (scratch / "text.png").write_text("text")
    assert main(["inspect", target]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_environment_is_described(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found == describe_environment()
    version = torch.__version__.partition("+")[0]  # without the build
    assert (found["dalle_zoo"], found["packages"]["torch"].partition("+")[0]) == (__version__, version)
    assert found["cores"] >= 1
    assert len(found["devices"]) == torch.cuda.device_count()
    assert main(["env"]) == 0
    lines = capsys.readouterr().out
    assert f"  torch: {version}" in lines
    for private in ("hf_secret", str(Path.home())):
        assert private not in said + lines
    assert describe_environment(["no-such-package"])["packages"] == {"no-such-package": None}


def test_control_characters_do_not_reach_the_terminal(
    model: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ImageSettings(prompt="a\x1b[2Jb\x9bc", seed=0, model="m")
    Image.new("RGB", (4, 2)).save("a.png", pnginfo=settings.to_png(4, 2))
    assert main(["inspect", "a.png"]) == 0
    assert r"prompt: a\x1b[2Jb\x9bc" in capsys.readouterr().out
    shutil.copytree(model, "hostile")
    Path("hostile/record.json").write_text('{"parameters": [], "license": "\\u001b[2J"}')
    assert main(["inspect", "hostile"]) == 0
    assert "\x1b" not in capsys.readouterr().out
