from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.training import muon
from dalle_zoo.training.muon import Muon, MuonConfig, orthogonalized
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names, make_optimizer
from dalle_zoo.training.prior_module import PriorModule
from dalle_zoo.training.schedules import LearningRate, LearningRateScheduler
from dalle_zoo.training.strategies import make_strategy

PRIOR = PriorConfig(
    text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=8, width=16, num_layers=2,
    num_heads=2, masks="full",
)  # fmt: skip
BFLOAT16 = 2e-2
"""PyTorch's Muon orthogonalizes in bfloat16 on any device."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.LayerNorm(16))


def optimizer(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    hidden = frozenset(name for name, p in module.named_parameters() if p.ndim == 2)
    return make_optimizer(module, AdamWConfig(), 0.02, decayed_names(module), MuonConfig(**options), hidden)


def run(module: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 5, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for each in optimizers:
            each.zero_grad()
        module(x).square().mean().backward()
        for each in optimizers:
            each.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_pytorch_muon_and_adamw(weight_decay: float) -> None:
    native, external = net(), net()
    mine = optimizer(native, weight_decay=weight_decay, dtype="bfloat16")
    matrices = [p for p in external.parameters() if p.ndim == 2]
    others = [p for p in external.parameters() if p.ndim < 2]
    pair = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=0.02 * 0.15, weight_decay=0.0),
    )
    for step in range(5):
        run(native, mine, steps=1, first=step)
        run(external, *pair, steps=1, first=step)
        for a, b in zip(native.parameters(), external.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=BFLOAT16, atol=BFLOAT16 * 0.02 * (step + 1))


def test_float32_and_bfloat16_agree() -> None:
    single, half = net(), net()
    run(single, optimizer(single, dtype="float32"))
    run(half, optimizer(half, dtype="bfloat16"))
    for a, b in zip(single.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=BFLOAT16, atol=0.06 * 5 * 0.02)  # 6 % of five steps of 0.02


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 10), (2, 10, 4)])
def test_singular_values_become_nearly_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalized(matrices, 8, torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_ranks_share_the_matrices_and_gather_all(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    matrices = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(0))
    shares: list[Tensor] = []
    results: list[Tensor] = []
    monkeypatch.setattr(muon.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.distributed, "get_world_size", lambda: ranks)
    # All ranks in turn: first what each one contributes, then what each one receives.
    for gather in (lambda output, own: shares.append(own), lambda output, own: output.copy_(torch.cat(shares))):
        monkeypatch.setattr(muon.distributed, "all_gather_into_tensor", gather)
        for rank in range(ranks):
            monkeypatch.setattr(muon.distributed, "get_rank", lambda rank=rank: rank)
            results.append(muon.orthogonalized_by_all(matrices, 5, torch.float32))
    assert sum(share.any(dim=(1, 2)).sum() for share in shares) == len(matrices)  # each matrix on one rank only
    for result in results[ranks:]:
        torch.testing.assert_close(result, orthogonalized(matrices, 5, torch.float32))


def test_resumed_optimizer_equals_uninterrupted_one() -> None:
    straight, stopped = net(), net()
    run(straight, optimizer(straight), steps=6)
    before = optimizer(stopped)
    run(stopped, before, steps=3)
    state = copy.deepcopy(before.state_dict())
    after = optimizer(stopped)
    after.load_state_dict(state)
    run(stopped, after, steps=3, first=3)
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert a.equal(b)


def test_schedule_preserves_ratio_of_learning_rates() -> None:
    chosen = optimizer(net(), adamw_ratio=0.25)
    scheduler = LearningRateScheduler(chosen, LearningRate(peak=0.02, warmup_steps=4, decay="constant"))
    for step in range(6):
        matrices, *others = (group["lr"] for group in chosen.param_groups)
        assert matrices == pytest.approx(0.02 * min(1, (step + 1) / 4))
        assert others == pytest.approx([matrices * 0.25] * len(others))
        chosen.step()
        scheduler.step()


def test_parameters_without_gradient_are_not_changed() -> None:
    module = net()
    before: list[Tensor] = [p.detach().clone() for p in module.parameters()]
    optimizer(module).step()
    assert all(a.equal(b) for a, b in zip(before, module.parameters(), strict=True))


def test_muon_matrices_of_prior_are_those_of_its_blocks() -> None:
    module = PriorModule(PRIOR, muon=MuonConfig())
    matrices = {name for name, p in module.net.named_parameters() if p.ndim == 2 and name.startswith("layers.")}
    assert module.hidden == matrices
    assert len(matrices) == 8


@pytest.mark.parametrize(
    ("spec", "shards"),
    [
        ("ddp", False),
        ("ddp_powersgd(rank=4)", False),
        ("fsdp", True),
        ("fsdp2", True),
        ("hsdp(shard_size=2)", True),
        ("hsdp_powersgd(rank=4, shard_size=2)", True),
    ],
)
def test_strategies_that_shard_refuse_muon(monkeypatch: pytest.MonkeyPatch, spec: str, shards: bool) -> None:
    strategy = make_strategy(spec)
    # Sharding needs several processes.
    monkeypatch.setattr(strategy, "shard", lambda net, units, entries: None, raising=False)
    for options in ({}, {"muon": MuonConfig()}):
        module = PriorModule(PRIOR, **options)
        monkeypatch.setattr(module, "_trainer", SimpleNamespace(strategy=strategy))
        module.configure_model()
        refused = pytest.raises(ValueError, match="Muon needs complete matrices: use strategy ddp or ddp_powersgd")
        with refused if shards and options else nullcontext():
            module.configure_optimizers()


def test_parameters_that_are_not_matrices_raise() -> None:
    module = net()
    adamw = torch.optim.AdamW(module.parameters())
    with pytest.raises(ValueError, match="nothing to update"):
        Muon([], adamw, 0.02, MuonConfig())
    with pytest.raises(ValueError, match="complete matrices"):
        Muon([module[0].bias], adamw, 0.02, MuonConfig())
    for options in ({"momentum": 1.0}, {"weight_decay": -1}, {"iterations": 0}, {"adamw_ratio": 0}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            MuonConfig(**options)
    hidden = frozenset(name for name, p in module.named_parameters() if p.ndim == 2)
    with pytest.raises(ValueError, match=r"adamw\.moments '8bit': set it to float32"):
        make_optimizer(module, AdamWConfig(moments="8bit"), 0.02, decayed_names(module), MuonConfig(), hidden)
