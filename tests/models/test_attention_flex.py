"""FlexAttention as a back-end: compilation per mask, check on the device, error for training on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dalle_zoo.masks import MASKS, Mask, TextImageLayout
from dalle_zoo.models import attention

LAYOUT = TextImageLayout(3, 3, 4)


# The compiler's warnings concern PyTorch's own code.
pytestmark = pytest.mark.filterwarnings("ignore")


def inputs(layout: TextImageLayout, batch: int = 2) -> list[Tensor]:
    shape = (3, batch, 2, layout.length, 4)
    return list(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def test_gradients_on_the_cpu_raise() -> None:
    mask = Mask.from_spec("row", LAYOUT)
    query, key, value = inputs(LAYOUT)
    with pytest.raises(
        NotImplementedError, match=r"FlexAttention of torch .* has no backward pass on the CPU: to train"
    ):
        attention.flex(query.requires_grad_(), key, value, mask)


def test_a_kernel_that_differs_from_the_reference_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Mask.from_spec("full", LAYOUT)
    module = sys.modules["dalle_zoo.models.attention.flex"]
    monkeypatch.setattr(module, "_compiled", lambda q, k, v, m: attention.dense(q, k, v, other))
    with pytest.raises(RuntimeError, match=r"is wrong for mask 'row' on cpu, values differ .* use the attention"):
        attention.flex(*inputs(LAYOUT), Mask.from_spec("row", LAYOUT))
    assert torch.equal(attention.flex(*inputs(LAYOUT), other), attention.dense(*inputs(LAYOUT), other))


def test_a_prefix_uses_sdpa() -> None:
    mask = Mask.from_spec("row", LAYOUT)
    query, key, value = (x[:, :, :3].requires_grad_() for x in inputs(LAYOUT))
    assert torch.equal(attention.flex(query, key, value, mask), attention.sdpa(query, key, value, mask))


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.slow
def test_the_compiled_kernel_equals_the_dense_reference() -> None:
    mask = Mask.from_spec("row", LAYOUT)
    expected = attention.dense(*inputs(LAYOUT), mask)
    torch.testing.assert_close(attention.flex(*inputs(LAYOUT), mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.slow
def test_any_number_of_masks_is_compiled() -> None:
    counters.clear()
    specs = [*MASKS, "conv(kernel=3)", "conv(kernel=5)", "conv_torus(kernel=3)"]
    assert len(specs) > torch._dynamo.config.recompile_limit, "else nothing is shown"
    for spec in specs:
        mask = Mask.from_spec(spec, TextImageLayout(3, 7, 5))
        read = inputs(mask.layout)
        torch.testing.assert_close(attention.flex(*read, mask), attention.dense(*read, mask), atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] >= len(specs)
