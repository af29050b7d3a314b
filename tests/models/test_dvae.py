"""The dVAE: sizes of the paper, the released twin, the relaxation, codes and configurations."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.dvae_networks import Block
from dalle_zoo.models.layers import gumbel_noise

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/openai_dvae.py"))

TWIN = {"atol": 2e-5, "rtol": 1e-5}
"""Float32 rounding: other convolution kernels sum up to 4,608 products in another order."""
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
"""Float32 rounding between two ways to compute the same values."""

TWIN_CONFIG = DVAEConfig(width=64, decoder_stem=8, codebook_size=512)
SMALL = DVAEConfig(image_size=32, width=8, num_groups=3, blocks_per_group=1, decoder_stem=8, codebook_size=12)


@pytest.fixture(scope="module")
def twin() -> DVAE:
    dvae = DVAE(TWIN_CONFIG).eval()
    GOLDEN["fill_native"](dvae.encoder, "encoder")
    GOLDEN["fill_native"](dvae.decoder, "decoder")
    return dvae


@pytest.fixture
def small() -> DVAE:
    torch.manual_seed(0)
    return DVAE(SMALL)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# ------------------------------------------------------------ the paper's network


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig())
    assert count(dvae.encoder) == 53_786_240
    assert count(dvae.decoder) == 43_829_766
    assert (dvae.codebook_size, dvae.factor, dvae.grid_size) == (8192, 8, 32)
    blocks = [module for module in dvae.modules() if isinstance(module, Block)]
    assert {block.gain for block in blocks} == {1 / 64}
    assert len(blocks) == 16


@torch.no_grad()
def test_equals_the_stored_outputs_of_the_released_code(twin: DVAE) -> None:
    golden = load_file(GOLDEN["FILE"])
    torch.testing.assert_close(twin.logits(golden["images"]), golden["logits"], **TWIN)
    assert torch.equal(twin.encode(golden["images"]), golden["codes"])
    torch.testing.assert_close(twin.decoder.from_codes(golden["codes"]), golden["hard"], **TWIN)
    torch.testing.assert_close(twin.decoder(golden["cells"]), golden["soft"], **TWIN)
    torch.testing.assert_close(twin.decode(golden["codes"]), golden["pixels"], **TWIN)


@torch.no_grad()
def test_equals_the_released_code(twin: DVAE) -> None:
    dall_e = pytest.importorskip("dall_e", reason="PyPI's DALL-E 0.1 is missing: see tests/requirements-parity.txt")
    encoder = dall_e.Encoder(**GOLDEN["SIZES"]["encoder"])
    decoder = dall_e.Decoder(**GOLDEN["SIZES"]["decoder"])
    GOLDEN["fill"](encoder, "encoder")
    GOLDEN["fill"](decoder, "decoder")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 24, 40, generator=generator)
    torch.testing.assert_close(twin.map_pixels(images), dall_e.map_pixels(images), **ROUNDING)
    logits = encoder(dall_e.map_pixels(images))
    torch.testing.assert_close(twin.logits(images), logits, **TWIN)
    assert torch.equal(twin.encode(images), logits.argmax(1))
    torch.testing.assert_close(twin.decoder(logits.softmax(1)), decoder(logits.softmax(1)), **TWIN)


def test_fresh_weights_have_the_released_statistics() -> None:
    torch.manual_seed(0)
    seen = 0
    for module in DVAE(TWIN_CONFIG).modules():
        if not isinstance(module, nn.Conv2d):
            continue
        assert module.bias is not None
        assert not module.bias.any()
        scaled = module.weight.detach() * math.sqrt(module.weight[0].numel())
        if scaled.numel() < 10_000:
            continue
        seen += 1
        few = 6 / math.sqrt(scaled.numel())  # six standard errors of a mean
        assert abs(scaled.mean()) < few
        assert abs(scaled.square().mean() - 1) < math.sqrt(2) * few
        assert abs(scaled.pow(4).mean() - 3) < math.sqrt(96) * few, "normal, not uniform"
    assert seen > 30


def test_the_layers_around_the_relaxation_are_float32_under_autocast(small: DVAE) -> None:
    came: dict[str, list[torch.dtype]] = {}

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            came[name] = [inputs[0].dtype, output.dtype]

        module.register_forward_hook(hook)

    note("encoder output", small.encoder.output)
    note("decoder input", small.decoder.input)
    note("other", small.encoder.input)
    with torch.autocast("cpu", torch.bfloat16):
        parameters, logits = small(torch.rand(1, 3, 32, 32), 1.0)
    assert came["encoder output"] == came["decoder input"] == [torch.float32, torch.float32]
    assert came["other"][1] == torch.bfloat16
    assert parameters.dtype == logits.dtype == torch.float32


# ------------------------------------------------------------ any size


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("cells", [(1, 1), (2, 5), (4, 3)])
def test_any_factor_and_any_size(groups: int, cells: tuple[int, int]) -> None:
    factor = 2 ** (groups - 1)
    config = DVAEConfig(image_size=8 * factor, width=4, num_groups=groups, decoder_stem=4, codebook_size=6)
    dvae = DVAE(config)
    assert (dvae.factor, config.grid_size, dvae.grid_size, dvae.image_size) == (factor, 8, 8, 8 * factor)
    images = torch.rand(2, 3, cells[0] * factor, cells[1] * factor)
    codes = dvae.encode(images)
    assert codes.shape == (2, *cells)
    assert codes.dtype == torch.int64
    parameters, logits = dvae(images, 1.0)
    assert logits.shape == (2, 6, *cells)
    assert parameters.shape == (2, 6, *images.shape[2:])
    assert dvae.decode(codes).shape == images.shape


def test_number_of_image_channels() -> None:
    dvae = DVAE(DVAEConfig(image_size=8, channels=1, width=4, num_groups=2, decoder_stem=4, codebook_size=6))
    assert dvae.decode(dvae.encode(torch.rand(1, 1, 8, 8))).shape == (1, 1, 8, 8)


@torch.no_grad()
def test_fully_convolutional() -> None:
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=6))
    image = torch.rand(1, 3, 64, 64)
    complete = dvae.logits(image)
    moved = dvae.logits(image.roll((2, 4), dims=(2, 3)))  # by one cell and two
    inside = slice(8, 24)  # 6 cells from the border see it
    torch.testing.assert_close(moved.roll((-1, -2), dims=(2, 3))[..., inside, inside], complete[..., inside, inside])
    part = dvae.logits(image[..., 8:56, 8:56])
    torch.testing.assert_close(part[..., 8:16, 8:16], complete[..., 12:20, 12:20])


# ------------------------------------------------------------ the relaxation


def test_the_relaxation_is_soft(small: DVAE) -> None:
    logits = torch.randn(2, 12, 4, 4, requires_grad=True)
    soft = small.relax(logits, 1.0, torch.Generator().manual_seed(0))
    assert soft.shape == logits.shape
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 4, 4))
    assert (soft > 0).all(), "not one-hot"
    assert soft.max() < 1
    weights = torch.randn(2, 12, 4, 4)
    (soft * weights).sum().backward()
    assert logits.grad is not None
    # The gradient of a softmax at temperature 1, of the very values that go forward: nothing straight-through.
    inner = (soft * weights).sum(1, keepdim=True)
    torch.testing.assert_close(logits.grad, (soft * (weights - inner)).detach())


def test_a_low_temperature_sharpens_the_relaxation(small: DVAE) -> None:
    small.eval()  # validation relaxes as training does
    logits = torch.randn(1, 12, 8, 8)
    warm, cold = (small.relax(logits, t, torch.Generator().manual_seed(0)) for t in (1.0, 1 / 16))
    noisy = logits + gumbel_noise(logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(cold, F.softmax(noisy * 16, dim=1))
    assert cold.max(1).values.mean() > warm.max(1).values.mean() + 0.2
    assert torch.equal(cold.argmax(1), noisy.argmax(1))


def test_the_decoder_receives_the_soft_cells(small: DVAE) -> None:
    received: list[Tensor] = []
    small.decoder.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    images = torch.rand(2, 3, 16, 32)
    parameters, logits = small(images, 0.7, torch.Generator().manual_seed(3))
    expected = small.relax(logits, 0.7, torch.Generator().manual_seed(3))
    assert torch.equal(received[0], expected)
    torch.testing.assert_close(small.decoder(expected), parameters)
    parameters.square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, f"{name} gets no gradient"


def test_the_noise_comes_from_the_generator(small: DVAE) -> None:
    logits = torch.zeros(1, 12, 4, 4)
    one, same, other = (small.relax(logits, 1.0, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    state = torch.random.get_rng_state()
    small.relax(logits, 1.0, torch.Generator())
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not touched"


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.empty(400_000, dtype=torch.bfloat16), torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.57722) < 0.01  # Euler's constant; five standard errors
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_of_zero_raises(small: DVAE, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        small.relax(torch.zeros(1, 12, 4, 4), temperature)


# ------------------------------------------------------------ codes and pixels


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_codes_are_the_argmax_of_the_logits(small: DVAE, training: bool) -> None:
    small.train(training)
    images = torch.rand(5, 3, 32, 32)
    codes = small.encode(images)
    assert torch.equal(codes, small.encode(images)), "no noise"
    assert torch.equal(codes, small.logits(images).argmax(1))
    assert len(codes.unique()) > 1
    assert torch.equal(small.encode(images[3:4])[0], codes[3]), "whatever the batch"


@torch.no_grad()
def test_hard_codes_decode_like_one_hot_cells(small: DVAE) -> None:
    small.decoder.input.bias.copy_(torch.randn(8))  # zero in a fresh network, and then it could be forgotten
    codes = torch.randint(12, (2, 3, 5))
    one_hot = F.one_hot(codes, 12).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(small.decoder.from_codes(codes), small.decoder(one_hot), **ROUNDING)


@torch.no_grad()
def test_pixels_are_the_unmapped_location(small: DVAE) -> None:
    pixels = torch.linspace(0, 1, 11)
    torch.testing.assert_close(small.map_pixels(pixels), torch.linspace(0.1, 0.9, 11))
    torch.testing.assert_close(small.unmap_pixels(small.map_pixels(pixels)), pixels, **ROUNDING)
    assert small.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1], "clamped"
    location = torch.logit(small.map_pixels(pixels)).view(1, 1, 1, 11).expand(1, 3, 1, 11)
    parameters = torch.cat([location, torch.full_like(location, 5.0)], 1)
    torch.testing.assert_close(small.pixels(parameters), pixels.expand(1, 3, 1, 11), **ROUNDING)
    images = small.decode(torch.randint(12, (2, 8, 8)))
    assert images.min() >= 0
    assert images.max() <= 1


# ------------------------------------------------------------ bad configurations


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 100}, "image_size 100 is not a multiple of the downsampling factor 8"),
        ({"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        ({"channels": 0}, "channels must be an integer of at least 1"),
        ({"num_groups": 0}, "num_groups must be an integer of at least 1"),
        ({"blocks_per_group": 0}, "blocks_per_group must be an integer of at least 1"),
        ({"decoder_stem": 0}, "decoder_stem must be an integer of at least 1"),
        ({"width": 6}, "width must be a multiple of 4"),
        ({"width": 0}, "width must be an integer of at least 1"),
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2"),
        ({"pixel_eps": 0.5}, "pixel_eps must be between 0 and 0.5"),
        ({"pixel_eps": 0.0}, "pixel_eps must be between 0 and 0.5"),
    ],
)
def test_invalid_configurations_raise(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DVAEConfig(**wrong)


def test_the_number_of_channels_is_checked(small: DVAE) -> None:
    with pytest.raises(ValueError, match=r"images must have 3 channels, got shape \(1, 1, 32, 32\)"):
        small.encode(torch.rand(1, 1, 32, 32))
