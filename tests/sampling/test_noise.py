"""Sampling noise: the hash, its statistics, and what it depends on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_zoo.sampling import derive_seed, gumbel, noise

STANDARD_ERRORS = 5
"""Tolerance in standard errors. Seeds are fixed, so the tests are deterministic."""

BITS = (1 << 64) - 1


def mix(x: int) -> int:
    """The finalizer of splitmix64 on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def slow_gumbel(seed: int, step: int, entry: int) -> float:
    golden = 0x9E3779B97F4A7C15
    stream = mix((seed + (step + 1) * golden) & BITS)
    bits = mix(mix((stream + (entry + 1) * golden) & BITS)) >> 41
    return -math.log(-math.log((bits + 0.5) / 2**23))


def uniform(seeds: Tensor, step: int, size: int) -> Tensor:
    return torch.exp(-torch.exp(-gumbel(seeds, step, size).double()))


@pytest.mark.parametrize("step", [0, 1, 2, 1023])
def test_the_hash_equals_integer_arithmetic(step: int) -> None:
    seeds = [0, 1, 2**40 + 17, 2**63 - 1, derive_seed(0, "prompt", 3)]
    came = gumbel(torch.tensor(seeds), step, 9)
    assert came.dtype == torch.float32
    expected = torch.tensor([[slow_gumbel(seed, step, entry) for entry in range(9)] for seed in seeds])
    # Near u = 1 the logarithm of a float32 leaves few digits.
    torch.testing.assert_close(came, expected, atol=1e-5, rtol=1e-5)


def test_distributions_of_uniform_and_gumbel_noise() -> None:
    count = 64 * 16_384
    u = uniform(torch.arange(64), 5, 16_384)
    counts = torch.histc(u, bins=128, min=0, max=1)
    chi_square = float(((counts - count / 128) ** 2 / (count / 128)).sum())
    assert abs(chi_square - 127) < STANDARD_ERRORS * math.sqrt(2 * 127)
    g = gumbel(torch.arange(64), 5, 16_384).double()
    assert abs(g.mean() - 0.5772157) < STANDARD_ERRORS * math.pi / math.sqrt(6 * count)
    assert abs(g.var() - math.pi**2 / 6) < STANDARD_ERRORS * math.pi**2 / 6 * math.sqrt(4.4 / count)  # kurtosis 5.4


def test_adjacent_samples_are_independent() -> None:
    seeds = torch.arange(64)
    u = torch.stack([uniform(seeds, step, 512) for step in range(16)]) - 0.5  # (step, seed, entry)
    noise_level = STANDARD_ERRORS / math.sqrt(u.numel() / 2)
    for axis in range(3):
        for lag in (1, 2, 7):
            a, b = u.narrow(axis, 0, u.shape[axis] - lag), u.narrow(axis, lag, u.shape[axis] - lag)
            assert abs(float((a * b).mean()) * 12) < noise_level, f"axis {axis}, lag {lag}"
    # No entry, step or seed is an outlier either.
    for retained in range(3):
        others = [axis for axis in range(3) if axis != retained]
        means = u.mean(others)
        spread = math.sqrt(1 / 12 / (u.numel() / len(means)))
        assert means.abs().max() < STANDARD_ERRORS * spread


def test_pairs_are_uniform_in_the_unit_square() -> None:
    u = uniform(torch.arange(256), 0, 256)
    cells = (u[:, ::2] * 8).long() * 8 + (u[:, 1::2] * 8).long()
    counts = torch.bincount(cells.flatten(), minlength=64).double()
    expected = cells.numel() / 64
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < STANDARD_ERRORS * math.sqrt(2 * 63)


def test_a_row_depends_only_on_its_seed() -> None:
    seeds = torch.tensor([5, 9, 5, 7])
    together = gumbel(seeds, 3, 40)
    assert torch.equal(together[0], together[2])
    for row, seed in enumerate(seeds):
        assert torch.equal(gumbel(seed[None], 3, 40)[0], together[row])
    assert torch.equal(gumbel(seeds, 3, 11), together[:, :11]), "an entry does not depend on the vocabulary's size"
    assert seeds.tolist() == [5, 9, 5, 7]


def test_other_seeds_and_steps_give_other_noise() -> None:
    seen = {tuple(gumbel(torch.tensor([seed]), step, 4)[0].tolist()) for seed in range(30) for step in range(30)}
    assert len(seen) == 900


@pytest.mark.parametrize("bits", [0, -1])
def test_noise_is_finite_at_both_ends_of_the_range(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # All bits set: with 24 bits and a half the uniform number rounded to 1 and the noise was infinite.
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, bits))
    extreme = float(gumbel(torch.tensor([0]), 0, 1))
    assert extreme == pytest.approx(16.64 if bits else -2.81, abs=0.01)


def test_derived_seeds_of_images() -> None:
    assert derive_seed(0, "prompt", 3) == 2516821449756796655  # sha256, first eight bytes, little end first, 63 bits
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(1, 23) != derive_seed(12, 3)
    seeds = [derive_seed(0, p, i) for p in range(40) for i in range(40)]
    assert len(set(seeds)) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "63 bits are used"
