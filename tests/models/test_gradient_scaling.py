"""Scaled branches: exact where nothing over- or underflows, isolated where something does; and the rule of scales."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dalle_zoo.models import gradient_scaling
from dalle_zoo.models.emulation import EmulatedFloat16
from dalle_zoo.models.gradient_scaling import Carrier, GradientScales, GradientScalingConfig, ScaledBranch
from dalle_zoo.models.prior import MLP, Prior
from dalle_zoo.models.residual import Residual

ROOT = Path(__file__).parents[2]
FLOAT32_NOISE = 1e-6
"""Of a scale that is no power of two: its multiplication and division round."""
FLOAT16_ERROR = 3e-3
"""Relative error of gradients through some dozen roundings to 11 significant bits."""


def scale(prior: Prior, scales: Tensor, carrier: Carrier, recompute: bool = False) -> None:
    """Puts scaled branches into a prior."""
    for block, own in zip(prior.residual_blocks(), scales, strict=True):
        block.residual.around = ScaledBranch(own, carrier)
        block.residual.recompute = recompute


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, (3, 4), generator=generator), torch.randint(7, (3, 3, 4), generator=generator)


def gradients(prior: Prior, factor: float = 1.0) -> dict[str, Tensor]:
    """Of all parameters; those of branches times their scales."""
    prior.zero_grad()
    (prior.loss(*batch()).total * factor).backward()
    return {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}


def unscaled(prior: Prior, scales: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """Gradients of all parameters, those of block b divided by its scale."""
    result = gradients(prior, factor)
    for block, own in zip(prior.residual_blocks(), scales.clone(), strict=True):
        for part in (block.norm, block.branch):
            for name, parameter in prior.named_parameters():
                if any(parameter is p for p in part.parameters()):
                    result[name] = result[name] / own
    return result


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's gradient."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)) for n in a)


# ---------------------------------------------------------------- the branch


@pytest.mark.parametrize("recompute", [False, True])
def test_float32_branches_are_exact(random_prior: Callable[..., Prior], recompute: bool) -> None:
    """Powers of two as scales change no bit."""
    plain, scaled = random_prior(), random_prior()
    scales = 2.0 ** torch.tensor([13.0, 7.0, 24.0, 10.0])
    scale(scaled, scales, "float32", recompute)
    assert torch.equal(plain.loss(*batch()).total, scaled.loss(*batch()).total)
    expected, found = gradients(plain), unscaled(scaled, scales)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_parameter_gradients_are_multiplied_by_the_scale(random_prior: Callable[..., Prior]) -> None:
    """Those of the block, norm included, and no others."""
    plain, scaled = random_prior(), random_prior()
    scale(scaled, torch.tensor([1.0, 1.0, 8.0, 1.0]), "float32")
    expected, found = gradients(plain), gradients(scaled)
    own = {name for name in expected if name.startswith(("layers.1.attention.", "layers.1.attention_norm."))}
    assert len(own) == 6
    for name in expected:
        assert torch.equal(found[name], expected[name] * (8 if name in own else 1)), name


@pytest.mark.parametrize("carrier", ["emulated", "float16"])
def test_float16_branches_are_close_to_float32(random_prior: Callable[..., Prior], carrier: Carrier) -> None:
    plain, scaled = random_prior(), random_prior()
    scales = torch.full((4,), 2.0**9)
    scale(scaled, scales, carrier)
    error = distance(unscaled(scaled, scales), gradients(plain))
    assert 1e-5 < error < FLOAT16_ERROR  # and it is not float32 that was measured


def test_emulation_has_the_error_of_float16(random_prior: Callable[..., Prior]) -> None:
    """With a loss so small that most gradients underflow without a scale, and scales that help more and more."""
    exact = gradients(random_prior(), 2.0**-18)
    errors: dict[str, list[float]] = {}
    for carrier in ("emulated", "float16"):
        for exponent in (0, 4, 8, 12):
            prior, scales = random_prior(), torch.full((4,), 2.0**exponent)
            scale(prior, scales, carrier)
            errors.setdefault(carrier, []).append(distance(unscaled(prior, scales, 2.0**-18), exact))
    for emulated, real in zip(errors["emulated"], errors["float16"], strict=True):
        assert emulated == pytest.approx(real, rel=0.5)
    assert errors["emulated"][0] > 0.9
    assert errors["emulated"][-1] < FLOAT16_ERROR


def test_recomputation_is_exact(random_prior: Callable[..., Prior]) -> None:
    once, again = random_prior(), random_prior()
    scales = torch.full((4,), 2.0**9)
    scale(once, scales, "emulated")
    scale(again, scales, "emulated", recompute=True)
    expected, found = gradients(once), gradients(again)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_the_exit_saves_no_tensor() -> None:
    """A saved one would begin the recomputation before the backward hooks of a sharded branch have run."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 3, requires_grad=True)
    branch = ScaledBranch(torch.tensor(8.0), "float16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = branch(x, nn.Identity(), nn.Identity())
    assert saved == []
    assert out.dtype == torch.float32


class Stack(nn.Module):
    """Three MLP blocks with scales of their own."""

    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in scales)
        self.branches = nn.ModuleList(MLP(8, 16) for _ in scales)
        self.residuals = nn.ModuleList(Residual() for _ in scales)
        for residual, own in zip(self.residuals, scales, strict=True):
            cast(Residual, residual).around = ScaledBranch(own)

    def forward(self, x: Tensor) -> Tensor:
        for residual, norm, branch in zip(self.residuals, self.norms, self.branches, strict=True):
            x = residual(x, norm, branch)
        return x


# PyTorch's compiler warns of what it does itself.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_per_branch_and_no_recompilation_when_scales_change(recompute: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    scales = torch.empty(3)
    stack, x = Stack(scales), torch.randn(4, 8)
    for residual in stack.residuals:
        cast(Residual, residual).recompute = recompute
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stack, fullgraph=True, backend=counter)
    for own in (2.0**13, 2.0**13 * 1.001, 2.0**9):
        scales.fill_(own)
        found = []
        for network in (stack, compiled):
            stack.zero_grad()
            network(x).square().mean().backward()
            found.append([p.grad.clone() for p in stack.parameters() if p.grad is not None])
        assert len(found[0]) == len([*stack.parameters()])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5 * own)
    assert counter.frame_count == 1


def test_an_unknown_carrier_raises() -> None:
    with pytest.raises(ValueError, match="one of float16, emulated, float32, got 'float8'"):
        ScaledBranch(torch.tensor(1.0), "float8")  # type: ignore[arg-type]


def test_emulation_rounds_numbers_and_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1 + 2.0**-13, 3.0]))
    x = torch.ones(2)
    with EmulatedFloat16():
        y = weight * x
        z = y * 1.0
    assert y.tolist() == [1.0, 3.0]
    (z * torch.tensor([2.0**-30, 2.0**17])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, torch.inf]
    assert (weight * x).tolist() == [1 + 2.0**-13, 3.0]  # outside nothing is rounded


# ---------------------------------------------------------------- the filters


def finite_blocks(prior: Prior) -> list[bool]:
    """Whether all gradients of each block are finite."""
    return [
        all(
            bool(p.grad.isfinite().all()) for p in [*b.norm.parameters(), *b.branch.parameters()] if p.grad is not None
        )
        for b in prior.residual_blocks()
    ]


def overflow_in_block(prior: Prior, number: int) -> tuple[list[bool], bool]:
    """Gives a block a scale with which its gradient overflows float16.

    Returns:
        Which blocks stay finite, and whether the embeddings below all of them do.
    """
    scales = torch.full((4,), 2.0**9)
    scales[number] = 2.0**40
    scale(prior, scales, "emulated")
    embeddings = gradients(prior)["text_embedding.weight"]
    return finite_blocks(prior), bool(embeddings.isfinite().all())


def overflow_above_all(prior: Prior) -> list[bool]:
    """Which blocks stay finite when the gradient that arrives on the identity path is not."""
    scale(prior, torch.full((4,), 2.0**9), "emulated")

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0], gradient[1, 2, 3] = torch.inf, torch.nan
        return gradient

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(spoil)

    prior.layers[-1].register_forward_hook(watch)
    gradients(prior)
    return finite_blocks(prior)


def without_filter(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Removes the filter of one end of the branch."""
    function = getattr(gradient_scaling, end)
    backward = function.backward

    def unfiltered(ctx: Any, gradient: Tensor) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(gradient_scaling, "finite_or_zero", lambda x: x)
            return backward(ctx, gradient)

    monkeypatch.setattr(function, "backward", staticmethod(unfiltered))


def test_an_overflow_does_not_reach_other_blocks(random_prior: Callable[..., Prior]) -> None:
    assert overflow_in_block(random_prior(), 2) == ([True, True, False, True], True)


def test_an_overflow_above_all_blocks_reaches_no_block(random_prior: Callable[..., Prior]) -> None:
    assert overflow_above_all(random_prior()) == [True] * 4


def test_an_overflow_spreads_without_the_filter_of_leaving_gradients(
    random_prior: Callable[..., Prior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What overflows in a block goes down the identity path, to the embeddings."""
    without_filter(monkeypatch, "_Enter")
    assert overflow_in_block(random_prior(), 2) == ([True, True, False, True], False)


def test_an_overflow_spreads_without_the_filter_of_arriving_gradients(
    random_prior: Callable[..., Prior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finite above all blocks lowers all scales."""
    without_filter(monkeypatch, "_Exit")
    assert overflow_above_all(random_prior()) == [False] * 4


def test_an_overflow_spreads_without_both_filters(
    random_prior: Callable[..., Prior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What overflows in a block lowers the scales of all blocks before."""
    without_filter(monkeypatch, "_Enter")
    without_filter(monkeypatch, "_Exit")
    assert overflow_in_block(random_prior(), 2) == ([False, False, False, True], False)


# ---------------------------------------------------------------- the rule


def updated(scales: GradientScales, *finite: bool, times: int = 1) -> list[float]:
    for _ in range(times):
        scales.update(torch.tensor(finite))
    return scales.values.tolist()


def test_the_papers_constants() -> None:
    config = GradientScalingConfig()
    assert (config.start, config.smallest, config.largest) == (8192, 128, 16_777_216)
    assert config.growth**1000 == pytest.approx(2)
    assert config.backoff**2 == pytest.approx(0.5)
    assert config.cooldown == 125
    assert GradientScales(3).values.tolist() == [8192.0] * 3


def test_the_scale_of_a_finite_block_doubles_in_1000_steps() -> None:
    scales = GradientScales(1)
    assert updated(scales, True) == [pytest.approx(8192 * 2 ** (1 / 1000), rel=FLOAT32_NOISE)]
    assert updated(scales, True, times=999) == [pytest.approx(16384, rel=1e-4)]


def test_an_overflow_divides_only_the_scale_of_its_block_by_the_root_of_2() -> None:
    scales = GradientScales(3)
    grown, divided, _ = updated(scales, True, False, True)
    assert divided == pytest.approx(8192 / 2**0.5, rel=FLOAT32_NOISE)
    assert grown == pytest.approx(8192 * 2 ** (1 / 1000), rel=FLOAT32_NOISE)


def test_no_second_division_within_125_steps() -> None:
    scales = GradientScales(1)
    first = updated(scales, False)
    assert updated(scales, False, times=124) == first
    assert updated(scales, False) == [pytest.approx(8192 / 2, rel=FLOAT32_NOISE)]


def test_scales_grow_during_the_cooldown() -> None:
    scales = GradientScales(1)
    (first,) = updated(scales, False)
    assert updated(scales, True) == [pytest.approx(first * 2 ** (1 / 1000), rel=FLOAT32_NOISE)]


def test_scales_stay_within_their_limits() -> None:
    """Reached from both sides, and kept."""
    low, high = GradientScales(1), GradientScales(1)
    assert updated(low, False, times=125 * 12) == [pytest.approx(2**7, rel=1e-5)]
    assert updated(low, False, times=125 * 2) == [2**7]
    assert updated(high, True, times=10_999) < [2**24]
    assert updated(high, True, times=5) == [2**24]


def test_a_restored_state_continues_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    flags = (torch.rand(400, 5, generator=generator) > 0.05).tolist()
    complete, first, second = GradientScales(5), GradientScales(5), GradientScales(5)
    for row in flags:
        updated(complete, *row)
    for row in flags[:200]:
        updated(first, *row)
    retained = first.state_dict()
    updated(first, *[False] * 5)  # what was kept is a copy
    second.load_state_dict(retained)
    for row in flags[200:]:
        updated(second, *row)
    assert torch.equal(complete.values, second.values)
    assert torch.equal(complete.since_division, second.since_division)
    assert len({*complete.values.tolist()}) > 1


def test_views_of_the_scales_are_updated_in_place() -> None:
    """Branches hold views: updates and loaded states must change the same memory."""
    scales = GradientScales(2)
    view = scales.values[1]
    updated(scales, True, False)
    assert view.item() == pytest.approx(8192 / 2**0.5, rel=FLOAT32_NOISE)
    scales.load_state_dict(GradientScales(2).state_dict())
    assert view.item() == 8192


def test_a_state_of_another_depth_raises() -> None:
    with pytest.raises(ValueError, match="scales of 2 residual blocks, got 3"):
        GradientScales(2).load_state_dict(GradientScales(3).state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1.0}, "smallest <= start <= largest"),
        ({"largest": 2.0**10}, "smallest <= start <= largest"),
        ({"backoff": 1.0}, "backoff < 1 <= growth"),
        ({"backoff": 0.0}, "backoff < 1 <= growth"),
        ({"growth": 0.9}, "backoff < 1 <= growth"),
        ({"cooldown": 0}, "cooldown must be at least 1, got 0"),
    ],
)
def test_invalid_constants_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientScalingConfig(**changes)


# ---------------------------------------------------------------- what it is for


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script that plots the figure of the documents."""
    spec = importlib.util.spec_from_file_location("gradient_scaling", ROOT / "benchmarks/gradient_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scaling_recovers_gradients_that_fall_by_2_to_the_29(benchmark: ModuleType) -> None:
    """A scale a block errs by less than a third of the best single one, in the last block; it errs little in all."""
    net = benchmark.Spread(width=16, spread=29)
    assert net.ratio() == pytest.approx(29, abs=2)
    exponents = range(9, 16)
    fits = [net.one_scale(exponent)[0] for exponent in exponents]
    assert fits[0]
    assert not fits[-1]
    assert all(one or not next_one for one, next_one in pairwise(fits))  # so the best one is among these
    exponent, one = net.best_scale(exponents)
    assert exponent > exponents[0]
    scales, per_block = net.scale_per_block()
    assert per_block[-1] < one[-1] / 3
    assert max(per_block) < FLOAT16_ERROR
    assert min(scales) < max(scales) - 10


def test_stored_benchmark_results_show_the_effect() -> None:
    """Of the full width, as the documents quote them."""
    stored = json.loads((ROOT / "benchmarks/results/gradient_scaling.json").read_text())
    assert (stored["residual blocks"], stored["width"], stored["carrier"]) == (48, 128, "emulated")
    widest = stored["rows"][-1]
    assert widest["log2 of the spread"] == 29
    assert widest["error with a scale per block"][-1] < widest["error with the best scale for all"][-1] / 3
    for row in stored["rows"]:
        assert max(row["error with a scale per block"]) < FLOAT16_ERROR
