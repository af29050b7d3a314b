"""Models and their components, found by name or folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_zoo import load_model, zoo
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.networks import save_network
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import ByteTokenizer


@pytest.fixture
def dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, decoder_stem=4, codebook_size=6))


@pytest.fixture
def bundled(dvae: DVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with a dVAE that is bundled under the name of the default model."""
    models = tmp_path / "models"
    folder = models / "composition"
    (folder / "dvae").mkdir(parents=True)
    save_network(dvae, "dvae", folder / "dvae")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    record = {"description": "d", "license": "l", "data": "e", "parameters": {"dvae": 9}}
    (folder / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(zoo, "BUNDLED", models)
    return folder


def test_a_model_by_name_or_folder(bundled: Path, tmp_path: Path) -> None:
    assert zoo.find_model("composition") == bundled
    assert zoo.find_model(tmp_path) == tmp_path
    assert zoo.find_model(str(bundled)) == bundled
    assert zoo.model_names() == ["composition"]
    with pytest.raises(
        UnknownNameError, match=r"unknown model 'compositoin'. Did you mean 'composition'.* A local folder"
    ):
        zoo.find_model("compositoin")


def test_a_missing_folder_is_not_looked_up_on_the_hub(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object) -> Path:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(zoo.hub, "download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for location in ("runs/mine", "runs/x/model", "./mine", Path("runs/mine"), "/nowhere/mine"):
        with pytest.raises(FileNotFoundError, match=f"no folder {Path(location)}: check its name|no folder ./mine"):
            zoo.find_model(location)
        with pytest.raises(FileNotFoundError, match="no folder"):
            zoo.find_component(location, "dvae")
    assert zoo.is_remote("org/name")
    with pytest.raises(AssertionError, match="the Hub was asked"):
        zoo.find_model("org/name")


def test_a_bundled_name_comes_before_a_folder_here(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "composition/dvae").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert zoo.find_model("composition") == bundled
    assert zoo.find_component("composition", "dvae") == bundled / "dvae"
    for location in ("./composition", Path("composition")):
        assert zoo.find_model(location).resolve() == here / "composition"
        assert zoo.find_component(location, "dvae").resolve() == here / "composition/dvae"


def test_a_part_by_name_or_folder(bundled: Path) -> None:
    for location in ("composition", bundled, bundled / "dvae"):
        assert zoo.find_component(location, "dvae") == bundled / "dvae"
    for location in ("composition", bundled):
        with pytest.raises(UnknownNameError, match=r"unknown component 'prior'.* Known: dvae, tokenizer of"):
            zoo.find_component(location, "prior")
    with pytest.raises(UnknownNameError, match="unknown model 'compositoin'"):
        zoo.find_component("compositoin", "dvae")


def test_parts_are_loaded(bundled: Path, dvae: DVAE) -> None:
    assert torch.equal(load_model("composition", "dvae").encoder.input.weight, dvae.encoder.input.weight)
    assert isinstance(load_model(bundled, "tokenizer"), ByteTokenizer)
    with pytest.raises(UnknownNameError, match="Did you mean 'dvae'"):
        load_model("composition", "dvea")


def test_records(bundled: Path) -> None:
    (record,) = zoo.list_models()
    assert (record.name, record.folder, record.parameters) == ("composition", bundled, {"dvae": 9})
    assert record.num_bytes == sum(path.stat().st_size for path in bundled.rglob("*") if path.is_file())


def test_loading_a_model_does_not_load_the_compiler() -> None:
    """A second of every command: `torch.nn.init` on the meta device imports it."""
    code = (
        "import sys; from dalle_zoo import DallePipeline; DallePipeline.from_pretrained('composition'); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
