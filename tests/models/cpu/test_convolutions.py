"""The way of inference on a CPU against the modules whose values it must give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dalle_zoo.models import dvae_networks
from dalle_zoo.models.cpu import convolutions, onednn
from dalle_zoo.models.dvae import DVAE, DVAEConfig

ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
"""Float32 rounding between two ways to compute one thing."""
CONFIGS = [
    DVAEConfig(image_size=32, width=8, num_groups=groups, blocks_per_group=blocks, decoder_stem=stem, codebook_size=50)
    for groups, blocks, stem in [(1, 1, 8), (2, 2, 16), (3, 1, 8), (4, 2, 12)]  # with a first skip and without
]

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch lacks oneDNN, whose operators are tested"
)


def net_of(config: DVAEConfig) -> DVAE:
    torch.manual_seed(0)
    net = DVAE(config).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):  # zero in a fresh network, and then they could be forgotten
            torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture
def net() -> DVAE:
    return net_of(CONFIGS[2])


def images_of(batch: int) -> Tensor:
    return torch.rand(batch, 3, 16, 24, generator=torch.Generator().manual_seed(batch))


def forbid(*_: object) -> bool:
    return False


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.num_groups}-{config.decoder_stem}")
@torch.no_grad()
def test_gives_what_the_modules_give(config: DVAEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = net_of(config), images_of(3)
    mapped = net.map_pixels(images)
    network = convolutions.Network(net.encoder.input, net.encoder.groups, torch.float32)
    torch.testing.assert_close(network(mapped), net.encoder.features(mapped), **ROUNDING)
    torch.testing.assert_close(network(mapped), net.encoder.features(mapped), **ROUNDING)  # in memory used before
    codes = net.encode(images)
    decoded, parameters = net.decode(codes), net.decoder.from_codes(codes)
    monkeypatch.setattr(convolutions, "usable", forbid)
    assert torch.equal(codes, net.encode(images))
    assert torch.equal(codes, net.logits(images).argmax(1))
    torch.testing.assert_close(parameters, net.decoder.from_codes(codes), **ROUNDING)
    torch.testing.assert_close(decoded, net.decode(codes), **ROUNDING)


@torch.no_grad()
def test_this_way_is_taken(net: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def modules_are_called(*_: object) -> None:
        raise AssertionError

    for module in (*net.encoder.modules(), *net.decoder.modules()):
        module.register_forward_hook(modules_are_called)
    net.decode(net.encode(images_of(2)))


@torch.no_grad()
def test_nothing_that_came_in_is_written_to(net: DVAE) -> None:
    images = images_of(2).contiguous(memory_format=torch.channels_last)
    before, weights = images.clone(), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    codes = net.encode(images)
    retained = codes.clone()
    decoded = net.decode(codes)
    before_decoding = decoded.clone()
    net.decode(net.encode(1 - images))
    assert torch.equal(images, before)
    assert torch.equal(codes, retained)
    assert torch.equal(decoded, before_decoding)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


@torch.no_grad()
def test_weights_may_change_between_calls(net: DVAE) -> None:
    images = images_of(2)
    codes = net.encode(images)
    net.encoder.output.bias.data[7] += 1000  # in a way that torch does not count as a change
    assert (net.encode(images) == 7).all()
    assert (codes != 7).any()


@torch.no_grad()
def test_the_logits_are_never_complete(net: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = convolutions.Cells.__call__

    def note(self: convolutions.Cells, rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return compute(self, rows)

    images = images_of(5)
    complete = net.encode(images)
    monkeypatch.setattr(convolutions.Cells, "__call__", note)
    monkeypatch.setattr(dvae_networks, "_LOGITS_BYTES", {"cpu": 7 * 50 * 4, "cuda": 0})
    assert torch.equal(net.encode(images), complete)
    assert max(seen) == 7
    assert sum(seen) == complete.numel()
    monkeypatch.setattr(convolutions, "usable", forbid)
    assert torch.equal(net.encode(images), complete)


@torch.no_grad()
def test_images_go_in_passes(net: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = convolutions.Network.__call__

    def note(self: convolutions.Network, x: Tensor) -> Tensor:
        seen.append(len(x))
        return compute(self, x)

    images = images_of(5)
    codes = net.encode(images)
    decoded = net.decode(codes)
    monkeypatch.setattr(convolutions.Network, "__call__", note)
    monkeypatch.setattr(dvae_networks, "_PASS_BYTES", {"cpu": 2 * 4 * 8 * 16 * 24, "cuda": 0})  # two decoded
    assert torch.equal(net.encode(images), codes)
    torch.testing.assert_close(net.decode(codes), decoded, **ROUNDING)
    assert seen == [2, 2, 1] * 2


@torch.no_grad()
def test_no_image_is_no_code(net: DVAE) -> None:
    codes = net.encode(torch.empty(0, 3, 16, 24))
    assert codes.shape == (0, 4, 6)
    assert net.decode(codes).shape == (0, 3, 16, 24)


@torch.no_grad()
def test_compiled_networks_are_called(net: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(2)
    codes = net.encode(images)
    decoded = net.decode(codes)
    monkeypatch.setattr(convolutions, "usable", forbid)  # as on a GPU
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph.code)
        return graph

    net.compile_networks(backend=backend)
    assert torch.equal(net.encode(images), codes)
    assert len(compiled) == 1
    torch.testing.assert_close(net.decode(codes), decoded, **ROUNDING)
    assert len(compiled) == 2


def test_gradients_take_the_modules(net: DVAE) -> None:
    codes = net.encode(images_of(1))
    net.decode(codes).sum().backward()
    assert net.decoder.output.weight.grad is not None
    assert net.decoder.output.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_bfloat16(net: DVAE) -> None:
    if not convolutions.usable(images_of(1), net.encoder.input.weight, torch.bfloat16):
        pytest.skip("this processor lacks the instructions of bfloat16")
    images = images_of(16)
    exact = net.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        codes, decoded = net.encode(images), net.decode(exact)
        by_modules = net.logits(images).argmax(1)
    assert 0.9 < (codes == exact).float().mean() < 1
    assert (codes == by_modules).float().mean() > 0.9
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, net.decode(exact), atol=0.02, rtol=0)
    with torch.autocast("cpu", torch.float16):
        assert not convolutions.usable(images_of(1), net.encoder.input.weight, torch.float16)


def changed(*_: object) -> None:
    raise TypeError("an argument more")


def wrong(out: Tensor, *_: object) -> Tensor:
    return out


@pytest.mark.parametrize("operator", [changed, wrong])
@torch.no_grad()
def test_operators_that_changed_leave_the_modules(
    net: DVAE, operator: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(2)
    expected = net.logits(images).argmax(1)
    monkeypatch.setattr(onednn, "convolve_add", operator)
    onednn.convolutions_work.cache_clear()
    try:
        assert not convolutions.usable(images, net.encoder.input.weight, torch.float32)
        assert torch.equal(net.encode(images), expected)
    finally:
        onednn.convolutions_work.cache_clear()


@torch.no_grad()
def test_the_trial_samples_nothing_and_holds_under_autocast(net: DVAE) -> None:
    onednn.convolutions_work.cache_clear()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert convolutions.usable(images_of(1), net.encoder.input.weight, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_weights_are_laid_out_once_for_all_images_of_a_call(net: DVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(convolutions.Network):
        def __init__(self, input: nn.Conv2d | None, groups: nn.Sequential, dtype: torch.dtype) -> None:
            made.append(groups)
            super().__init__(input, groups, dtype)

    codes = net.encode(images_of(5))
    expected = net.decode(codes)
    monkeypatch.setattr(convolutions, "Network", Counted)
    monkeypatch.setitem(dvae_networks._PASS_BYTES, "cpu", 1)  # an image a pass
    torch.testing.assert_close(net.decode(codes), expected, **ROUNDING)
    assert made == [net.decoder.groups]
