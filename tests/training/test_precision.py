"""Precisions by name, and training under 16-resblock: in one process, in two, interrupted, and with overflows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from dalle_zoo.cli.main import main
from dalle_zoo.cli.runs import read_curves
from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.models.gradient_scaling import GradientScalingConfig
from dalle_zoo.models.residual import plain
from dalle_zoo.plots import GRADIENT_SCALES
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.precision import ResblockPrecision, make_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # Lightning calls a deprecated function of PyTorch.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("precision_processes.py")
CONSTANT = GradientScalingConfig(growth=1.0)
"""Scales are powers of two, so scaling is exact."""
FLOAT32_NOISE = 1e-6
"""Relative tolerance for sums in another order."""
FLOAT16_ERROR = 3e-3
"""Relative error of gradients through some dozen roundings to 11 significant bits."""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("precision_processes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load_script()


class Meddler(Callback):
    """Sets an extreme scale of a block for one step, so that its gradients overflow."""

    def __init__(self, update: int, block: int) -> None:
        self.update, self.block = update, block
        self.before: list[float] = []
        self.after: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.update:
            values = scales_of(trainer)
            self.before = values.tolist()
            values[self.block] = 2.0**40

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.update + 1:
            values = scales_of(trainer)
            self.after = values.tolist()
            values[self.block] = self.before[self.block]


def scales_of(trainer: Trainer) -> Tensor:
    assert isinstance(trainer.precision_plugin, ResblockPrecision)
    assert trainer.precision_plugin.scales is not None
    return trainer.precision_plugin.scales.values


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.net.named_parameters()}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_names_of_precisions_without_shards_and_with_fsdp2(kind: Any, device: str) -> None:
    assert type(make_precision("32-true", device, kind)) is Precision
    mixed, half = make_precision("bf16-mixed", device, kind), make_precision("bf16-true", device, kind)
    assert isinstance(mixed, MixedPrecision)
    assert (mixed.device, mixed.scaler) == (device, None)
    assert isinstance(half, HalfPrecision)
    resblock = make_precision("16-resblock", device, kind)
    assert isinstance(resblock, ResblockPrecision)
    assert resblock.carrier == ("emulated" if device == "cpu" else "float16")
    assert resblock.config == GradientScalingConfig()
    names = [p.precision for p in (mixed, half, resblock)]
    assert names == ["bf16-mixed", "bf16-true", "16-resblock"]


@pytest.mark.parametrize(
    ("name", "gathered"), [("32-true", None), ("bf16-mixed", torch.bfloat16), ("bf16-true", None)]
)
def test_names_of_precisions_with_fsdp1(name: str, gathered: torch.dtype | None) -> None:
    precision = make_precision(name, "cpu", "fsdp")
    assert isinstance(precision, FSDPPrecision)
    assert precision.precision == name
    root, unit = precision.mixed_precision_config, precision.unit_config  # type: ignore[attr-defined]
    assert (root.param_dtype, root.reduce_dtype) == (None, torch.float32)
    assert (unit.param_dtype, unit.reduce_dtype) == (gathered, torch.float32)


def test_fsdp2_gathers_branches_in_float16_and_averages_in_float32() -> None:
    policy = ResblockPrecision().unit_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.float16, torch.float32)
    assert ResblockPrecision("emulated").unit_policy.param_dtype is None


def test_lightning_precisions_are_accepted() -> None:
    """Lightning would reject the name 16-mixed for this strategy, and use bfloat16 on the CPU."""
    precision = ResblockPrecision("emulated")
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, plugins=[precision], logger=False)
    assert trainer.precision_plugin is precision


@pytest.mark.parametrize(
    ("name", "device", "kind", "message"),
    [
        ("16-resblok", "cpu", "plain", "Did you mean '16-resblock'?"),
        ("16-mixed", "cpu", "plain", "16-mixed needs a GPU: on the CPU use bf16-mixed, or 16-resblock"),
        ("16-mixed", "cpu", "fsdp", "16-mixed needs a GPU"),
        ("16-resblock", "cuda", "fsdp", "use fsdp2, or 32-true, bf16-mixed"),
    ],
)
def test_wrong_names_raise(name: str, device: str, kind: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        make_precision(name, device, kind)
    assert message in str(caught.value)


def test_network_without_residual_blocks_raises() -> None:
    module = DVAEModule(DVAEConfig(image_size=16, width=4, num_groups=3, blocks_per_group=1, codebook_size=8))
    with pytest.raises(ValueError, match=r"such as the prior; DVAE has no residual_blocks\(\): use 16-mixed or bf16"):
        ResblockPrecision().convert_module(module)


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_float32_without_over_or_underflow(recompute: bool) -> None:
    """Equal in every bit, also with clipping, which therefore works on unscaled gradients."""
    _, exact, module = runs.train(Precision())
    precision = ResblockPrecision("float32", CONSTANT)
    _, recorder, scaled = runs.train(precision, module=runs.make_module(recompute))
    assert recorder.losses == exact.losses
    assert len(recorder.losses) == runs.STEPS
    assert runs.equal(weights(scaled), weights(module))
    assert recorder.finite == [True] * runs.STEPS


def test_gradients_are_accumulated_before_they_are_unscaled() -> None:
    _, exact, module = runs.train(Precision(), accumulate_grad_batches=2)
    _, recorder, scaled = runs.train(ResblockPrecision("float32", CONSTANT), accumulate_grad_batches=2)
    assert len(recorder.finite) == runs.STEPS
    assert recorder.losses == exact.losses
    assert runs.equal(weights(scaled), weights(module))


@pytest.mark.parametrize("carrier", ["float16", "emulated"])
def test_float16_training_matches_float32(carrier: Any) -> None:
    _, exact, _ = runs.train(Precision())
    precision = ResblockPrecision(carrier)
    _, recorder, _ = runs.train(precision)
    assert recorder.losses == pytest.approx(exact.losses, rel=1e-3)
    assert recorder.losses != exact.losses
    for name, gradient in exact.gradients.items():
        error = (recorder.gradients[name] - gradient).norm() / gradient.norm()
        assert error < FLOAT16_ERROR, name
    assert precision.num_skipped == 0
    assert precision.scales is not None
    assert precision.scales.values.tolist() == pytest.approx([8192 * 2 ** (runs.STEPS / 1000)] * 4, rel=1e-5)


def test_overflow_skips_step_and_changes_only_scale_of_its_block() -> None:
    precision, meddler = ResblockPrecision("emulated"), Meddler(update=2, block=1)
    _, recorder, _ = runs.train(precision, callbacks=(meddler,))
    assert recorder.finite == [True, True, False, True, True, True]
    unchanged = [runs.equal(a, b) for a, b in zip(recorder.before, recorder.before[1:], strict=False)]
    assert unchanged == [False, False, True, False, False]  # weights, moments and counts of steps, bit by bit
    grown = [pytest.approx(scale * 2 ** (1 / 1000), rel=1e-6) for scale in meddler.before]
    assert meddler.after == [grown[0], 2**24, *grown[2:]]  # 2^40, divided and clamped
    assert precision.scales is not None
    assert precision.scales.since_division.tolist() == [125 + 6, 3, 125 + 6, 125 + 6]
    assert precision.num_skipped == 1


def test_overflow_outside_blocks_skips_step_and_changes_no_scale() -> None:
    precision = ResblockPrecision("emulated")
    _, recorder, _ = runs.train(precision, spoil={1: "row_position.weight"})
    assert recorder.finite == [True, False, True, True, True, True]
    assert runs.equal(recorder.before[1], recorder.before[2])
    assert precision.num_skipped == 1
    assert precision.scales is not None
    assert min(precision.scales.values.tolist()) > 8192


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    """Includes scales and counters: one overflow precedes the checkpoint, one follows too soon to change a scale."""
    spoil = {1: runs.SPOILED, 4: runs.SPOILED, 5: "row_position.weight"}
    complete = ResblockPrecision("emulated")
    _, _, module = runs.train(complete, spoil=spoil)
    trainer, _, _ = runs.train(ResblockPrecision("emulated"), spoil=spoil, max_steps=3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    resumed = ResblockPrecision("emulated")
    _, _, again = runs.train(resumed, spoil=spoil, ckpt_path=tmp_path / "3.ckpt")
    assert runs.equal(weights(again), weights(module))
    assert complete.num_skipped == resumed.num_skipped == 3
    assert runs.equal(complete.state_dict()["scales"], resumed.state_dict()["scales"])
    assert complete.state_dict()["scales"]["since_division"].tolist()[2] == 4


def test_trainer_restores_network_and_retains_scales() -> None:
    precision = ResblockPrecision("emulated")
    trainer, _, module = runs.train(precision, spoil={1: runs.SPOILED}, limit_val_batches=None)
    assert {block.residual.around for block in module.net.residual_blocks()} == {plain}
    assert precision.scales is not None
    retained = precision.scales.values.tolist()
    loader = torch.utils.data.DataLoader(runs.Batches(), batch_size=None)
    found = trainer.validate(module, loader, verbose=False)
    assert precision.scales.values.tolist() == retained
    with torch.no_grad():
        losses = [float(module.net.loss(batch["text"], batch["codes"]).total) for batch in loader]
    mean = sum(losses) / len(losses)
    assert found[0]["val/loss"] == pytest.approx(mean, rel=1e-3)
    assert found[0]["val/loss"] != pytest.approx(mean, rel=3e-7)  # float16 was validated: a few roundings of float32


def test_scales_are_logged_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = CSVLogger(tmp_path, name="metrics", flush_logs_every_n_steps=1)
    precision = ResblockPrecision("emulated")
    runs.train(precision, spoil={1: runs.SPOILED}, logger=logger, log_every_n_steps=2)
    curves = read_curves(tmp_path)
    scales = {name: curve for name, curve in curves.items() if name.startswith(GRADIENT_SCALES)}
    names = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
    assert list(scales) == [f"{GRADIENT_SCALES}{name}" for name in names]
    assert precision.scales is not None
    last = precision.scales.values.log2().tolist()
    assert [list(curve) for curve in scales.values()] == [[1, 3, 5]] * 4
    assert [curve[5] for curve in scales.values()] == pytest.approx(last)
    assert curves["train/skipped_steps"] == {1: 1, 3: 1, 5: 1}
    assert set(curves["train/loss"]) == {1, 3, 5}  # the same steps as all else
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").is_file()
    assert str(tmp_path) in capsys.readouterr().out


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Results of all processes of all cases."""
    folder = tmp_path_factory.mktemp("precision")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{name} ?.pt"))]
        for name in runs.CASES
    }


Found = dict[str, list[dict[str, Any]]]


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "fsdp2 recomputed"])
def test_two_processes_have_gradients_of_one(processes: Found, case: str) -> None:
    (one,) = processes["one"]
    assert len(processes[case]) == 2
    for found in processes[case]:
        assert distance(found["gradients"], one["gradients"]) < FLOAT32_NOISE
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert runs.equal(found["state"]["scales"], one["state"]["scales"])


@pytest.mark.parametrize("case", ["ddp float16", "fsdp2 float16"])
def test_two_processes_train_with_float16(processes: Found, case: str) -> None:
    (one,), (exact,) = processes["one float16"], processes["one"]
    for found in processes[case]:
        assert distance(found["gradients"], one["gradients"]) < FLOAT16_ERROR
        assert 1e-5 < distance(found["gradients"], exact["gradients"]) < FLOAT16_ERROR
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_recomputation_gathers_weights_once(processes: Found) -> None:
    """Once for the forward pass and once for the backward pass, which recomputes; the root unit once."""
    updates, units = runs.STEPS, 2 * runs.CONFIG.num_layers
    for case in ("fsdp2", "fsdp2 recomputed"):
        assert [found["gathers"] for found in processes[case]] == [updates * (2 * units + 1)] * 2


@pytest.mark.parametrize("case", ["one spoiled", "ddp spoiled", "fsdp2 spoiled", "ddp_powersgd spoiled"])
def test_overflow_in_one_process_skips_step_in_all(processes: Found, case: str) -> None:
    for found in processes[case]:
        assert found["finite"] == [True, True, False, True, True, True]
        assert found["unchanged"] == [False, False, True, False, False]
        assert found["state"]["num_skipped"] == 1
        assert found["state"]["scales"]["since_division"].tolist() == [131, 131, 3, 131]
        (one,) = processes["one spoiled"]
        assert runs.equal(found["state"]["scales"], one["state"]["scales"])


def test_resumed_sharded_run_equals_uninterrupted_run(processes: Found) -> None:
    for found, complete in zip(processes["fsdp2 resumed"], processes["fsdp2 spoiled"], strict=True):
        assert found["losses"] == complete["losses"][runs.EPOCH :]
        assert found["state"]["num_skipped"] == 1
        assert runs.equal(found["state"]["scales"], complete["state"]["scales"])


def test_sharded_run_with_single_loss_scale(processes: Found) -> None:
    """An overflow in the shard of one process skips the step in both."""
    for found in processes["fsdp2 16-mixed spoiled"]:
        assert found["unchanged"] == [False, False, True, False, False]
        assert found["losses"][:3] == pytest.approx(processes["one"][0]["losses"][:3], rel=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sharded_run_trains_in_bfloat16(processes: Found, strategy: str, precision: str) -> None:
    (one,), (exact,) = processes[f"one {precision}"], processes["one"]
    for found in processes[f"{strategy} {precision}"]:
        assert found["losses"][0] == pytest.approx(one["losses"][0], rel=1e-3)
        assert found["losses"] == pytest.approx(exact["losses"], rel=5e-3)
        assert found["losses"] != pytest.approx(exact["losses"], rel=1e-5)


def test_sharded_run_trains_in_float32(processes: Found) -> None:
    for found in processes["fsdp 32-true"]:
        assert found["losses"] == pytest.approx(processes["one"][0]["losses"], rel=1e-5)
