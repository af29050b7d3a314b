"""Folders of weights, and models found by name: what is written is read back, and nothing else is trusted."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dalle_zoo import hub, load_model, zoo
from dalle_zoo.hub import ModelFolderError
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import ByteTokenizer

Maker = Callable[..., Prior]

HALF = 2.0**-10
"""float16 has 11 significant bits, so a weight is off by half of this at most."""


@pytest.fixture
def dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, decoder_stem=4, codebook_size=6))


@pytest.fixture
def saved(dvae: DVAE, tmp_path: Path) -> Path:
    """Folder of a dVAE."""
    folder = tmp_path / "dvae"
    folder.mkdir()
    hub.save_network(dvae, "dvae", folder)
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes entries of config.json; None takes one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


# ------------------------------------------------------------ one network


def test_a_network_comes_back_bit_by_bit(dvae: DVAE, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    back = hub.load_image_tokenizer(saved)
    assert back.config == dvae.config
    assert not back.training
    for name, tensor in dvae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(back.encode(images), dvae.encode(images))


def test_a_prior_comes_back_bit_by_bit(random_prior: Maker, tmp_path: Path) -> None:
    prior = random_prior(masks="row, conv(kernel=3)", text_loss_weight=0.25)
    hub.save_network(prior, "prior", tmp_path)
    back = hub.load_prior(tmp_path)
    assert back.config == prior.config
    text, codes = torch.tensor([[1, 2, 12, 13]]), torch.zeros(1, 3, 4, dtype=torch.long)
    assert torch.equal(back(text, codes).image, prior(text, codes).image)


def test_the_configuration_says_all(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values.pop("type") == "dvae"
    assert DVAEConfig(**values) == hub.load_image_tokenizer(saved).config


def test_weights_can_be_stored_in_half_precision(dvae: DVAE, tmp_path: Path) -> None:
    hub.save_network(dvae, "dvae", tmp_path, torch.float16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    for name, tensor in hub.load_image_tokenizer(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, dvae.state_dict()[name], atol=1e-7, rtol=HALF)
    assert {tensor.dtype for tensor in dvae.state_dict().values()} == {torch.float32}, "the network is left alone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.input.weight"), "missing encoder.input.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda t: t.update({"encoder.input.bias": torch.zeros(5)}),
            r"encoder.input.bias has shape \(5,\), expected \(4,\)",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:9]], "and 4 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ModelFolderError, match=f"does not fit its config.json: .*{message}"):
        hub.load_image_tokenizer(saved)


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\xff" * 64])
def test_damaged_weights_are_named(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"model.safetensors is not a readable safetensors file"):
        hub.load_image_tokenizer(saved)


def test_weights_that_were_truncated_are_named(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelFolderError, match="is not a readable safetensors file"):
        hub.load_image_tokenizer(saved)


def test_a_pickle_is_not_read(saved: Path) -> None:
    torch.save({"encoder.input.weight": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ModelFolderError, match="is not a readable safetensors file"):
        hub.load_image_tokenizer(saved)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model.safetensors is missing: expected weights as safetensors"):
        hub.load_image_tokenizer(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"config.json is missing: expected a folder written by dalle-zoo"):
        hub.load_image_tokenizer(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 8}, "config.json: unknown field 'widht'. Did you mean 'width'"),
        ({"width": 6}, "config.json: width must be a multiple of 4"),
        ({"width": "4"}, "config.json: "),
    ],
)
def test_a_bad_configuration_is_named(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ModelFolderError, match=message):
        hub.load_image_tokenizer(saved)


def test_a_network_of_another_kind_is_refused(saved: Path) -> None:
    with pytest.raises(ModelFolderError, match='is not a prior: expected "type": "prior"'):
        hub.load_prior(saved)
    rewrite(saved, type="wavelets")
    with pytest.raises(UnknownNameError, match="unknown image tokenizer 'wavelets'"):
        hub.load_image_tokenizer(saved)


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[1]", "JSON object, got list")])
def test_json_that_is_none_is_named(saved: Path, content: str, message: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=f"config.json .*{message}"):
        hub.load_image_tokenizer(saved)


# ------------------------------------------------------------ checksums


def test_checksums_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a.txt").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    hub.write_checksums(tmp_path)
    assert json.loads((tmp_path / "sha256.json").read_text()) == {
        "b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "part/a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    hub.verify_checksums(tmp_path)
    hub.write_checksums(tmp_path)  # its own file is not one of them
    hub.verify_checksums(tmp_path)


def test_a_changed_or_missing_file_is_named(saved: Path) -> None:
    hub.write_checksums(saved)
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelFolderError, match=r"model.safetensors differs from its sha256"):
        hub.verify_checksums(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model.safetensors is missing: copy or download"):
        hub.verify_checksums(saved)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "part/../../outside"])
def test_checksums_name_no_file_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    hub.write_json(folder / "sha256.json", {name: hub.sha256_file(tmp_path / "outside")})
    with pytest.raises(ModelFolderError, match="names a file outside the folder"):
        hub.verify_checksums(folder)


# ------------------------------------------------------------ new folders


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep/model"
    with hub.new_folder(target) as new:
        (new / "file").write_text("x")
        assert not target.exists()
    assert names(tmp_path) == ["deep", "deep/model", "deep/model/file"]


def fill_half(folder: Path, overwrite: bool = False) -> None:
    with hub.new_folder(folder, overwrite=overwrite) as new:
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
        hub.new_folder(tmp_path),
    ):
        pytest.fail("the block began")
    assert names(tmp_path) == ["file"]
    with pytest.raises(NotADirectoryError, match="is a file"), hub.new_folder(tmp_path / "file", overwrite=True):
        pytest.fail("the block began")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with hub.new_folder(target) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["model", "model/file"]


def test_overwriting_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        fill_half(target, overwrite=True)
    assert names(tmp_path) == ["model", "model/config.json"]
    with hub.new_folder(target, overwrite=True) as new:
        (new / "new").write_text("new")
    assert names(tmp_path) == ["model", "model/new"]


def test_a_folder_that_another_process_makes_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    making = hub.new_folder(target)
    (making.__enter__() / "file").write_text("mine")
    target.mkdir()
    (target / "file").write_text("theirs")
    with pytest.raises(FileExistsError, match="made by somebody else meanwhile"):
        making.__exit__(None, None, None)
    assert names(tmp_path) == ["model", "model/file"]
    assert (target / "file").read_text() == "theirs"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from dalle_zoo import hub\n"
        f"with hub.new_folder(Path({str(tmp_path / 'model')!r})) as new: (new / 'file').write_text('x'); os._exit(0)"
    )
    for _ in range(2):  # of which the second removes what the first left
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert len(list(tmp_path.iterdir())) == 1
    running = tmp_path / f".model.{platform.node()}.{os.getppid()}.part"
    elsewhere = tmp_path / ".model.another-machine.7.part"
    for retained in (running, elsewhere):
        retained.mkdir()
    with hub.new_folder(tmp_path / "model"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "model", running, elsewhere])


@pytest.mark.parametrize("marker", ["config.json", "tokenizer_config.json"])
def test_only_a_folder_of_the_same_kind_is_replaced(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "model_index.json").write_text("of another kind")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(FileExistsError, match=rf"holds other files and is not replaced \(it has no {marker}\)"),
        hub.new_folder(Path(), overwrite=True, marker=marker),
    ):
        pytest.fail("the block began")
    assert names(tmp_path) == ["model_index.json", "thesis"]
    (tmp_path / marker).write_text("ours")
    with hub.new_folder(tmp_path, overwrite=True, marker=marker) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["file"]


def test_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, synced = tmp_path / "model", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(target.exists()))
    with hub.new_folder(target) as new:
        (new / "part").mkdir()
        (new / "part/file").write_text("x")
    assert synced == [False]


def test_the_current_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub.new_folder(Path()) as new:
        (new / "file").write_text("x")
    assert names(tmp_path) == ["here", "here/file"]


def test_json_appears_atomically(tmp_path: Path) -> None:
    hub.write_json(tmp_path / "a.json", {"name": "Ä"})
    with pytest.raises(TypeError):
        hub.write_json(tmp_path / "a.json", {"name": object()})
    assert hub.read_json(tmp_path / "a.json") == {"name": "Ä"}
    assert names(tmp_path) == ["a.json"]


# ------------------------------------------------------------ models by name


@pytest.fixture
def bundled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with a dVAE that is bundled under the name of emoji64."""
    models = saved.parents[0] / "models"
    folder = models / "emoji64"
    folder.mkdir(parents=True)
    saved.rename(folder / "dvae")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    record = {"description": "d", "license": "l", "data": "e", "parameters": {"dvae": 9}}
    (folder / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(zoo, "BUNDLED", models)
    return folder


def test_a_model_by_name_or_folder(bundled: Path, tmp_path: Path) -> None:
    assert zoo.find_model("emoji64") == bundled
    assert zoo.find_model(tmp_path) == tmp_path
    assert zoo.find_model(str(bundled)) == bundled
    assert zoo.model_names() == ["emoji64"]
    with pytest.raises(UnknownNameError, match=r"unknown model 'emoij64'. Did you mean 'emoji64'.* A folder works"):
        zoo.find_model("emoij64")


def test_a_bundled_name_comes_before_a_folder_here(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "emoji64/dvae").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert zoo.find_model("emoji64") == bundled
    assert zoo.find_component("emoji64", "dvae") == bundled / "dvae"
    for location in ("./emoji64", Path("emoji64")):
        assert zoo.find_model(location).resolve() == here / "emoji64"
        assert zoo.find_component(location, "dvae").resolve() == here / "emoji64/dvae"


def test_a_part_by_name_or_folder(bundled: Path) -> None:
    for location in ("emoji64", bundled, bundled / "dvae"):
        assert zoo.find_component(location, "dvae") == bundled / "dvae"
    for location in ("emoji64", bundled):
        with pytest.raises(UnknownNameError, match=r"unknown component 'prior'.* Known: dvae, tokenizer of"):
            zoo.find_component(location, "prior")
    with pytest.raises(UnknownNameError, match="unknown model 'emoji46'"):
        zoo.find_component("emoji46", "dvae")


def test_parts_are_loaded(bundled: Path, dvae: DVAE) -> None:
    assert torch.equal(load_model("emoji64", "dvae").encoder.input.weight, dvae.encoder.input.weight)
    assert isinstance(load_model(bundled, "tokenizer"), ByteTokenizer)
    with pytest.raises(UnknownNameError, match="Did you mean 'dvae'"):
        load_model("emoji64", "dvea")


def test_records(bundled: Path) -> None:
    (record,) = zoo.list_models()
    assert (record.name, record.folder, record.parameters) == ("emoji64", bundled, {"dvae": 9})
    assert record.num_bytes == sum(path.stat().st_size for path in bundled.rglob("*") if path.is_file())


def test_loading_a_model_does_not_load_the_compiler() -> None:
    """A second of every command: `torch.nn.init` on the meta device imports it."""
    code = (
        "import sys; from dalle_zoo import DallePipeline; DallePipeline.from_pretrained('emoji64'); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
