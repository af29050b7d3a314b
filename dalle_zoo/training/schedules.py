"""Schedules of the step, and the learning-rate scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dalle_zoo.registry import Registry, suggest


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` over ``steps`` steps, constant afterwards.

    ``v(t) = end + (start - end) * (1 + cos(pi * min(t, steps) / steps)) / 2``, used for the KL weight, the
    relaxation temperature and the step size of the dVAE (appendix A.2).

    Example:
        >>> beta = Cosine(start=0.0, end=6.6, steps=5000)
        >>> beta(0), round(beta(2500), 6), beta(9000)
        (0.0, 3.3, 6.6)
    """

    start: float
    """Value at step 0."""
    end: float
    """Value from step ``steps`` onwards."""
    steps: int
    """Length of the schedule, steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """Value at step ``step`` (from 0)."""
        phase = math.pi * min(step, self.steps) / self.steps
        return self.end + (self.start - self.end) * (1 + math.cos(phase)) / 2


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up to ``peak``, then a decay.

    The defaults are those of the prior (appendix B.2): after the warm-up, the rate is halved whenever the training
    loss plateaus, at most five times, to 1/32 of the peak.

    Example:
        >>> LearningRate(peak=1e-3, warmup_steps=100, decay="cosine", decay_steps=900).decay
        'cosine'
    """

    peak: float = 4.5e-4
    """Rate after the warm-up."""
    warmup_steps: int = 5000
    """Steps of linear warm-up; with 0, training starts at the peak."""
    decay: str = "plateau"
    """Decay after the warm-up, a name in `DECAYS`: "plateau", "cosine" or "constant"."""
    final: float = 0.0
    """Rate at the end of the cosine decay."""
    decay_steps: int = 1
    """Steps of the cosine decay, after the warm-up."""
    plateau_window: int = 1000
    """Steps per window; the mean training losses of windows are compared."""
    plateau_patience: int = 5
    """Windows without improvement before the rate is halved."""
    plateau_threshold: float = 1e-3
    """Smallest relative improvement of a window that counts."""
    max_halvings: int = 5
    """Maximum number of halvings (5 in the paper)."""

    def __post_init__(self) -> None:
        if self.peak <= 0 or self.final < 0:
            raise ValueError(f"peak must be above 0 and final at least 0, got {self.peak} and {self.final}")
        if self.decay not in DECAYS:
            raise ValueError(suggest("decay", self.decay, DECAYS))
        for name in ("decay_steps", "plateau_window", "plateau_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "max_halvings"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def at(self, step: int, halvings: int = 0) -> float:
        """Rate in step ``step`` (from 0) after a number of halvings. ``halvings`` defaults to 0.

        Example:
            >>> rate = LearningRate(peak=1e-3, warmup_steps=100, decay="cosine", decay_steps=900)
            >>> [round(rate.at(step), 6) for step in (0, 99, 550, 1000)]
            [1e-05, 0.001, 0.0005, 0.0]
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return DECAYS[self.decay](self, step - self.warmup_steps, halvings)


Decay = Callable[[LearningRate, int, int], float]
"""Rate from settings, steps after the warm-up, and number of halvings."""
DECAYS: Registry[Decay] = Registry("decay of the learning rate", group="dalle_zoo.decays")
"""Decays after the warm-up."""


@DECAYS.register("plateau")
def plateau(rate: LearningRate, step: int, halvings: int) -> float:
    """Halved whenever the training loss plateaus, as for the paper's prior."""
    return rate.peak * 0.5**halvings


@DECAYS.register("cosine")
def cosine(rate: LearningRate, step: int, halvings: int) -> float:
    """Half a cosine from `peak` to `final` over `decay_steps`, as for the paper's dVAE."""
    return Cosine(start=rate.peak, end=rate.final, steps=rate.decay_steps)(step)


@DECAYS.register("constant")
def constant(rate: LearningRate, step: int, halvings: int) -> float:
    """Constant at `peak`."""
    return rate.peak


class LearningRateScheduler(LRScheduler):
    """Applies a `LearningRate`; `observe` passes training losses to the plateau rule.

    Its state consists of plain numbers, so that a resumed run continues exactly.
    """

    def __init__(self, optimizer: Optimizer, rate: LearningRate) -> None:
        self.rate = rate
        self.halvings = 0
        self.best = math.inf
        self.windows_without_improvement = 0
        self.loss_sum = 0.0
        self.loss_count = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        """Rate of the next step, one per parameter group: times its ``lr_ratio`` where it has one."""
        rate = self.rate.at(self.last_epoch, self.halvings)
        return [rate * group.get("lr_ratio", 1.0) for group in self.optimizer.param_groups]

    def window_mean(self, loss: float) -> float | None:
        """Adds a loss, unless it is not finite, and returns the mean of the window once it is full, else None."""
        if not math.isfinite(loss):  # the step is skipped; one such loss would make every later mean infinite or NaN
            return None
        if self.rate.decay != "plateau" or self.last_epoch < self.rate.warmup_steps:
            return None
        self.loss_sum += loss
        self.loss_count += 1
        if self.loss_count < self.rate.plateau_window:
            return None
        mean = self.loss_sum / self.loss_count
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def observe(self, mean: float) -> bool:
        """Compares the mean loss of a window with the best one, and returns whether the rate was halved."""
        if mean < self.best - abs(self.best) * self.rate.plateau_threshold or self.best == math.inf:
            self.best, self.windows_without_improvement = mean, 0
            return False
        self.windows_without_improvement += 1
        if self.windows_without_improvement < self.rate.plateau_patience:
            return False
        self.windows_without_improvement = 0
        if self.halvings >= self.rate.max_halvings:
            return False
        self.halvings += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """State without the optimizer and the settings, which come from the recipe."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, int | float)}
