"""Quantized weights: which matrices are rounded, and errors."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dalle_zoo.models.prior import Prior
from dalle_zoo.models.quantization import Bits, is_quantized, quantize
from dalle_zoo.sampling import decode_logits, sample_codes

Maker = Callable[..., Prior]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
TEXT = torch.tensor([[1, 2, 3, 4], [5, 11, 12, 13]])


def codes_of(prior: Prior) -> torch.Tensor:
    return torch.randint(prior.config.codebook_size, (2, 3, 3, 4), generator=torch.Generator().manual_seed(0))


@needs_torchao
@pytest.mark.parametrize(("bits", "least", "most"), [("int8", 1e-5, 0.02), ("int4", 0.005, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_matrices_of_layers_are_quantized(
    random_prior: Maker, bits: Bits, least: float, most: float, dtype: torch.dtype
) -> None:
    prior = random_prior(width=32, num_layers=2).to(dtype)
    exact = copy.deepcopy(prior)
    quantize(prior, bits)
    assert torch.get_float32_matmul_precision() == "highest", "no setting of the process changes"
    assert is_quantized(prior)
    assert not is_quantized(exact)
    retained = dict(exact.named_parameters())
    for name, parameter in prior.named_parameters():
        if name.startswith("layers") and parameter.ndim == 2:
            assert type(parameter.data) is not torch.Tensor, name
            error = (parameter.dequantize().float() - retained[name].float()).norm() / retained[name].float().norm()
            assert (least if dtype == torch.float32 else 0) < error < most, name
        else:
            assert torch.equal(parameter, retained[name]), name


@needs_torchao
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_cached_decoding_equals_the_full_forward_of_the_same_weights(random_prior: Maker, bits: Bits) -> None:
    prior = random_prior(width=32, num_layers=3, masks="paper")
    quantize(prior, bits)
    codes = codes_of(prior)
    came = torch.stack(list(decode_logits(prior, TEXT, codes)), 2)
    with torch.no_grad():
        expected = prior.image_logits(TEXT.repeat_interleave(3, 0), codes.flatten(0, 1)).view_as(came)
    torch.testing.assert_close(came, expected, atol=1e-4, rtol=1e-3)
    seeds = torch.arange(4).view(2, 2)
    assert sample_codes(prior, TEXT, seeds).shape == (2, 2, 3, 4)


@needs_torchao
def test_invalid_networks_raise_before_any_change(random_prior: Maker) -> None:
    prior = random_prior()
    with pytest.raises(
        ValueError, match=r"int4 needs rows of a multiple of 32 weights, layers\.0\.attention\.qkv has 16"
    ):
        quantize(prior, "int4")
    with pytest.raises(ValueError, match=r"int3"):
        quantize(prior, "int3")  # type: ignore[arg-type]
    assert not is_quantized(prior)


def test_the_error_without_torchao_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"int8 weights need torchao: pip install 'dalle-zoo\[quantize\]'"):
        quantize(nn.Sequential(nn.Linear(4, 4)), "int8")
