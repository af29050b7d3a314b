"""Schedules: values of the paper, the plateau rule, and restored states."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from dalle_zoo.training.schedules import Cosine, LearningRate, LearningRateScheduler

KL_WEIGHT = Cosine(start=0.0, end=6.6, steps=5_000)
TEMPERATURE = Cosine(start=1.0, end=1 / 16, steps=150_000)
STEP_SIZE = Cosine(start=1e-4, end=1.25e-6, steps=1_200_000)


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (KL_WEIGHT, 0, 0.0),
        (KL_WEIGHT, 1_250, 0.966548),  # 6.6 * (1 - cos(45 degrees)) / 2
        (KL_WEIGHT, 2_500, 3.3),
        (KL_WEIGHT, 5_000, 6.6),
        (KL_WEIGHT, 3_000_000, 6.6),
        (TEMPERATURE, 0, 1.0),
        (TEMPERATURE, 50_000, 0.765625),  # a quarter of the way after a third
        (TEMPERATURE, 75_000, 0.53125),
        (TEMPERATURE, 100_000, 0.296875),
        (TEMPERATURE, 150_000, 0.0625),
        (TEMPERATURE, 150_001, 0.0625),
        (STEP_SIZE, 0, 1e-4),
        (STEP_SIZE, 400_000, 7.53125e-5),
        (STEP_SIZE, 600_000, 5.0625e-5),
        (STEP_SIZE, 1_200_000, 1.25e-6),
        (STEP_SIZE, 3_000_000, 1.25e-6),
    ],
)
def test_dvae_schedules_match_the_paper(schedule: Cosine, step: int, value: float) -> None:
    assert schedule(step) == pytest.approx(value, rel=1e-6, abs=1e-15)


def test_schedule_depends_only_on_step() -> None:
    before = TEMPERATURE(10_000)
    for step in range(0, 200_000, 1_000):
        TEMPERATURE(step)
    assert TEMPERATURE(10_000) == before


def test_cosine_without_steps_raises() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Cosine(start=0, end=1, steps=0)


def test_warm_up_is_linear_to_peak() -> None:
    rate = LearningRate()
    assert rate.at(0) == pytest.approx(4.5e-4 / 5_000)
    assert rate.at(2_499) == pytest.approx(2.25e-4)
    assert rate.at(4_999) == rate.at(5_000) == rate.at(400_000) == 4.5e-4
    assert rate.at(400_000, halvings=5) == 1.40625e-5
    assert LearningRate(warmup_steps=0).at(0) == 4.5e-4


def test_cosine_decay_starts_where_the_warm_up_ends() -> None:
    rate = LearningRate(peak=1e-3, warmup_steps=10, decay="cosine", final=1e-5, decay_steps=100)
    assert rate.at(9) == rate.at(10) == 1e-3
    assert rate.at(60) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate.at(110) == pytest.approx(1e-5)
    assert rate.at(10_000) == pytest.approx(1e-5)
    assert LearningRate(peak=1e-3, warmup_steps=0, decay="constant").at(10**6) == 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peak": 0.0}, "peak must be above 0"),
        ({"final": -1.0}, "final at least 0"),
        ({"decay": "cosin"}, "unknown decay 'cosin'. Did you mean 'cosine'"),
        ({"decay_steps": 0}, "decay_steps must be at least 1"),
        ({"plateau_window": 0}, "plateau_window must be at least 1"),
        ({"plateau_patience": 0}, "plateau_patience must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"max_halvings": -1}, "max_halvings must be at least 0"),
    ],
)
def test_wrong_rate_raises(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate(**wrong)


# ------------------------------------------------------------ the scheduler


class Run:
    """An optimizer with two groups and the scheduler: one step at a time."""

    def __init__(self, rate: LearningRate) -> None:
        weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        self.optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
        self.scheduler = LearningRateScheduler(self.optimizer, rate)

    def update(self, loss: float) -> float:
        """Performs a step with this training loss; returns its learning rate."""
        rates = {group["lr"] for group in self.optimizer.param_groups}
        assert len(rates) == 1
        mean = self.scheduler.window_mean(loss)
        if mean is not None:
            self.scheduler.observe(mean)
        self.optimizer.step()
        self.scheduler.step()
        return rates.pop()


def test_scheduler_sets_rate_of_every_step() -> None:
    rate = LearningRate(peak=1.0, warmup_steps=3, decay="cosine", final=0.1, decay_steps=4)
    run = Run(rate)
    assert [run.update(9.0) for _ in range(10)] == [rate.at(step) for step in range(10)]


def test_plateau_halves_at_most_five_times() -> None:
    run = Run(LearningRate(warmup_steps=2, plateau_window=3, plateau_patience=2))
    rates = [run.update(2.0) for _ in range(60)]
    assert rates[:2] == [2.25e-4, 4.5e-4]
    # The first window is the best; the rate halves after every two windows of three steps without a better one.
    assert rates[2:11] == [4.5e-4] * 9
    assert rates[11:17] == [2.25e-4] * 6
    assert rates[17] == 1.125e-4
    assert rates[-1] == 1.40625e-5
    assert sorted(set(rates[2:]), reverse=True) == [4.5e-4 / 2**n for n in range(6)]
    assert run.scheduler.halvings == 5


def test_falling_loss_does_not_halve() -> None:
    run = Run(LearningRate(warmup_steps=0, plateau_window=2, plateau_patience=1, plateau_threshold=1e-3))
    assert {run.update(5 * 0.99**step) for step in range(100)} == {4.5e-4}
    # A decrease below the threshold does not count.
    assert run.update(5 * 0.99**99) == 4.5e-4
    assert {run.update(5 * 0.99**99 * (1 - 1e-5 * step)) for step in range(20)} > {4.5e-4, 2.25e-4}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_loss_is_ignored(loss: float) -> None:
    run = Run(LearningRate(warmup_steps=0, plateau_window=2, plateau_patience=1, plateau_threshold=1e-3))
    assert {run.update(loss if step % 3 == 0 else 5 * 0.99**step) for step in range(100)} == {4.5e-4}


def test_warm_up_losses_are_not_compared() -> None:
    run = Run(LearningRate(warmup_steps=4, plateau_window=1, plateau_patience=1))
    for loss in (0.1, 0.1, 0.1, 0.1):
        run.update(loss)
    assert run.scheduler.best == math.inf


def test_restart_does_not_change_schedule() -> None:
    rate = LearningRate(warmup_steps=3, plateau_window=3, plateau_patience=2)
    losses = [2.0 + 0.1 * math.sin(step) for step in range(80)]
    complete = Run(rate)
    expected = [complete.update(loss) for loss in losses]
    assert len(set(expected)) > 4
    for split in (0, 2, 10, 31):  # in the warm-up, within a window, after a halving
        first = Run(rate)
        for loss in losses[:split]:
            first.update(loss)
        state = json.loads(json.dumps(first.scheduler.state_dict()))  # plain numbers
        second = Run(rate)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.scheduler.load_state_dict(state)
        assert [second.update(loss) for loss in losses[split:]] == expected[split:]
