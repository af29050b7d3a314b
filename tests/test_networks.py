"""Networks in folders: loading restores exactly what was saved, and rejects anything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dalle_zoo.files import FileError
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.networks import load_image_tokenizer, load_prior, save_network
from dalle_zoo.registry import UnknownNameError

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
    save_network(dvae, "dvae", folder)
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes entries of config.json; None takes one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_network_comes_back_bit_by_bit(dvae: DVAE, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    back = load_image_tokenizer(saved)
    assert back.config == dvae.config
    assert not back.training
    for name, tensor in dvae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(back.encode(images), dvae.encode(images))


def test_a_prior_comes_back_bit_by_bit(random_prior: Maker, tmp_path: Path) -> None:
    prior = random_prior(masks="row, conv(kernel=3)", text_loss_weight=0.25)
    save_network(prior, "prior", tmp_path)
    back = load_prior(tmp_path)
    assert back.config == prior.config
    text, codes = torch.tensor([[1, 2, 12, 13]]), torch.zeros(1, 3, 4, dtype=torch.long)
    assert torch.equal(back(text, codes).image, prior(text, codes).image)


def test_the_configuration_says_all(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values.pop("type") == "dvae"
    assert DVAEConfig(**values) == load_image_tokenizer(saved).config


def test_weights_can_be_stored_in_half_precision(dvae: DVAE, tmp_path: Path) -> None:
    save_network(dvae, "dvae", tmp_path, torch.float16)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    for name, tensor in load_image_tokenizer(tmp_path).state_dict().items():
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
        load_image_tokenizer(saved)


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\xff" * 64])
def test_damaged_weights_are_named(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"model.safetensors is not a readable safetensors file"):
        load_image_tokenizer(saved)


def test_weights_that_were_truncated_are_named(saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelFolderError, match="is not a readable safetensors file"):
        load_image_tokenizer(saved)


def test_a_pickle_is_not_read(saved: Path) -> None:
    torch.save({"encoder.input.weight": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ModelFolderError, match="is not a readable safetensors file"):
        load_image_tokenizer(saved)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model.safetensors is missing: expected weights as safetensors"):
        load_image_tokenizer(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileError, match=r"config.json is missing: expected a folder written by dalle-zoo"):
        load_image_tokenizer(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 8}, "config.json: unknown field 'widht'. Did you mean 'width'"),
        ({"width": 6}, "config.json: width must be a multiple of 4"),
        ({"width": "4"}, "config.json: width must be of the type int, got '4'"),
        ({"width": True}, "config.json: width must be of the type int, got True"),
        ({"pixel_eps": [0.1]}, "config.json: pixel_eps must be of the type float, got list"),
        ({"type": ["dvae"]}, "config.json: type must be the name of a network, got list"),
    ],
)
def test_a_bad_configuration_is_named(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(ModelFolderError, match=message):
        load_image_tokenizer(saved)


def test_a_network_of_another_kind_is_refused(saved: Path) -> None:
    with pytest.raises(ModelFolderError, match='is not a prior: expected "type": "prior"'):
        load_prior(saved)
    rewrite(saved, type="wavelets")
    with pytest.raises(UnknownNameError, match="unknown image tokenizer 'wavelets'"):
        load_image_tokenizer(saved)
