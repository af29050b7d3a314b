"""VQGANs: names and sizes of published models, outputs of the original, codes and configurations."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle_zoo.models.external.vqgan import VQGAN, NearestQuantizer, ResidualBlock, VQGANConfig, merge_bands

GOLDEN = runpy.run_path(str(Path(__file__).parents[2] / "golden/vqgan.py"))

TWIN = {"atol": 1e-4, "rtol": 1e-4}
"""Float32 rounding through some thirty layers, with other kernels for attention and normalization."""

F16 = VQGANConfig()
F8 = VQGANConfig(multipliers=(1, 1, 2, 4), attention_sizes=(32,), codebook_size=8192, quantizer="gumbel")
SMALL: dict[str, Any] = {
    "image_size": 16, "width": 32, "multipliers": (1, 2, 2), "blocks_per_level": 1, "attention_sizes": (8,),
    "code_channels": 16, "codebook_size": 48,
}  # fmt: skip
NEAREST = VQGANConfig(**SMALL, latent_channels=24)
GUMBEL = VQGANConfig(**SMALL, latent_channels=16, quantizer="gumbel")


def filled(config: VQGANConfig) -> VQGAN:
    """A network with the weights of the golden file."""
    net = VQGAN(config).eval()
    GOLDEN["fill"](net)
    return net


def meta(config: VQGANConfig) -> VQGAN:
    with torch.device("meta"):
        return VQGAN(config)


# ------------------------------------------------------------ equality with the original


@pytest.mark.parametrize(("kind", "config"), [("f16-16384", F16), ("gumbel-f8-8192", F8)])
def test_names_and_shapes_of_published_models(kind: str, config: VQGANConfig) -> None:
    layout = json.loads(GOLDEN["LAYOUTS"].read_text())[kind]
    assert {name: list(t.shape) for name, t in meta(config).state_dict().items()} == layout


@pytest.mark.parametrize(("config", "count"), [(F16, 76_073_859), (F8, 68_995_971)])
def test_parameters_of_published_models(config: VQGANConfig, count: int) -> None:
    assert sum(p.numel() for p in meta(config).parameters()) == count


@pytest.mark.parametrize(("kind", "config"), [("nearest", NEAREST), ("gumbel", GUMBEL)])
@torch.no_grad()
def test_equals_the_stored_outputs_of_the_original(kind: str, config: VQGANConfig) -> None:
    net, golden = filled(config), load_file(GOLDEN["FILES"][kind])
    torch.testing.assert_close(net.vectors(golden["images"]), golden["vectors"], **TWIN)
    assert torch.equal(net.encode(golden["images"]), golden["codes"])
    assert len(golden["codes"].unique()) > 8  # so that a mistake would show
    pixels = golden["pixels"]  # in [-1, 1], before they are clamped
    assert (pixels.abs() < 1).float().mean() > 0.5
    torch.testing.assert_close(net.decoder(net.post_quant_conv(net.quantize(golden["codes"]))), pixels, **TWIN)
    torch.testing.assert_close(net.decode(golden["codes"]), ((pixels + 1) / 2).clamp(0, 1), **TWIN)


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_stored_outputs_of_min_dalle() -> None:
    layout = json.loads(GOLDEN["LAYOUTS"].read_text())["min-dalle"]
    state = GOLDEN["weights"]({name: tuple(shape) for name, shape in layout.items()})
    state["quantize.embedding.weight"] = state.pop("embedding.weight")
    net = meta(VQGANConfig(decoder_only=True, signed_pixels=False))
    net.load_state_dict(state, assign=True)
    golden, stride = load_file(GOLDEN["FILES"]["detokenizer"]), GOLDEN["STRIDE"]
    torch.testing.assert_close(net.decode(golden["codes"])[..., ::stride, ::stride], golden["pixels"], **TWIN)
    assert ((golden["pixels"] > 0) & (golden["pixels"] < 1)).float().mean() > 0.2


def test_epsilon_of_the_normalization() -> None:
    x = 1e-3 * torch.randn(2, 64, 3, 3)
    groups = x.view(2, 32, -1)  # two channels each
    centered = groups - groups.mean(2, keepdim=True)
    expected = centered / (centered.square().mean(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ResidualBlock(64, 64).norm1(x), expected.view_as(x))


# ------------------------------------------------------------ quantizers


def test_the_nearest_entry_by_distance() -> None:
    torch.manual_seed(0)
    quantizer = NearestQuantizer(VQGANConfig(**SMALL | {"codebook_size": 50, "code_channels": 6}))
    nn.init.normal_(quantizer.embedding.weight)
    vectors = torch.randn(2, 6, 3, 5)
    cells = vectors.movedim(1, -1).reshape(-1, 6)
    expected = torch.cdist(cells, quantizer.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(quantizer.codes(vectors), expected.view(2, 3, 5))
    assert torch.equal(quantizer.codes(quantizer(expected.view(2, 3, 5))), expected.view(2, 3, 5))


@pytest.mark.parametrize("config", [NEAREST, GUMBEL])
@torch.no_grad()
def test_codes_under_autocast_equal_those_of_float32(config: VQGANConfig) -> None:
    net = filled(config)
    seen = []
    net.quantize.codes = lambda vectors: seen.append(torch.is_autocast_enabled("cpu")) or vectors[:, 0].long()
    with torch.autocast("cpu", torch.bfloat16):
        net.encode(torch.rand(1, 3, 16, 16))
    assert seen == [False]


@torch.no_grad()
def test_gumbel_codes_are_deterministic() -> None:
    net, images = filled(GUMBEL).train(), torch.rand(2, 3, 16, 16)
    assert torch.equal(net.encode(images), net.encode(images))


# ------------------------------------------------------------ sizes and options


@torch.no_grad()
def test_images_of_any_multiple_of_the_factor() -> None:
    net = filled(NEAREST)
    codes = net.encode(torch.rand(1, 3, 20, 12))
    assert codes.shape == (1, 5, 3)
    assert net.decode(codes).shape == (1, 3, 20, 12)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(18, 16\)"):
        net.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="must have 3 channels"):
        net.encode(torch.rand(1, 1, 16, 16))


def test_levels_with_attention_do_not_depend_on_the_image_size() -> None:
    assert NEAREST.attention == [False, True, False]
    assert F8.attention == [False, False, False, True]
    doubled = VQGANConfig(**SMALL | {"image_size": 32, "wavelet": True})
    assert (doubled.attention, doubled.factor) == ([False, True, False], 8)


@torch.no_grad()
def test_unsigned_pixels() -> None:
    signed, unsigned = filled(NEAREST), filled(VQGANConfig(**SMALL, latent_channels=24, signed_pixels=False))
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(unsigned.vectors(images), signed.vectors((images + 1) / 2))
    codes = torch.arange(16).view(1, 4, 4)
    inside = signed.decode(codes) > 0.5  # above 0 in [-1, 1]
    torch.testing.assert_close(unsigned.decode(codes)[inside], (2 * signed.decode(codes) - 1)[inside])
    assert (unsigned.decode(codes)[~inside] == 0).all()


def test_a_vqgan_without_an_encoder_raises_for_images() -> None:
    net = VQGAN(VQGANConfig(**SMALL, decoder_only=True))
    assert not [name for name in net.state_dict() if name.startswith(("encoder", "quant_conv"))]
    with pytest.raises(ValueError, match="only a decoder and cannot encode"):
        net.encode(torch.rand(1, 3, 16, 16))


def haar_bands(images: Tensor) -> Tensor:
    """The forward wavelet transform, as sums over 2 x 2 pixels."""
    a, b, c, d = images[..., ::2, ::2], images[..., ::2, 1::2], images[..., 1::2, ::2], images[..., 1::2, 1::2]
    high = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], dim=2) / 2
    return torch.cat([(a + b + c + d) / 2, high.flatten(1, 2)], dim=1)


def test_merging_bands_inverts_the_wavelet() -> None:
    images = torch.rand(2, 3, 8, 6)
    bands = haar_bands(images)
    torch.testing.assert_close(merge_bands(bands), images)
    assert math.isclose(float(bands.square().sum()), float(images.square().sum()), rel_tol=1e-5)  # it is orthogonal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48}, "a multiple of 32 channels .* got width 48"),
        ({"multipliers": ()}, "a multiple of 32 channels"),
        ({"image_size": 18}, "image_size 18 is not a multiple of the downsampling factor 4"),
        (
            {"attention_sizes": (5,)},
            r"attention_sizes must be among the level sizes \[16, 8, 4\], got \[5\]",
        ),
        ({"quantizer": "residual"}, "quantizer must be one of nearest, gumbel, got 'residual'"),
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2"),
        ({"blocks_per_level": 0}, "blocks_per_level must be an integer of at least 1"),
    ],
)
def test_configurations_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**SMALL | changes)


def test_a_configuration_round_trips_through_json() -> None:
    assert VQGANConfig(**json.loads(json.dumps(vars(NEAREST)))) == NEAREST
