"""Speed, memory and operations that a run logs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.planning.hardware import find_gpu, recognize_gpu
from dalle_zoo.planning.prior import PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.training import telemetry
from dalle_zoo.training.strategies import FSDP1
from dalle_zoo.training.strategy_hooks import StrategyHooks
from dalle_zoo.training.telemetry import Telemetry

CONFIG = PriorConfig(
    text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=8, width=8, num_layers=1, num_heads=1,
    masks="row",
)  # fmt: skip


class Module:
    """Collects what is logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log_dict(self, metrics: dict[str, float], **options: Any) -> None:
        self.logged.append(metrics)


def stand_in(**changes: Any) -> Any:
    """Attributes of a trainer that the callback reads."""
    plain = {
        "global_step": 0, "world_size": 2, "train_dataloader": None, "precision_plugin": SimpleNamespace(),
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
        "_logger_connector": SimpleNamespace(should_update_logs=True),
    }  # fmt: skip
    return SimpleNamespace(**plain | changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now.time)
    return now


def train(callback: Telemetry, trainer: Any, module: Any, clock: SimpleNamespace, seconds: float) -> None:
    clock.time += seconds
    trainer.global_step += 1
    callback.on_train_batch_end(trainer, module, None, {"key": list("abc")}, 0)


def test_rates_are_those_of_all_processes_without_validations(clock: SimpleNamespace) -> None:
    module: Any = Module()
    callback, trainer, work = Telemetry(), stand_in(), PriorWorkload(CONFIG)
    callback.work = work
    callback.on_train_start(trainer, module)
    callback.on_validation_start(trainer, module)
    clock.time += 100
    callback.on_validation_end(trainer, module)
    trainer._logger_connector.should_update_logs = False
    train(callback, trainer, module, clock, 1.0)
    trainer._logger_connector.should_update_logs = True
    train(callback, trainer, module, clock, 2.0)
    (logged,) = module.logged
    assert logged["speed/steps_per_second"] == pytest.approx(2 / 3)
    assert logged["speed/images_per_second"] == pytest.approx(2 * 6 / 3)
    assert logged["speed/tokens_per_second"] == pytest.approx(8 * 4)
    assert logged["speed/tflops"] == pytest.approx(2 * work.flops.model / 1e12)
    assert logged["memory/gib"] > 0
    assert not {"speed/mfu", "plan/mfu", "train/loss_scale"} & logged.keys()
    train(callback, trainer, module, clock, 0.5)
    assert module.logged[1]["speed/steps_per_second"] == pytest.approx(2), "of the time since the last line"


def test_utilization_is_next_to_that_of_the_plan(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = find_gpu("a100-80gb")
    monkeypatch.setattr(telemetry, "recognize_gpu", lambda name, memory: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="", total_memory=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    module: Any = Module()
    scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    trainer = stand_in(
        strategy=SimpleNamespace(root_device=torch.device("cuda")), precision_plugin=SimpleNamespace(scaler=scaler)
    )
    callback = Telemetry()
    callback.work = PriorWorkload(CONFIG)
    callback.planned = Setup(devices=2, precision="bf16-mixed", batch=3)
    callback.on_train_start(trainer, module)
    train(callback, trainer, module, clock, 1e-6)
    (logged,) = module.logged
    flops = 3 * PriorWorkload(CONFIG).flops.model
    assert logged["speed/mfu"] == pytest.approx(flops / 1e-6 / (gpu.tflops["bfloat16"] * 1e12))
    assert 0 < logged["plan/mfu"] < 0.4
    assert logged["plan/tokens_per_second"] > 0
    assert (logged["memory/gib"], logged["train/loss_scale"]) == (2, 1024)


def test_disabled_telemetry_logs_nothing(clock: SimpleNamespace) -> None:
    module: Any = Module()
    callback, trainer = Telemetry(enabled=False), stand_in()
    callback.on_train_start(trainer, module)
    train(callback, trainer, module, clock, 1.0)
    assert module.logged == []


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.6, None),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16gb"),
        ("Tesla T4", 14.6, "t4-16gb"),
        ("NVIDIA A10", 22.1, "a10-24gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA L40", 44.4, None),
        ("NVIDIA H200", 139.8, "h200-141gb"),
    ],
)
def test_gpus_are_recognized_by_what_drivers_report(name: str, memory: float, known: str | None) -> None:
    found = recognize_gpu(name, memory)
    assert (found.name if found else None) == known


def test_gradient_norm_is_that_of_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 1)
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert StrategyHooks().gradient_norm(module) == 5
    # Each process holds a part: another one with the same norm.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda squares: squares.mul_(2))
    monkeypatch.setattr(FSDP1, "root_device", torch.device("cpu"))
    assert float(FSDP1().gradient_norm(module)) == pytest.approx(50**0.5)
