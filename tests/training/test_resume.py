"""Runs that end early, are killed next to a validation, or find other data go on as promised, or say why not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.main import main
from dalle_zoo.cli.runs import read_curves
from dalle_zoo.cli.trainer_options import REFUSED, check_trainer
from dalle_zoo.training import StageModule
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.saving import TERMINATED, Checkpoint

STEPS = 6
SIZE = {"image_size": 16, "width": 4, "num_groups": 3, "blocks_per_group": 1, "decoder_stem": 4, "codebook_size": 8}
RATE = {"peak": 2.0e-2, "warmup_steps": 2, "decay": "cosine", "decay_steps": 4}


@pytest.fixture(scope="module")
def recipe(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dVAE on five batches per epoch, which validates and saves after every second step."""
    path = tmp_path_factory.mktemp("recipe") / "short.yaml"
    schedules = {name: {"start": 1.0, "end": 0.5, "steps": STEPS} for name in ("kl_weight", "temperature")}
    trainer = {"accelerator": "cpu", "max_steps": STEPS, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer |= {"limit_val_batches": 1, "log_every_n_steps": 1, "enable_progress_bar": False}
    data = {"train": str(shards), "val": str(shards), "image_size": 16, "transform": "dvae", "batch_size": 4}
    keys = {
        "model": {"class_path": "DVAEModule", "init_args": {"config": SIZE, "learning_rate": RATE, **schedules}},
        "data": {"class_path": "ImageDataModule", "init_args": data},
        "trainer": trainer,
        "checkpoint": {"every": 2},
    }
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.fixture
def fit(recipe: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs ``dalle-zoo fit`` with options in the folder "run"."""

    def run(*options: str, run: str = "run") -> int:
        return main(["fit", str(recipe), "--run", str(tmp_path / run), *options])

    return run


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert main(["fit", str(recipe), "--run", str(run)]) == 0
    return run


def weights(run: Path) -> bytes:
    return (run / "model" / "dvae" / "model.safetensors").read_bytes()


def checkpoints(run: Path) -> list[int]:
    return [int(path.stem) for path in list_checkpoints(run / "checkpoints")]


def images(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "images").iterdir()}


class Killed(BaseException):
    """Stands for a kill: no handler of exceptions catches it."""


@pytest.mark.parametrize(("hook", "newest"), [("on_validation_start", 2), ("on_train_batch_start", 4)])
def test_kill_near_validation_loses_nothing(
    hook: str, newest: int, fit: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: StageModule, *args: Any) -> None:
        if self.global_step == 4 and self.trainer.state.fn == TrainerFn.FITTING:
            raise Killed

    monkeypatch.setattr(DVAEModule, hook, die)
    with pytest.raises(Killed):
        fit()
    monkeypatch.undo()
    run = tmp_path / "run"
    assert checkpoints(run)[-1] == newest, "a checkpoint is saved after the validation of its step"
    assert fit() == 0
    assert weights(run) == weights(alone)
    assert read_curves(run) == read_curves(alone)
    assert images(run) == images(alone)


def test_sigterm_saves_checkpoint_and_exits_with_error(
    fit: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminated(self: DVAEModule, *args: Any) -> None:
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DVAEModule, "on_train_batch_start", terminated)
    with pytest.raises(SystemExit) as ended:
        fit()
    monkeypatch.undo()
    assert ended.value.code == TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "ended by SIGTERM" in caplog.text
    assert checkpoints(tmp_path / "run") == [2, 3]
    assert not (tmp_path / "run" / "model").exists()
    assert fit() == 0
    assert weights(tmp_path / "run") == weights(alone)


def test_run_ended_by_early_stopping_is_not_resumed(fit: Any, tmp_path: Path) -> None:
    early = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    early += ["--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "100"]
    assert fit(*early) == 0
    ended, first = checkpoints(tmp_path / "run"), weights(tmp_path / "run")
    assert ended[-1] < STEPS
    assert fit(*early) == 0
    assert (checkpoints(tmp_path / "run"), weights(tmp_path / "run")) == (ended, first)


def test_limited_epoch_is_resumed_at_its_end(fit: Any, tmp_path: Path) -> None:
    limited = ["--trainer.limit_train_batches", "2", "--trainer.max_steps"]
    for steps in ("2", "6"):
        assert fit(*limited, steps) == 0
    assert fit(*limited, "6", run="alone") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")


def test_overfitting_repeats_its_batches(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    step = DVAEModule.training_step

    def spy(self: DVAEModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        keys.append((batch["key"], float(batch["image"].sum())))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DVAEModule, "training_step", spy)
    assert fit("--trainer.overfit_batches", "2", "--trainer.max_steps", "4") == 0
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]


def test_changed_data_raise(recipe: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(shards, tmp_path / "data"))
    arguments = ["fit", str(recipe), "--data.train", str(own), "--run", str(tmp_path / "run"), "--trainer.max_steps"]
    assert main([*arguments, "1"]) == 0
    with (own / "00000.tar").open("ab") as file:
        file.write(bytes(512))
    assert main([*arguments, "2"]) == 2
    assert "data.train changed since the checkpoint was saved" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == [1]


def test_checkpoint_of_earlier_version_is_resumed(
    fit: Any, alone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / "checkpoints" / "00000006.ckpt").unlink()
    path = run / "checkpoints" / "00000004.ckpt"
    old = torch.load(path, weights_only=True)
    del old["fingerprints"]
    for name in ("Checkpoint", "FiniteGuard"):
        del old["callbacks"][name]
    (loader,) = old["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    del loader["positions"]
    torch.save(old, path)
    shutil.rmtree(run / "model")
    assert fit() == 0
    assert weights(run) == weights(alone)
    assert "has no fingerprints" in caplog.text
    assert "does not state how far the data were read" in caplog.text


# ------------------------------------------------------------ without a run


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_raise(name: str) -> None:
    harmless = {option: values[0] for option, (values, _) in REFUSED.items()}
    check_trainer(SimpleNamespace(**harmless))
    check_trainer(SimpleNamespace())
    with pytest.raises(UserError, match=rf"trainer.{name} cannot be 7: "):
        check_trainer(SimpleNamespace(**harmless | {name: 7}))


def stopped_state(*callbacks: Any) -> bool:
    """Whether a checkpoint marks the run as ended by a callback."""
    callback, trainer = Checkpoint(), SimpleNamespace(callbacks=callbacks)
    callback._stopping = True
    checkpoint: dict[str, Any] = {"callbacks": {callback.state_key: callback.state_dict()}}
    module: Any = None
    callback.on_save_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
    return bool(checkpoint["callbacks"][callback.state_key]["stopped"])


def test_time_limit_can_be_extended() -> None:
    assert stopped_state()
    assert stopped_state(Timer(timedelta(seconds=60)))
    assert not stopped_state(Timer(timedelta(0)))


def test_early_stopping_decides_after_validations() -> None:
    callback, module = Checkpoint(), torch.nn.Module()
    early = EarlyStopping("val/loss")
    trainer: Any = SimpleNamespace(callbacks=[early])
    callback.setup(trainer, module, "fit")  # type: ignore[arg-type]
    assert early._check_on_train_epoch_end is False
    trainer.callbacks = [EarlyStopping("val/loss", check_on_train_epoch_end=True)]
    with pytest.raises(ValueError, match="leave check_on_train_epoch_end out"):
        callback.setup(trainer, module, "fit")  # type: ignore[arg-type]
