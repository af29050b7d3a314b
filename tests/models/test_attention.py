"""Attention under every registered mask: causal by gradient, and all back-ends agree."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dalle_zoo.masks import MASKS, Mask, TextImageLayout, text_then_image
from dalle_zoo.models import attention
from dalle_zoo.models.attention import BACKENDS, Attention, choice, fused
from dalle_zoo.models.attention.agreement import disagreement
from dalle_zoo.registry import UnknownNameError

AGREEMENT = {"atol": 1e-5, "rtol": 1e-4}
"""Float32 rounding: back-ends sum up to 31 products in another order."""

LAYOUTS = [TextImageLayout(3, 3, 4), TextImageLayout(2, 5, 2), TextImageLayout(1, 1, 5), TextImageLayout(4, 3, 9)]
every_mask = pytest.mark.parametrize("spec", [*MASKS, "conv(kernel=3)"])
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda it: f"{it.text}+{it.height}x{it.width}")
CPU = torch.device("cpu")
# FlexAttention has no backward pass on the CPU; see tests/models/test_attention_flex.py.
every_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flex"])


@every_backend
def test_an_empty_batch(backend: str) -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    assert layer(mask, backend)(torch.zeros(0, 15, 8)).shape == (0, 15, 8)


def layer(mask: Mask, backend: str) -> Attention:
    torch.manual_seed(0)
    return Attention(8, 2, mask, backend)


def stream(batch: int, length: int, width: int = 8) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1), requires_grad=True)


@every_backend
@every_mask
@every_layout
def test_the_gradient_flows_where_the_mask_allows_and_nowhere_else(
    spec: str, layout: TextImageLayout, backend: str
) -> None:
    mask = Mask.from_spec(spec, layout)
    x = stream(1, layout.length)
    y = layer(mask, backend)(x)
    reached = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    direction = torch.randn(8, generator=torch.Generator().manual_seed(2))
    for query in range(layout.length):
        (gradient,) = torch.autograd.grad(y[0, query] @ direction, x, retain_graph=True)
        reached[query] = gradient[0].abs().sum(-1) > 0  # a forbidden weight is exactly 0
    assert torch.equal(reached, mask.dense())
    text = layout.text
    assert reached[text:, :text].all(), "every image token sees all text"
    assert not reached.triu(1).any(), "causal"


@every_backend
@every_mask
@every_layout
@pytest.mark.parametrize("batch", [1, 3])
def test_back_ends_equal_the_dense_reference(spec: str, layout: TextImageLayout, backend: str, batch: int) -> None:
    mask = Mask.from_spec(spec, layout)
    weights = torch.randn(batch, layout.length, 8)
    came: dict[str, list[Tensor]] = {}
    for name in {"dense", backend}:
        net, x = layer(mask, name), stream(batch, layout.length)
        y = net(x)
        (y * weights).sum().backward()
        gradients = [parameter.grad for parameter in (x, *net.parameters())]
        came[name] = [y, *(gradient for gradient in gradients if gradient is not None)]
        assert len(came[name]) == 6
    for native, oracle in zip(came[backend], came["dense"], strict=True):
        torch.testing.assert_close(native, oracle, **AGREEMENT)


@every_backend
@every_mask
@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_prefix_of_the_inputs_gives_a_prefix_of_the_outputs(spec: str, backend: str, length: int) -> None:
    layout = LAYOUTS[0]
    net, x = layer(Mask.from_spec(spec, layout), backend), stream(2, layout.length)
    torch.testing.assert_close(net(x[:, :length]), net(x)[:, :length], **AGREEMENT)


def test_the_dense_reference_equals_loops() -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    query, key, value = torch.randn(3, 1, 2, mask.layout.length, 4, generator=torch.Generator().manual_seed(0))
    came, allowed = attention.dense(query, key, value, mask), mask.dense()
    for head in range(2):
        for i in range(mask.layout.length):
            keys = [j for j in range(mask.layout.length) if allowed[i, j]]
            weights = [math.exp(float(query[0, head, i] @ key[0, head, j]) / 2) for j in keys]  # 2 = sqrt(4)
            mixed = sum(w * value[0, head, j] for w, j in zip(weights, keys, strict=True)) / sum(weights)
            torch.testing.assert_close(came[0, head, i], mixed, **AGREEMENT)


@every_backend
def test_bfloat16_stays_near_float32(backend: str) -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    query, key, value = torch.randn(3, 2, 2, mask.layout.length, 4, generator=torch.Generator().manual_seed(0))
    half = BACKENDS[backend](query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 significant bits: inputs and weights are off by up to 2^-8 each.
    torch.testing.assert_close(half.float(), BACKENDS[backend](query, key, value, mask), atol=0.05, rtol=0.05)


@every_backend
def test_training_works_after_a_first_call_in_inference_mode(backend: str) -> None:
    mask = Mask.from_spec("conv(kernel=3)", TextImageLayout(2, 3, 7))  # used only in this test
    net = layer(mask, backend)
    with torch.inference_mode():
        net(torch.randn(1, mask.layout.length, 8))
    net(stream(1, mask.layout.length)).sum().backward()


@every_backend
def test_masks_of_the_same_name_do_not_share_cached_tensors(backend: str) -> None:
    layout = TextImageLayout(2, 3, 5)
    mods = [text_then_image(layout, rule) for rule in (lambda q, k: k <= q, lambda q, k: q - k < 2)]
    x = stream(1, layout.length)
    for mask in [Mask("mine", layout, mod) for mod in mods]:
        torch.testing.assert_close(layer(mask, backend)(x), with_the_matrix(mask, x), **AGREEMENT)


def with_the_matrix(mask: Mask, x: Tensor) -> Tensor:
    """Attention with a newly computed matrix of the mask."""
    net = layer(mask, "dense")
    mixed = scaled_dot_product_attention(*net.project(x), attn_mask=mask.dense())
    return net.merge(mixed)


PAPER = TextImageLayout(256, 32, 32)
WIDE = TextImageLayout(24, 6, 20)


@pytest.mark.parametrize(
    ("spec", "layout"), [("row", PAPER), ("column", WIDE), ("conv", WIDE), ("conv_torus", WIDE)], ids=str
)
def test_long_streams_in_lines_equal_the_dense_reference(spec: str, layout: TextImageLayout) -> None:
    mask = Mask.from_spec(spec, layout)
    *inputs, weights = torch.randn(4, 2, 2, layout.length, 16, generator=torch.Generator().manual_seed(0))
    came = []
    for backend in (attention.lines, attention.dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = backend(*leaves, mask)
        came.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    for native, oracle in zip(*came, strict=True):
        torch.testing.assert_close(native, oracle, atol=1e-5, rtol=1e-5)


def test_lines_follow_a_mask_whose_text_is_not_causal() -> None:
    layout = TextImageLayout(4, 2, 3)
    mask = Mask("mine", layout, lambda q, k: (k <= q) & ((q >= 4) | (k == q)))  # a text token attends only to itself
    x = stream(2, layout.length)
    torch.testing.assert_close(layer(mask, "lines")(x), with_the_matrix(mask, x), **AGREEMENT)


def test_gradients_in_lines_equal_finite_differences() -> None:
    mask = Mask.from_spec("row", TextImageLayout(2, 2, 3))
    inputs = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = tuple(x.requires_grad_() for x in inputs.unbind(0))
    assert torch.autograd.gradcheck(lambda q, k, v: attention.lines(q, k, v, mask), leaves)


@pytest.mark.parametrize(
    ("spec", "layout", "expected"),
    [
        ("row", PAPER, attention.lines),
        ("column", PAPER, attention.lines),
        ("conv", PAPER, attention.lines),
        ("row_same", PAPER, attention.lines),
        ("row", TextImageLayout(64, 20, 20), attention.lines),
        ("row", TextImageLayout(64, 16, 16), attention.sdpa),  # cheap, but too short on a CPU
        ("full", PAPER, attention.sdpa),
        ("conv", TextImageLayout(192, 16, 16), attention.sdpa),
        ("row", TextImageLayout(32, 8, 8), attention.sdpa),
    ],
    ids=lambda it: getattr(it, "__name__", str(it)),
)
def test_auto_chooses_lines_if_they_are_cheap(
    spec: str, layout: TextImageLayout, expected: attention.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.empty(1, 1, layout.length, 8)
    assert choice.choose(Mask.from_spec(spec, layout), query) is expected
    monkeypatch.setattr(fused, "supported", lambda *_: False)
    assert choice.choose(Mask.from_spec(spec, layout), query) is attention.sdpa


@pytest.mark.parametrize(
    ("side", "dtype", "expected"),
    [
        (8, torch.bfloat16, attention.dense),
        (8, torch.float32, attention.sdpa),
        (16, torch.bfloat16, attention.sdpa),
        (24, torch.bfloat16, attention.lines),
    ],
)
def test_auto_chooses_by_dtype_for_short_streams_on_a_cpu(
    side: int, dtype: torch.dtype, expected: attention.Backend
) -> None:
    layout = TextImageLayout(24, side, side)
    assert choice.choose(Mask.from_spec("row", layout), torch.empty(1, 1, layout.length, 8, dtype=dtype)) is expected


def changed(*_: object, **__: object) -> None:
    raise RuntimeError("missing value for an argument")


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    "operators",
    [{}, {KERNEL: changed}, {KERNEL: getattr(fused.aten, KERNEL), f"{KERNEL}_backward": changed}],
    ids=["missing", "changed", "changed backward"],
)
def test_lines_fall_back_to_sdpa_without_the_fused_operators(
    operators: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    assert fused.supported(CPU, torch.float32)
    monkeypatch.setattr(fused, "aten", SimpleNamespace(**operators))
    fused._works.cache_clear()
    try:
        x = stream(2, mask.layout.length)
        assert torch.equal(layer(mask, "lines")(x), layer(mask, "sdpa")(x))
        assert not fused.supported(CPU, torch.float32)
    finally:
        fused._works.cache_clear()


def test_the_check_on_a_device_finds_wrong_values_gradients_and_errors() -> None:
    mask = Mask.from_spec("row", LAYOUTS[0])
    other = Mask.from_spec("full", LAYOUTS[0])

    def scaled_gradient(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        return attention.dense(query, 2 * key - key.detach(), value, mask)

    def unable(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        raise RuntimeError("no kernel\nand a long trace")

    for dtype in (torch.float32, torch.bfloat16):
        assert disagreement(attention.lines, mask, CPU, dtype, 8) is None
    wrong_mask = disagreement(lambda q, k, v, m: attention.dense(q, k, v, other), mask, CPU, torch.float32, 8)
    assert wrong_mask is not None
    assert wrong_mask.startswith("values differ")
    # The scale of the keys' path does not change the value, only gradients.
    wrong_gradient = disagreement(scaled_gradient, mask, CPU, torch.float32, 8)
    assert wrong_gradient is not None
    assert wrong_gradient.startswith("gradients of keys differ")
    assert disagreement(scaled_gradient, mask, CPU, torch.float32, 8, gradients=False) is None
    assert disagreement(unable, mask, CPU, torch.float32, 8) == "RuntimeError: no kernel"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ["row", "column", "conv", "conv_torus", "full"])
@pytest.mark.parametrize("layout", [PAPER, WIDE], ids=str)
def test_lines_agree_with_the_dense_reference_on_a_gpu(spec: str, layout: TextImageLayout, dtype: torch.dtype) -> None:
    mask = Mask.from_spec(spec, layout)
    assert disagreement(attention.lines, mask, torch.device("cuda"), dtype, 64) is None


def test_unknown_back_ends_and_indivisible_widths_raise() -> None:
    mask = Mask.from_spec("full", LAYOUTS[0])
    with pytest.raises(UnknownNameError, match=r"unknown attention back-end 'sdap'. Did you mean 'sdpa'"):
        Attention(8, 2, mask, "sdap")
    with pytest.raises(ValueError, match="num_heads 3 does not divide width 8"):
        Attention(8, 3, mask)
