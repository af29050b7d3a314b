"""Checksums, index and configurations of model folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import dalle_zoo
from dalle_zoo.convert.checkpoints import open_checkpoint
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.files import FileError, read_json, sha256_file, write_json
from dalle_zoo.model_folder import (
    ModelFolderError,
    config_from_dict,
    verify_checksums,
    write_checksums,
    write_index,
)
from dalle_zoo.weights import load_weights

# ------------------------------------------------------------ checksums


def test_checksums_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a.txt").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_checksums(tmp_path)
    assert json.loads((tmp_path / "sha256.json").read_text()) == {
        "b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "part/a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    verify_checksums(tmp_path)
    write_checksums(tmp_path)  # its own file is not one of them
    verify_checksums(tmp_path)


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dvae/model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    write_checksums(tmp_path)
    path.write_bytes(b"weightS")
    with pytest.raises(ModelFolderError, match=r"model.safetensors differs from its sha256"):
        verify_checksums(tmp_path)
    verify_checksums(tmp_path, "prior")
    path.unlink()
    with pytest.raises(ModelFolderError, match=r"model.safetensors is missing: copy or download"):
        verify_checksums(tmp_path)
    (tmp_path / "sha256.json").unlink()
    with pytest.raises(FileError, match=r"sha256.json is missing: expected a folder written by dalle-zoo"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "part/../../outside"])
def test_checksums_name_no_file_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    write_json(folder / "sha256.json", {name: sha256_file(tmp_path / "outside")})
    with pytest.raises(ModelFolderError, match="names a file outside the folder"):
        verify_checksums(folder)


# ------------------------------------------------------------ configurations and the index


def test_the_index_lists_the_components(tmp_path: Path) -> None:
    for name in ("prior", "dvae", "notes"):
        (tmp_path / name).mkdir()
    write_index(tmp_path)
    index = read_json(tmp_path / "model_index.json")
    assert [name for name in index if not name.startswith("_")] == ["dvae", "prior"]
    assert index["_dalle_zoo_version"] == dalle_zoo.__version__
    assert read_json(tmp_path / "config.json") == {"model_type": "dalle-zoo", "components": ["dvae", "prior"]}


@dataclass(frozen=True)
class Sizes:
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError("width must be at least 1")


def test_a_configuration_from_plain_data() -> None:
    assert config_from_dict(Sizes, {"width": 3}, "a.json") == Sizes(3)
    for values, message in (
        ({"widht": 3}, "a.json: unknown field 'widht'. Did you mean 'width'"),
        ({}, "a.json: .*missing"),
        ({"width": 0}, "a.json: width must be at least 1"),
    ):
        with pytest.raises(ModelFolderError, match=message):
            config_from_dict(Sizes, values, "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "pointer of Git LFS .* `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html>log in</html>", "is an HTML page, such as a login or an error page"),
        (b"<HTML><body>429", "is an HTML page, such as a login or an error page"),
    ],
)
def test_a_file_that_stands_for_another_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_checksums(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFolderError, match=message):
        verify_checksums(tmp_path)
    with pytest.raises(ModelFolderError, match=message):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError, match=message):
        open_checkpoint(tmp_path / "model.safetensors")
