from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.saving import Checkpoint


class Weight(nn.Module):
    """One weight, with the attributes of a trainer that averaging reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.02, dtype=dtype))
        self.trainer = SimpleNamespace(strategy=SimpleNamespace(model=self))


def average(dtype: torch.dtype, updates: int, first: int = 1, **options: Any) -> tuple[WeightEMA, Any]:
    module, ema = cast(Any, Weight(dtype)), WeightEMA(**options)
    for update in range(first, first + updates):
        module.trainer.global_step = update
        ema.on_train_batch_end(module.trainer, module, None, None, update)
        with torch.no_grad():
            module.weight.fill_(0.03)
    return ema, module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_steps_are_not_lost_to_rounding(dtype: torch.dtype) -> None:
    ema, module = average(dtype, 3001, first=100_000, decay=0.999)  # long after the warm-up of the decay
    assert ema.average is not None
    expected = 0.03 + (0.02 - 0.03) * 0.999**3000
    assert ema.average[0].tolist() == pytest.approx([expected] * 3, rel=5e-3)
    ema.copy_to(module)
    assert module.weight.dtype == dtype
    assert module.weight[0].item() == pytest.approx(expected, rel=1e-2)


def test_average_of_short_run_excludes_initial_weights() -> None:
    ema, _ = average(torch.float32, 20, decay=0.999)
    assert ema.average is not None
    assert float(ema.average[0][0]) == pytest.approx(0.03, abs=1e-6)  # with 0.999 from the start: 0.0202
    assert [ema.decay_at(step) for step in (0, 10, 10**6)] == [1 / 10, 11 / 20, 0.999]


def test_average_is_updated_at_configured_steps() -> None:
    ema, _ = average(torch.float32, 12, decay=0.5, every=5, start=5)
    assert ema.average is not None
    assert float(ema.average[0][0]) == pytest.approx(0.03)  # taken at step 10, when the weight was 0.03
    assert ema.state_dict() == {"averaged_at": 10}
    assert average(torch.float32, 4, every=5)[0].average is None


def test_weights_are_restored_after_an_error() -> None:
    ema, module = average(torch.float32, 2, decay=0.5)
    own = module.weight.detach().clone()

    def fail() -> None:
        with ema.applied(module):
            assert not torch.equal(module.weight, own)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(module.weight, own)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}, {"start": -1}])
def test_options_out_of_range_raise(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        WeightEMA(**options)


def test_average_dominated_by_initial_weights_warns(caplog: pytest.LogCaptureFixture) -> None:
    for updates, told in ((2, True), (20, False)):
        ema, module = average(torch.float32, updates, decay=0.999)
        module.trainer.is_global_zero = True
        caplog.clear()
        ema.on_train_end(module.trainer, module)
        assert ("still consist to 25 % of the first ones" in caplog.text) is told
    for decay in (0.5, 0.999):
        ema, _ = average(torch.float32, 5, decay=decay)
        assert ema.average is not None
        share = (float(ema.average[0][0]) - 0.03) / (0.02 - 0.03)
        assert share == pytest.approx(ema.share_of_start(5), abs=1e-5)
    late = WeightEMA(decay=0.9, every=5, start=12)
    assert [late.share_of_start(step) for step in (15, 19, 20)] == [1, 1, late.decay_at(1)]


def test_partially_removed_checkpoints_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in (".00000003.ckpt.writing/0123", ".00000004.ckpt.writing/4567", "00000005.ckpt"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "state.pt").touch()
    checkpoint = Checkpoint()
    checkpoint.folder = tmp_path
    checkpoint.on_train_start(cast(Any, SimpleNamespace(is_global_zero=True, loggers=[])), cast(Any, None))
    assert [path.name for path in tmp_path.iterdir()] == ["00000005.ckpt"]
