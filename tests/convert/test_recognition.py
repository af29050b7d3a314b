"""Recognition by content: errors for unknown weights, for several families, and for unreadable files."""

from __future__ import annotations

import math
import re
import struct
import time
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_zoo.cli.main import main
from dalle_zoo.convert import FAMILIES, Conversion, Source, WeightFileError, convert, find, inspect_files, recognize
from dalle_zoo.convert.lazy import CONVERTED_SHARD_BYTES, write_network
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.weights import SHARD_BYTES
from tools import fuzz_files, fuzz_readers


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with an encoder in a file with an arbitrary name."""
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(fuzz_files.dvae_weights(), folder / "x")
    return folder


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_describes_how_it_is_recognized(name: str) -> None:
    family = FAMILIES[name](name)
    assert family.title
    assert "recognized by" in family.expects
    assert family.recognize(inspect_files(Path(__file__).parent)) is None


def test_the_documentation_lists_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs/generate/external.md").read_text()
    table = page.partition("## Families")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(FAMILIES)


def test_file_names_do_not_matter(encoder: Path) -> None:
    for name in ("x", "vqgan.ckpt", "decoder.pkl", "model.safetensors"):
        path = encoder / name
        if name != "x":
            (encoder / "x").rename(path)
        source = recognize(path)
        assert isinstance(source, Source)
        assert source.family == "openai_dvae"
        if name != "x":
            path.rename(encoder / "x")


def test_recognition_of_one_named_family(encoder: Path) -> None:
    assert recognize(encoder, "vqgan") is None
    assert recognize(encoder, "openai_dvae") is not None
    with pytest.raises(UnknownNameError, match=r"unknown family of weights 'vqgna'. Did you mean 'vqgan'"):
        recognize(encoder, "vqgna")


def test_two_families_in_one_folder_raise(encoder: Path) -> None:
    torch.save(fuzz_files.vqgan_weights(), encoder / "y")
    with pytest.raises(WeightFileError, match=r"holds weights of openai_dvae and vqgan: name the one .* --family"):
        recognize(encoder)
    assert find(encoder, "vqgan").family == "vqgan"


def test_the_error_for_unknown_weights_lists_the_files_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"net.weight": torch.ones(2, 3)}, tmp_path / "a.pt")
    (tmp_path / "b.bin").write_text("nothing of this kind")
    (tmp_path / "config.yaml").write_text("width: 8")
    (tmp_path / "broken.json").write_text("{")
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} holds no known weights (folders are searched one level deep). Known families:\n" in said
    assert all(f"\n  {name}: {family.expects}" in said for name, family in FAMILIES.items())
    assert "\n  a.pt: a file of torch with 1 tensors (net.weight [2, 3], ...)\n" in said
    assert "\n  config.yaml: a configuration with width\n" in said
    assert "b.bin cannot be opened: it is not a file of torch, safetensors or Flax" in said
    assert "broken.json is not valid JSON: " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.ckpt", lambda complete: complete[: len(complete) // 2]),
        (
            "external.safetensors",
            lambda _: struct.pack("<Q", 60) + b'{"a": {"dtype": "F8_E4M3", "shape": [1]}}'.ljust(60),
        ),
        ("older.pt", lambda _: fuzz_files.external_weights()["module.legacy"][:-50]),
        ("flax.msgpack", lambda _: fuzz_files.external_weights()["dalle_mini.msgpack"][:-50]),
        ("vocab.json", lambda _: b'{"<s>": 0, "<pa'),
        ("large.json", lambda _: b'{"<s>": 0,' + b" " * 2**20),
        ("bomb.yaml", lambda _: b"a: &a [1]\nb: *a"),
    ],
)
def test_unreadable_files_next_to_weights_raise(name: str, content: Any, encoder: Path, tmp_path: Path) -> None:
    (encoder / name).write_bytes(content((encoder / "x").read_bytes()))
    with pytest.raises(
        WeightFileError, match=rf"openai_dvae and files that cannot be read: .*{name}.* --files or files="
    ):
        recognize(encoder)
    assert main(["convert", str(encoder), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    source = recognize(encoder, only=["x"])
    assert source is not None
    assert source.unused_files == {}


def test_configurations_with_nested_aliases_take_no_time(tmp_path: Path) -> None:
    torch.save(fuzz_files.vqgan_weights(), tmp_path / "last.ckpt")
    levels = [f"l{i}: &l{i} {{{', '.join(f'k{j}: *l{i - 1}' for j in range(30))}}}" for i in range(1, 9)]
    (tmp_path / "last.yaml").write_text("\n".join(["l0: &l0 {a: 1}", *levels]))
    begin = time.monotonic()
    with pytest.raises(WeightFileError, match=r"last.yaml has aliases \(\*name\)"):
        recognize(tmp_path / "last.ckpt")
    assert time.monotonic() - begin < 5


def test_unused_weight_files_are_reported(encoder: Path, tmp_path: Path) -> None:
    torch.save({"module.net.weight": torch.ones(2, 3)}, encoder / "other.pt")
    (encoder / "notes.txt").write_text("no weights")
    record = convert(find(encoder), tmp_path / "out")
    assert record["unused_files"] == {"other.pt": "a file of torch with 1 tensors (module.net.weight [2, 3], ...)"}


@pytest.mark.parametrize("given", ["file", "two files"])
def test_errors_name_the_path_of_the_weights(given: str, encoder: Path, tmp_path: Path) -> None:
    state = fuzz_files.dvae_weights()
    state["blocks.output.conv.bias"][0] = math.nan
    torch.save(state, encoder / "x")
    (encoder / "config.json").write_text("{}")
    location = [encoder / "x", encoder / "config.json"][: 1 if given == "file" else 2]
    where = " and ".join(map(str, location))
    with pytest.raises(
        WeightFileError, match=rf"^{where} cannot be converted: .*output.bias has values that are not f"
    ):
        convert(find(location), tmp_path / "out")


def test_large_weights_are_split_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signature(write_network).parameters["shard_bytes"].default == CONVERTED_SHARD_BYTES <= SHARD_BYTES / 4


def test_every_record_has_the_same_fields(encoder: Path, tmp_path: Path) -> None:
    torch.save(fuzz_files.vqgan_weights(), tmp_path / "y")
    records = [convert(find(place), tmp_path / f"out{i}") for i, place in enumerate((encoder, tmp_path / "y"))]
    names = {"family", "unused_files", *(field.name for field in fields(Conversion))}
    assert [set(record) for record in records] == [names, names]
    assert [record["license"] for record in records] == ["other", "unknown"]
    assert records[1]["license_note"] == "that of the checkpoint"


def test_an_empty_location_raises(tmp_path: Path) -> None:
    assert recognize(tmp_path) is None
    with pytest.raises(WeightFileError, match=r"Files found:\n  none$"):
        find(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing does not exist: expected a file of weights"):
        find(tmp_path / "missing")


def test_an_existing_folder_is_replaced_only_with_overwrite(encoder: Path, tmp_path: Path) -> None:
    source, out = find(encoder), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError):
            convert(source, out, **options)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    first = convert(source, out)
    with pytest.raises(FileExistsError):
        convert(source, out)
    assert convert(source, out, overwrite=True) == first
    (out / "conversion.json").unlink()  # as a model that was saved, maybe after training, from a conversion
    with pytest.raises(FileExistsError, match=r"has no conversion.json"):
        convert(source, out, overwrite=True)
    assert (out / "dvae/model.safetensors").is_file()


def test_a_short_run_of_the_fuzzer(tmp_path: Path) -> None:
    said: list[Any] = []
    failures = fuzz_readers.run(0, range(2000), 8.0, tmp_path, said.append)
    assert not failures, "\n".join(said)
    assert " a second: " in said[-1]
    assert " 0 refused" not in said[-1]
