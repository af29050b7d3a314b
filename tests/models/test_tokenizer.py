"""The contract of every registered image tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_zoo.files import read_json, write_json
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.dvae import DVAE, DVAEConfig, DVAEEncoder, DVAEEncoderConfig
from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from dalle_zoo.networks import load_image_tokenizer, save_network
from dalle_zoo.registry import UnknownNameError

SECONDS = 20.0
"""Many times what all refusals of one tokenizer take."""


def dvae() -> ImageTokenizer:
    torch.manual_seed(0)
    return DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, decoder_stem=4, codebook_size=6))


def dvae_encoder() -> ImageTokenizer:
    torch.manual_seed(0)
    return DVAEEncoder(DVAEEncoderConfig(image_size=16, width=4, num_groups=3, codebook_size=6))


def vqgan() -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"width": 32, "multipliers": (1, 1), "blocks_per_level": 1, "latent_channels": 8, "code_channels": 4}
    return VQGAN(VQGANConfig(image_size=16, attention_sizes=(8,), codebook_size=6, **sizes))


def dalle_pytorch_vae() -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_blocks": 1, "width": 4, "code_channels": 5}
    return DallePytorchVAE(DallePytorchVAEConfig(image_size=16, codebook_size=6, **sizes))


MAKERS: dict[str, Callable[[], ImageTokenizer]] = {
    "dalle_pytorch_vae": dalle_pytorch_vae,
    "dvae": dvae,
    "dvae_encoder": dvae_encoder,
    "vqgan": vqgan,
}


@pytest.fixture(params=list(IMAGE_TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> ImageTokenizer:
    """Each registered kind; one whose default is too large for a test has a function in MAKERS."""
    if request.param in MAKERS:
        return MAKERS[request.param]().eval()
    kind = IMAGE_TOKENIZERS[request.param]
    return kind(kind.config_class()).eval()


def test_sizes_beyond_the_weights_are_refused_at_once(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    if not list(tokenizer.parameters()):
        pytest.skip("it has no weights that bound its sizes")
    save_network(tokenizer, IMAGE_TOKENIZERS.name_of(type(tokenizer)), tmp_path)
    values, start = read_json(tmp_path / "config.json"), time.monotonic()
    sizes = [field for field, value in values.items() if type(value) is int and field != "image_size"]
    for bomb in [{field: size} for field in sizes for size in (60_000, 10**15)]:
        write_json(tmp_path / "config.json", {**values, **bomb})
        with pytest.raises(ModelFolderError):
            load_image_tokenizer(tmp_path)
    assert time.monotonic() - start < SECONDS


@torch.no_grad()
def test_images_to_codes_and_back(tokenizer: ImageTokenizer) -> None:
    side, grid = tokenizer.image_size, tokenizer.grid_size
    assert side == grid * tokenizer.factor
    images = torch.rand(3, 3, side, side)
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, grid, grid)
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codebook_size
    if not tokenizer.decodes:
        with pytest.raises(ValueError, match="cannot decode codes to images: load one"):
            tokenizer.decode(codes)
        return
    back = tokenizer.decode(codes)
    assert back.shape == images.shape
    assert back.min() >= 0
    assert back.max() <= 1


@torch.no_grad()
def test_encoding_is_deterministic_in_training_mode(tokenizer: ImageTokenizer) -> None:
    tokenizer.train()
    images = torch.rand(3, 3, tokenizer.image_size, tokenizer.image_size)
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(images), codes)
    if tokenizer.decodes:
        assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes))


def test_the_configuration_is_plain_data(tokenizer: ImageTokenizer) -> None:
    assert isinstance(tokenizer.config, type(tokenizer).config_class)
    with pytest.raises(AttributeError):
        tokenizer.config.image_size = 8  # frozen


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.rand(3, 16, 16),
            r"images must be floats of shape \(B, C, H, W\) in \[0, 1\], got torch.float32 \(3, 1",
        ),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images must be floats .* got torch.uint8"),
        (torch.rand(1, 3, 16, 18), r"image sides must be multiples of 4, got \(16, 18\): resize or crop"),
        (torch.rand(1, 3, 18, 16), r"image sides must be multiples of 4"),
    ],
)
def test_images_are_checked(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dvae().encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            torch.zeros(2, 2, dtype=torch.long),
            r"codes must be integers of shape \(B, h, w\), got torch.int64 \(2, 2\)",
        ),
        (torch.zeros(1, 2, 2), "codes must be integers .* got torch.float32"),
        (torch.full((1, 2, 2), 6), r"codes must be in 0\.\.5, got 6\.\.6"),
        (torch.tensor([[[0, -1]]]), r"codes must be in 0\.\.5, got -1\.\.0"),
    ],
)
def test_codes_are_checked(codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dvae().decode(codes)


def test_an_empty_batch_gives_empty_results() -> None:
    assert dvae().decode(torch.zeros(0, 4, 4, dtype=torch.long)).shape == (0, 3, 16, 16)


def test_unknown_image_tokenizers_raise() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'dvae'"):
        IMAGE_TOKENIZERS["dvea"]
    with pytest.raises(TypeError, match="must derive from ImageTokenizer"):
        IMAGE_TOKENIZERS.register("wrong")(torch.nn.Linear)
