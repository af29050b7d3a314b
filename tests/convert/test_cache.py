"""Conversions on the first call: name of the cache folder, errors, concurrent processes."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle_zoo import DallePipeline, convert, load_model
from dalle_zoo.convert import WeightFileError, cached
from dalle_zoo.model_folder import ModelFolderError, verify_checksums
from dalle_zoo.zoo import find_model
from tools import fuzz_files

NETWORK = {
    "double_z": False, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALLE_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of a VQGAN."""
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(fuzz_files.vqgan_weights(), folder / "last.ckpt")
    return folder / "last.ckpt"


def describe(path: Path, resolution: int) -> None:
    values = NETWORK | {"resolution": resolution, "z_channels": 256}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"ddconfig": values}))  # which is YAML too


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "within", "reason"),
    [
        ("a letter", False, "not a file of torch, safetensors or Flax"),
        ("<!DOCTYPE html>", False, "It is an HTML page"),
        (POINTER, False, "git lfs pull"),
        (POINTER, True, "git lfs pull"),
    ],
)
def test_a_location_that_holds_no_weights_is_named(content: str, within: bool, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "in" / "last.ckpt"
    file.parent.mkdir()
    file.write_text(content)
    for load in (DallePipeline.from_pretrained, lambda place: load_model(place, "dvae")):
        with pytest.raises(WeightFileError, match=reason):
            load(file.parent if within else file)


@pytest.mark.parametrize("place", ["last.yaml", "../configs/project.yaml"])
def test_another_configuration_next_to_the_file_gives_another_conversion(place: str, weights: Path) -> None:
    first = cached([weights])
    assert cached([weights]) == first
    sizes = [load_model(first, "dvae").image_size]
    for resolution in (8, 16):
        describe(weights.parent / place, resolution)
        found = cached([weights])
        assert found is not None
        sizes.append(load_model(found, "dvae").image_size)
    assert sizes == [256, 8, 16]


def test_threads_that_need_one_conversion_share_it(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, both = convert.convert, [], threading.Barrier(2)

    def counted(source: convert.Source, out: Path) -> None:
        calls.append(out)
        real(source, out)

    def work(_: int) -> object:
        both.wait(20)
        return load_model(weights, "dvae").config

    monkeypatch.setattr(convert, "convert", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first == second
    assert len(calls) == 1


def test_without_locks_another_process_may_be_faster(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = convert.convert

    def slower(source: convert.Source, out: Path) -> None:
        real(source, out)  # by the other one
        real(source, out)

    monkeypatch.setattr(convert, "convert", slower)
    folder = cached([weights])
    assert folder is not None
    verify_checksums(folder)


@pytest.mark.parametrize("damaged", ["dvae/model.safetensors", "conversion.json", "sha256.json", "record.json"])
def test_a_damaged_conversion_is_made_again(damaged: str, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = cached([weights])
    assert folder is not None
    complete = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / damaged).write_bytes(complete[folder / damaged][:-3])
    assert "is damaged" not in caplog.text
    assert cached([weights]) == folder
    assert f"{folder} is damaged, and is converted again" in caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == complete
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_conversion_of_a_user_says_to_delete_it(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert.convert(convert.find(weights), folder)
    (folder / "dvae/model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=rf"delete {folder} and convert again"):
        verify_checksums(folder)


def test_an_unwritable_cache_raises(weights: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "converted").write_text("a file")
    with pytest.raises(OSError, match=r"Set DALLE_ZOO_CACHE to another folder, or .* `dalle-zoo convert LOCATION"):
        cached([weights])


@pytest.mark.parametrize("give", [find_model, DallePipeline.from_pretrained])
def test_unknown_weights_raise_with_the_known_families(give: object, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    torch.save({"net.weight": torch.ones(2, 3)}, folder / "a.pt")
    for location in (folder, folder / "a.pt"):
        with pytest.raises(WeightFileError, match=r"holds no known weights \(folders (.*\n)+  openai_dvae: "):
            give(location)  # type: ignore[operator]
    complete = (folder / "a.pt").read_bytes()
    (folder / "a.pt").write_bytes(complete[:-10])
    with pytest.raises(WeightFileError, match=r"Files found:\n  a.pt: .*truncated or damaged"):
        give(folder)  # type: ignore[operator]


def test_a_native_checkpoint_raises_with_the_command_for_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {"net.input.weight": torch.ones(2)}}, tmp_path / "checkpoints/00000002.ckpt")
    with pytest.raises(
        WeightFileError,
        match=r"This is a checkpoint of `dalle-zoo fit`: give the trained component instead, RUN/model/dvae",
    ):
        find_model(tmp_path)


def test_folders_without_weights_to_convert(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    assert cached([tmp_path]) is None
    save_file({"text_model.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # a ranker
    assert cached([tmp_path]) is None


def test_invalid_locations_and_patterns_raise(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no location is given"):
        cached([])
    with pytest.raises(ValueError, match="no location"):
        DallePipeline.from_pretrained([])
    with pytest.raises(ValueError, match=r"must be given as a list, such as \['\*.ckpt'\], got the text"):
        cached([weights], "*.ckpt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightFileError, match="pipe is neither a file nor a folder"):
        cached([tmp_path / "pipe"])
