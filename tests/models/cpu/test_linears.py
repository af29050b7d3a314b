"""Packed matrices: the same numbers, no second copy of the weights, and nothing but plain linear layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dalle_zoo.models.cpu import linears, onednn
from dalle_zoo.models.cpu.linears import PackedLinear, is_faster, packed_linears
from dalle_zoo.models.prior import Prior
from dalle_zoo.sampling import sample_codes

ROWS = [1, 2, 7, 16, 300]


@pytest.fixture(autouse=True)
def _small_matrices_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "SMALLEST", 1)
    monkeypatch.setattr(linears, "_is_intel", lambda: False)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Sequential(nn.Linear(40, 8, bias=False)), nn.LayerNorm(8))


def types(net: nn.Module) -> list[type]:
    return [type(module) for module in net.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed_for", [1, 16])
@torch.inference_mode()
def test_values_are_equal_for_any_number_of_rows(net: nn.Module, dtype: torch.dtype, packed_for: int) -> None:
    net.to(dtype)
    inputs = [torch.randn(2, rows, 24, dtype=dtype) for rows in ROWS]
    expected = [net(x) for x in inputs]
    tolerance = {} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    packable = 2 if onednn.computes_in(dtype) else 0
    with packed_linears(net, packed_for):
        assert types(net).count(PackedLinear) == packable
        for x, value in zip(inputs, expected, strict=True):
            torch.testing.assert_close(net(x), value, **tolerance)


@torch.inference_mode()
def test_weights_are_restored_in_every_bit(net: nn.Sequential) -> None:
    before, parameters = copy.deepcopy(net), dict(net.named_parameters())

    def interrupted() -> None:
        with packed_linears(net, 1):
            net(torch.randn(1, 24))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert types(net) == types(before)
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.state_dict().items())


def test_a_training_goes_on_after_sampling(net: nn.Sequential) -> None:
    net(torch.randn(3, 24)).square().sum().backward()
    gradient = net[0].weight.grad.clone()
    with torch.inference_mode(), packed_linears(net, 1):
        net(torch.randn(1, 24))
    assert torch.equal(net[0].weight.grad, gradient)
    net(torch.randn(3, 24)).square().sum().backward()
    assert not torch.equal(net[0].weight.grad, gradient)
    torch.optim.SGD(net.parameters(), 0.1).step()


@torch.inference_mode()
def test_a_network_that_was_made_in_inference_mode_is_used_plain_after_sampling() -> None:
    made = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8))
    x = torch.randn(3, 24)
    expected = made(x)
    with packed_linears(made, 1):
        made(torch.randn(1, 24))
    assert torch.equal(made(x), expected)


@torch.inference_mode()
def test_plain_matrices_are_not_in_memory_beside_packed_ones(net: nn.Sequential) -> None:
    plain = net[0]
    assert isinstance(plain, nn.Linear)
    expected = plain.weight.clone()
    with packed_linears(net, 1):
        net(torch.randn(1, 24))
        assert plain.weight.untyped_storage().nbytes() == 0
        assert torch.equal(net[0].weight, expected)
    assert torch.equal(plain.weight, expected)


@torch.inference_mode()
def test_a_matrix_with_a_second_user_stays_in_memory(net: nn.Sequential) -> None:
    embedding = nn.Embedding(40, 24)
    embedding.weight = net[0].weight  # type: ignore[assignment]
    net.append(embedding)
    part = nn.Linear(8, 8)
    part.weight = nn.Parameter(torch.randn(16, 8)[:8])
    both = nn.ModuleList([net, part])
    with packed_linears(both, 1):
        net[:3](torch.randn(1, 24))
        part(torch.randn(1, 8))
        assert embedding(torch.tensor([3])).shape == (1, 24)
        assert part.weight.shape == (8, 8)


@torch.inference_mode()
def test_two_threads_share_the_packed_matrices(net: nn.Sequential) -> None:
    x = torch.randn(2, 24)
    expected, found = net(x), []
    inside, leave = threading.Event(), threading.Event()

    @torch.inference_mode()
    def other() -> None:
        with packed_linears(net, 2):
            inside.set()
            leave.wait(10)
            found.append(net(x))

    thread = threading.Thread(target=other)
    with packed_linears(net, 1):
        thread.start()
        assert inside.wait(10)
        found.append(net(x))
    found.append(net(x))  # the other thread still samples
    leave.set()
    thread.join()
    assert PackedLinear not in types(net)
    for value in [*found, net(x)]:
        torch.testing.assert_close(value, expected)


def test_a_second_sampler_does_not_pack_under_a_first_one(net: nn.Sequential) -> None:
    with packed_linears(net, 65), packed_linears(net, 1):
        assert PackedLinear not in types(net)
    with packed_linears(net, 1):
        with packed_linears(net, 65):
            assert PackedLinear in types(net)
        assert PackedLinear in types(net)
    assert PackedLinear not in types(net)


def test_matrices_are_packed_only_where_it_is_faster(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with packed_linears(net, 65):
        assert PackedLinear not in types(net)
    monkeypatch.setattr(linears, "SMALLEST", 24 * 40)
    with packed_linears(net, 64):
        assert types(net).count(PackedLinear) == 1  # the smaller one stays
    large = torch.empty(24, 40)
    assert [is_faster(large, rows) for rows in (1, 3, 4, 64)] == [True] * 4
    monkeypatch.setattr(linears, "_is_intel", lambda: True)
    assert [is_faster(large, rows) for rows in (1, 3, 4, 64)] == [False, False, True, True]


def test_what_is_not_a_plain_layer_stays(net: nn.Module) -> None:
    class Odd(nn.Linear):
        pass

    changed = nn.Linear(3, 4)
    changed.forward = lambda x: x  # type: ignore[method-assign]
    for other in (nn.Sequential(Odd(3, 4), changed), net.double(), net.to("meta")):
        before = types(other)
        with packed_linears(other, 1):
            assert types(other) == before


def test_without_the_operators_layers_stay(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(onednn, "reorder_linear", missing)
    onednn.linears_work.cache_clear()
    try:
        with packed_linears(net, 1):
            assert PackedLinear not in types(net)
    finally:
        onednn.linears_work.cache_clear()


def test_a_changed_weight_is_seen_at_sampling(random_prior: Callable[..., Prior]) -> None:
    prior, text = random_prior(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        with packed_linears(prior, 1):
            first = prior.decoding(text, 1).step(0, None)
        prior.image_head.weight.mul_(2)
        with packed_linears(prior, 1):
            second = prior.decoding(text, 1).step(0, None)
        expected = prior.image_logits(text, torch.zeros(1, 3, 4, dtype=torch.long))[:, :1]
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-4)


def test_sampling_under_autocast(random_prior: Callable[..., Prior]) -> None:
    prior, text, seeds = random_prior(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6]])
    expected = prior.image_logits(text, torch.zeros(1, 3, 4).long())[:, 0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_linears(prior, 2):
        assert PackedLinear not in types(prior)
        assert sample_codes(prior, text, seeds).shape == (1, 2, 3, 4)
    with torch.no_grad(), packed_linears(prior, 2):
        decoder = prior.decoding(text, 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder.step(0, None)  # layers whose inputs became bfloat16 are not multiplied packed
    torch.testing.assert_close(logits.float()[:, 0], expected, atol=0.1, rtol=0.1)


def test_hooks_are_called(random_prior: Callable[..., Prior]) -> None:
    prior, calls = random_prior(), []
    prior.layers[0].mlp.hidden.register_forward_hook(lambda *_: calls.append(1))
    sample_codes(prior, torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5]]))
    assert len(calls) == 1 + 12, "the text, and every token"
