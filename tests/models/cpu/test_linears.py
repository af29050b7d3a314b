"""Packed matrices: the same numbers, the same parameters, and nothing but plain linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dalle_zoo.models.cpu import onednn
from dalle_zoo.models.cpu.linears import PackedLinear, with_packed_linears
from dalle_zoo.models.prior import Prior
from dalle_zoo.sampling import sample_codes

ROWS = [1, 2, 7, 16, 300]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False))
    return nn.ModuleDict({"inner": inner, "norm": nn.LayerNorm(8), "none": nn.Identity()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed_for", [1, 16])
def test_the_same_numbers_for_any_rows(net: nn.Module, dtype: torch.dtype, packed_for: int) -> None:
    net.to(dtype)
    fast = with_packed_linears(net, packed_for)
    assert sum(isinstance(module, PackedLinear) for module in fast.modules()) == 2
    tolerance = {} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(2, rows, 24, dtype=dtype)
            torch.testing.assert_close(fast["inner"](x), net["inner"](x), **tolerance)  # type: ignore[index]


def test_the_original_is_untouched_and_parameters_are_shared(net: nn.Module) -> None:
    before = copy.deepcopy(net)
    fast = with_packed_linears(net, 1)
    assert [type(module) for module in net.modules()] == [type(module) for module in before.modules()]
    own = dict(net.named_parameters())
    assert dict(fast.named_parameters()).keys() == own.keys()
    assert all(parameter is own[name] for name, parameter in fast.named_parameters())


def test_what_is_not_a_plain_layer_stays(net: nn.Module) -> None:
    class Odd(nn.Linear):
        pass

    assert with_packed_linears(Odd(3, 4), 1).__class__ is Odd
    double = net.double()
    assert with_packed_linears(double, 1) is double
    assert with_packed_linears(net.to("meta"), 1) is net


def test_without_the_operators_layers_stay(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(onednn, "reorder_linear", missing)
    onednn.linears_work.cache_clear()
    try:
        assert with_packed_linears(net, 1) is net
    finally:
        onednn.linears_work.cache_clear()


def test_a_changed_weight_is_seen_at_sampling(random_prior: Callable[..., Prior]) -> None:
    prior, text = random_prior(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        first = with_packed_linears(prior, 1).decoding(text, 1).step(0, None)
        prior.image_head.weight.mul_(2)
        second = with_packed_linears(prior, 1).decoding(text, 1).step(0, None)
        expected = prior.image_logits(text, torch.zeros(1, 3, 4, dtype=torch.long))[:, :1]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)


def test_sampling_under_autocast(random_prior: Callable[..., Prior]) -> None:
    prior, text, seeds = random_prior(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6]])
    expected = prior.image_logits(text, torch.zeros(1, 3, 4).long())[:, 0]
    decoder = with_packed_linears(prior, 2).decoding(text, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert with_packed_linears(prior, 2) is prior
        assert sample_codes(prior, text, seeds).shape == (1, 2, 3, 4)
        logits = decoder.step(0, None)  # packed before: layers whose inputs became bfloat16 are not multiplied packed
    torch.testing.assert_close(logits.float()[:, 0], expected, atol=0.1, rtol=0.1)


def test_hooks_are_called(random_prior: Callable[..., Prior]) -> None:
    prior, calls = random_prior(), []
    prior.layers[0].mlp.hidden.register_forward_hook(lambda *_: calls.append(1))
    sample_codes(prior, torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]]))
    assert len(calls) == 1 + 12, "the text, and every token"
