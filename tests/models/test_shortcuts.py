"""Private operators of PyTorch: with the switch off nothing calls them, and every result stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_zoo.models import shortcuts
from dalle_zoo.models.attention import fused
from dalle_zoo.models.cpu import linears, onednn
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior
from dalle_zoo.sampling import sample_codes

Maker = Callable[..., Prior]
TEXT, SEEDS = torch.tensor([[1, 2, 12, 13]]), torch.tensor([[5, 6]])
ROUNDING = 1e-5
OPERATORS = [
    (onednn, "reorder_linear"), (onednn, "linear"), (onednn, "reorder_convolution"), (onednn, "convolve"),
    (onednn, "convolve_add"), (fused, "forward"), (fused, "backward"),
]  # fmt: skip
"""Functions that call private operators."""


def sampling(random_prior: Maker) -> Tensor:
    return sample_codes(random_prior(masks="paper", num_layers=4), TEXT, SEEDS).float()


def training(random_prior: Maker) -> Tensor:
    prior = random_prior(masks="row, column", backend="lines", image_height=6, image_width=6)
    loss = prior.loss(TEXT, torch.zeros(1, 6, 6, dtype=torch.long)).total
    loss.backward()
    assert prior.row_position.weight.grad is not None
    return torch.cat([loss.detach()[None], prior.row_position.weight.grad.flatten()])


@torch.no_grad()
def images(random_prior: Maker) -> Tensor:
    torch.manual_seed(0)
    net = DVAE(DVAEConfig(image_size=8, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    codes = net.encode(torch.rand(2, 3, 8, 8))
    return torch.cat([codes.flatten().float(), net.decode(codes).flatten()])


PATHS: list[Callable[[Maker], Tensor]] = [sampling, training, images]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the called functions of `OPERATORS`, without those of trials that ran before."""
    called: list[str] = []
    assert onednn.linears_work()
    assert onednn.convolutions_work()
    assert fused.supported(torch.device("cpu"), torch.float32)
    for module, name in OPERATORS:
        original = getattr(module, name)

        def counted(*arguments: Any, original: Any = original, name: str = name) -> Any:
            called.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)
    return called


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_same_with_the_switch_off(
    random_prior: Maker, path: Callable[[Maker], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "is_faster", lambda *_: True)  # even for matrices of this size
    called = count_calls(monkeypatch)
    expected = path(random_prior)
    assert called, "else nothing is shown"
    called.clear()
    with shortcuts.turned_off():
        inside = path(random_prior)
    monkeypatch.setenv(shortcuts.SWITCH, "0")
    by_variable = path(random_prior)
    assert not called
    for found in (inside, by_variable):
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_another_value_of_the_switch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shortcuts.SWITCH, "off")
    with pytest.raises(ValueError, match=r"DALLE_ZOO_SHORTCUTS must be 0 .* got 'off'"):
        onednn.linears_work()
