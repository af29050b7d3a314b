"""DALLE-pytorch's prior: position embeddings, token shift, padding, configuration. Parity is in tests/convert."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dalle_zoo.masks import TextImageLayout
from dalle_zoo.models.external.dalle_pytorch import DallePytorch
from dalle_zoo.models.external.dalle_pytorch_config import DallePytorchConfig
from dalle_zoo.models.external.dalle_pytorch_layers import (
    ShiftCache,
    cos_sin,
    rotary_size,
    rotary_table,
    rotate,
    shift_tokens,
)
from dalle_zoo.models.external.dalle_pytorch_sparse import attend_blocks, fixed_blocks, random_blocks
from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE, DallePytorchVAEConfig
from dalle_zoo.tokenizers import ByteTokenizer

GOLDEN = runpy.run_path(str(Path(__file__).parents[2] / "golden/dalle_pytorch.py"))
TINY: dict[str, Any] = {
    "text_length": 5, "text_vocab": 256, "image_height": 2, "image_width": 3, "codebook_size": 7, "width": 8,
    "num_heads": 2, "head_size": 8,
}  # fmt: skip


# ------------------------------------------------------------ positions


def test_rotary_table_equals_the_original() -> None:
    angles = load_file(GOLDEN["file_of"]("1.6.6"))["mixed.angles"][0]
    came = rotary_table(TextImageLayout(6, 8, 8), GOLDEN["SIZES"]["dim_head"])
    torch.testing.assert_close(came, cos_sin(angles), atol=1e-3, rtol=0)  # angles reach 8,192, so cosines lose digits


@pytest.mark.parametrize(("head_size", "size"), [(64, 60), (8, 6), (12, 12), (5, 0), (1, 0)])
def test_size_of_the_rotated_part(head_size: int, size: int) -> None:
    assert rotary_size(head_size) == size
    assert rotary_table(TextImageLayout(3, 2, 4), head_size).shape == (2, 11, size)


def test_a_rotation_keeps_norms_and_unrotated_dimensions() -> None:
    x = torch.randn(2, 11, 20)
    turned = rotate(x, rotary_table(TextImageLayout(3, 2, 4), 20))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 18:], x[..., 18:])
    assert not torch.allclose(turned[..., :18], x[..., :18])


# ------------------------------------------------------------ token shift


def slowly_shifted(x: Tensor, layout: TextImageLayout) -> Tensor:
    """The token shift, position by position and channel by channel."""
    out = x.clone()
    width = x.shape[-1]
    half, quarter = (width + 1) // 2, (width + 3) // 4
    for position in range(x.shape[1]):
        cell = position - layout.text
        if cell < 0:
            out[:, position, :half] = x[:, position - 1, :half] if position else 0
            continue
        out[:, position, :quarter] = x[:, position - layout.width, :quarter] if cell >= layout.width else 0
        out[:, position, quarter : 2 * quarter] = (
            x[:, position - 1, quarter : 2 * quarter] if cell % layout.width else 0
        )
    return out


@pytest.mark.parametrize("width", [4, 6, 7, 18])
@pytest.mark.parametrize("length", [3, 4, 9, 15])
def test_token_shift_equals_loops(width: int, length: int) -> None:
    layout = TextImageLayout(3, 3, 4)
    x = torch.randn(2, length, width)
    expected = slowly_shifted(x, layout)
    assert torch.equal(shift_tokens(x, layout), expected)
    cache = ShiftCache(layout)
    for cell in range(length - layout.text):
        one = x[:, None, layout.text + cell].expand(-1, 2, -1)
        assert torch.equal(cache.shift(cell, one)[:, 1], expected[:, layout.text + cell])


# ------------------------------------------------------------ block-sparse attention


def test_fixed_blocks_equal_those_of_deepspeed() -> None:
    """Compares with the layout of DeepSpeed's VariableSparsityConfig for 384 positions without random blocks."""
    layout = fixed_blocks(384)
    assert layout[:20].equal(torch.ones(24, 24).tril()[:20])  # 16 global blocks, and the window up to the diagonal
    assert [row.nonzero().flatten().tolist() for row in layout[20:, 16:]] == [[4], [4, 5], [4, 5, 6], [4, 5, 6, 7]]
    assert layout[20:, :16].all()
    assert (random_blocks(384), random_blocks(63)) == (6, 0)


def test_positions_attend_to_the_blocks_of_the_layout() -> None:
    query, key, value = torch.randn(3, 2, 1, 40, 4)
    layout = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 1]])
    out = attend_blocks(query, key, value, layout, None)
    for position, reads in (
        (0, [0]),
        (15, range(16)),
        (16, [16]),
        (30, range(16, 31)),
        (39, [*range(16), *range(32, 40)]),
    ):
        weights = (query[:, 0, position, None] * key[:, 0, [*reads]]).sum(-1).div(2).softmax(-1)
        torch.testing.assert_close(out[:, 0, position], (weights[..., None] * value[:, 0, [*reads]]).sum(1))


# ------------------------------------------------------------ captions


def test_captions_with_learned_padding() -> None:
    prior = DallePytorch(DallePytorchConfig(**TINY))
    ids = prior.encode_captions(ByteTokenizer(), ["ab", "a\0b", "", "abcdefg"])
    assert ids.tolist() == [
        [97, 98, 258, 259, 260],
        [97, 257, 98, 259, 260],  # a token of id 0 becomes the padding of its position, as in the original
        [256, 257, 258, 259, 260],
        [97, 98, 99, 100, 101],
    ]
    assert torch.equal(prior.null_text(), ids[2])
    filled = DallePytorch(DallePytorchConfig(**TINY, padding_id=1)).encode_captions(ByteTokenizer(), ["ab", "a\0b"])
    assert filled.tolist() == [[97, 98, 1, 1, 1], [97, 257, 98, 1, 1]]


def test_captions_with_masked_padding() -> None:
    prior = DallePytorch(DallePytorchConfig(**TINY, padding="masked", positions="axial"))
    ids = prior.encode_captions(ByteTokenizer(), ["ab", "", "abcdefg"])
    assert ids.tolist() == [[97, 98, 0, 0, 0], [0, 0, 0, 0, 0], [97, 98, 99, 100, 101]]
    assert torch.equal(prior.null_text(), ids[1])
    assert prior.config.text_ids == prior.config.text_vocab


@torch.no_grad()
def test_masked_padding_is_not_attended_to() -> None:
    prior = DallePytorch(DallePytorchConfig(**TINY, padding="masked", positions="axial", shift_tokens=False)).eval()
    text, codes = torch.tensor([[97, 98, 0, 0, 0]]), torch.randint(7, (1, 2, 3))
    before = prior.image_logits(text, codes)
    prior.text_position.weight[3:5] = torch.randn(2, 8)  # but the last padding predicts the first image token
    torch.testing.assert_close(prior.image_logits(text, codes), before)
    prior.text_position.weight[2] = torch.randn(8)
    assert not torch.allclose(prior.image_logits(text, codes), before, atol=1e-4)


# ------------------------------------------------------------ layers


def test_layers_with_the_same_index_share_weights() -> None:
    config = DallePytorchConfig(**TINY, num_layers=4, shared_attention=(0, 1, 0, 1), shared_mlp=(0, 0, 1, 1))
    names = DallePytorch(config).state_dict()
    assert {name.split(".")[1] for name in names if name.startswith("attentions.")} == {"0", "1"}
    assert {name.split(".")[1] for name in names if name.startswith("mlps.")} == {"0", "1"}
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2", "3"}


def test_size_of_the_published_small_model() -> None:
    """16 layers of 8 heads and width 512 over 128 text tokens, known as DALL-E small, have 119.1 million."""
    sizes = {"text_length": 128, "width": 512, "num_layers": 16, "num_heads": 8, "codebook_size": 1024}
    config = DallePytorchConfig(**sizes, image_height=16, image_width=16, positions="axial", shift_tokens=False)
    with torch.device("meta"):
        prior = DallePytorch(config)
    assert round(sum(parameter.numel() for parameter in prior.parameters()) / 1e6, 1) == 119.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"positions": "sinus"}, "positions must be one of rotary, axial, got 'sinus'"),
        ({"padding": "none"}, "padding must be one of learned, masked, got 'none'"),
        ({"norm": "scale"}, "norm must be one of layer, rms, got 'scale'"),
        ({"shared_mlp": (0, 2)}, r"shared_mlp must have 2 indices, one per layer, .* got \(0, 2\)"),
        ({"shared_attention": (0,)}, "shared_attention must have 2 indices"),
        ({"padding_id": 256}, r"padding_id must be in 0..255, got 256"),
        ({"width": 1}, "shift_tokens needs a width of at least 2, got 1"),
        ({"sparse_layers": (0,)}, "block-sparse attention needs an input length .* that is a multiple of 16, got 11"),
        (
            {"sparse_layers": (0,), "masks": "column"},
            r"sparse_layers must be indices of layers whose mask is full, got",
        ),
        ({"gmlp_layers": (2,)}, r"gmlp_layers must be indices of layers whose mask is full, got \(2,\)"),
        ({"gmlp_layers": (0,), "sparse_layers": (0,)}, "sparse_layers and gmlp_layers must not overlap"),
        ({"gmlp_layers": (0,), "shared_attention": (0, 0)}, "gmlp_layers cannot be combined with shared_attention"),
        ({"masks": "axial_row"}, "unknown schedule or mask 'axial_row'"),
    ],
)
def test_invalid_configurations_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DallePytorchConfig(**TINY | changes)


# ------------------------------------------------------------ image tokenizer


@torch.no_grad()
def test_image_tokenizer_takes_images_that_are_not_square() -> None:
    vae = DallePytorchVAE(DallePytorchVAEConfig(image_size=16, num_layers=2, num_blocks=1, width=8, code_channels=4))
    codes = vae.encode(torch.rand(2, 3, 8, 12))
    assert codes.shape == (2, 2, 3)
    pixels = vae.decode(codes)
    assert pixels.shape == (2, 3, 8, 12)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    with pytest.raises(ValueError, match=r"images must have 3 channels, got shape \(1, 4, 8, 8\)"):
        vae.encode(torch.rand(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"num_blocks": -1}, "num_blocks must be an integer of at least 0, got -1"),
        ({"codebook_size": 1}, "codebook_size must be an integer of at least 2, got 1"),
        ({"image_size": 20}, "image_size 20 is not a multiple of the downsampling factor 8"),
    ],
)
def test_invalid_image_tokenizers_raise(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DallePytorchVAEConfig(**changes)
