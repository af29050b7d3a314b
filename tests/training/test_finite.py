"""Numbers that are not finite end a run before they reach its weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn

from dalle_zoo.cli.main import main
from dalle_zoo.training.checkpoints import AtomicCheckpointIO
from dalle_zoo.training.finite import (
    MAX_SKIPPED,
    FiniteGuard,
    NonFiniteError,
    check_weights,
    first_not_finite,
    largest,
    max_skipped,
)
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.precision import ResblockPrecision


class Net(nn.Module):
    def __init__(self, gradient: float) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.first.grad, self.second.grad = torch.ones(2), torch.tensor([1.0, gradient])
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value


def step(guard: FiniteGuard, loss: float, gradient: float, precision: Any = None) -> Net:
    trainer: Any = SimpleNamespace(precision_plugin=precision or Precision(), world_size=1, global_step=6)
    net: Any = Net(gradient)
    guard.on_before_backward(trainer, net, torch.tensor(loss))
    optimizer: Any = None
    guard.on_before_optimizer_step(trainer, net, optimizer)
    return net


@pytest.mark.parametrize(
    ("loss", "gradient", "what"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.nan, "the gradient of 'second' is not finite"),
        (1.0, -math.inf, "the gradient of 'second' is not finite"),
    ],
)
def test_first_non_finite_step_is_reported(loss: float, gradient: float, what: str) -> None:
    guard = FiniteGuard()
    step(guard, 1e30, 1e30)
    with pytest.raises(NonFiniteError, match=f"stops in step 7: {what}"):
        step(guard, loss, gradient)


def test_float16_skips_steps_until_scales_are_exhausted() -> None:
    scaled = SimpleNamespace(scaler=object())
    guard = FiniteGuard()
    for number in range(MAX_SKIPPED):
        net = step(guard, 1.0, math.inf, scaled)
        assert net.logged == {"train/skipped_steps": number + 1}
    step(guard, 1.0, 1.0, scaled)
    for _ in range(MAX_SKIPPED):
        step(guard, math.nan, math.nan, scaled)
    with pytest.raises(NonFiniteError, match=f"the last of {MAX_SKIPPED + 1} that were skipped"):
        step(guard, math.nan, math.nan, scaled)
    assert guard.state_dict() == {"skipped": 2 * MAX_SKIPPED}
    assert max_skipped(Precision(), True) == 0
    # 17 divisions by two from the largest to the smallest scale, two steps of its square root each, 125 steps apart.
    assert (max_skipped(ResblockPrecision(), True), max_skipped(ResblockPrecision(), False)) == (34 * 125, 100)


def test_non_finite_values_are_found_anywhere() -> None:
    assert float(largest([torch.tensor([1.0, -3.0]), torch.zeros(0), torch.tensor(2.0, dtype=torch.bfloat16)])) == 3
    assert float(largest([])) == 0
    for wrong in (math.nan, math.inf, -math.inf):
        assert not largest([torch.ones(1000), torch.tensor([0.0, wrong, 1.0])]).isfinite()
    assert largest([torch.full((1000,), 3e38)]).isfinite(), "no sum that overflows"
    net: Any = Net(1.0)
    assert first_not_finite(net) is None
    net.second.data[1] = math.nan
    with pytest.raises(NonFiniteError, match="nothing is exported: the weights 'second' are not finite"):
        check_weights(net, "nothing is exported")


def test_diverged_run_ends_with_last_finite_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--model.learning_rate.peak", "1e8", "--checkpoint.every", "1", "--trainer.limit_val_batches", "0"]
    assert main(["fit", "dvae/tiny", *options, "--run", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dalle-zoo fit: training stops in step 2: ")
    (left,) = list_checkpoints(run / "checkpoints")
    weights = AtomicCheckpointIO().load_checkpoint(left)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (run / "model").exists()
