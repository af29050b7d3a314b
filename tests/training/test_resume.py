"""Runs that end early, are killed next to a validation, or find other data go on as promised, or say why not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.main import main
from dalle_zoo.cli.run_folder import read_record, read_run
from dalle_zoo.cli.runs import read_curves
from dalle_zoo.cli.trainer_options import REFUSED, check_trainer
from dalle_zoo.training import StageModule
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.integrity import list_checkpoints
from dalle_zoo.training.saving import TERMINATED, Checkpoint
from dalle_zoo.version import __version__

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


def curves(run: Path) -> dict[str, dict[int, float]]:
    """All curves but those that measure the machine."""
    return {k: points for k, points in read_curves(run).items() if not k.startswith(("speed/", "memory/"))}


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
    assert curves(run) == curves(alone)
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


# ------------------------------------------------------------ loggers


class FakeService(Logger):
    """Stands for a logger of a remote service: the run that it writes to, and what it is sent."""

    sent: ClassVar[dict[str, list[str]]] = {}
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.made.append(arguments)

    @property
    def version(self) -> str:
        """Id of the run; reading it creates one, as with MLflow."""
        wanted = self.arguments.get("id") or self.arguments.get("run_id") or f"chosen-{len(self.sent)}"
        self.sent.setdefault(wanted, [])
        self.arguments["run_id"] = wanted
        return str(wanted)

    run_id = version

    @property
    def name(self) -> str:
        return "fake"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.sent[self.version].append("settings")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.sent[self.version] += sorted(set(metrics) & {"train/loss"})

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.sent[self.version].append(f"{key} {step}")


class FakeWandb(FakeService):
    def __init__(
        self,
        name: str = "",
        save_dir: str = ".",
        project: str = "",
        offline: bool = False,
        resume: str | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(name=name, save_dir=save_dir, project=project, offline=offline, resume=resume, id=id)


class FakeMLflow(FakeService):
    def __init__(
        self,
        experiment_name: str = "",
        run_name: str = "",
        tracking_uri: str = "",
        artifact_location: str = "",
        run_id: str | None = None,
    ) -> None:
        super().__init__(tracking_uri=tracking_uri, run_name=run_name, run_id=run_id)


def test_a_killed_run_continues_its_remote_runs_with_the_same_bits(
    fit: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", FakeWandb)
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", FakeMLflow)
    monkeypatch.setattr("dalle_zoo.training.loggers.find_spec", lambda package: True)
    FakeService.sent.clear()
    FakeService.made.clear()

    def die(self: StageModule, *args: Any) -> None:
        if self.global_step == 4 and self.trainer.state.fn == TrainerFn.FITTING:
            raise Killed

    loggers = ["--trainer.logger", "[wandb, mlflow]"]
    with monkeypatch.context() as killing:
        killing.setattr(DVAEModule, "on_train_batch_start", die)
        with pytest.raises(Killed):
            fit(*loggers)
    run = tmp_path / "run"
    begun = read_record(run)
    assert fit(*loggers) == 0
    assert weights(run) == weights(alone)
    assert curves(run) == curves(alone)
    assert images(run) == images(alone)
    ids = begun["loggers"]
    assert set(ids) == {"wandb", "mlflow"}
    assert set(FakeService.sent) == set(ids.values()), "no third run"
    for sent in FakeService.sent.values():
        assert sent.count("settings") == 1
        assert sent.count("train/loss") == STEPS
        assert [line for line in sent if line.startswith("reconstructions")] == [
            f"reconstructions {step - 1}" for step in (2, 4, 6)
        ]
    assert [made.get("id") for made in FakeService.made[::2]] == [ids["wandb"]] * 2
    for wandb, mlflow in zip(FakeService.made[::2], FakeService.made[1::2], strict=True):
        assert (wandb["offline"], wandb["save_dir"], wandb["resume"]) == (True, str(run), "allow")
        assert mlflow["tracking_uri"] == f"sqlite:///{run}/mlflow.db"
    config = read_run(run)
    assert config is not None
    assert [entry["init_args"] for entry in config["trainer"]["logger"]] == [{}, {}], "folders and ids are this run's"


def test_the_record_has_every_start(fit: Any, alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    assert fit("--trainer.max_steps", "7") == 0
    record = read_record(run)
    assert record["length"] == STEPS, "shares of the run keep referring to its first length"
    first, second = record["starts"]
    assert first["fingerprints"] == second["fingerprints"]
    assert {"data.train", "data.val"} <= first["fingerprints"].keys()
    assert first["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert first["code"].startswith(__version__)
    assert first["processes"] == 1


def test_a_share_of_a_run_stays_that_of_its_first_length(fit: Any, tmp_path: Path) -> None:
    shares = ["--model.learning_rate.decay_steps", "50%", "--trainer.max_steps"]
    assert fit(*shares, "4") == 0
    assert fit(*shares, "6") == 0, "not another recipe"
    config = read_run(tmp_path / "run")
    assert config is not None
    assert config["model"]["init_args"]["learning_rate"]["decay_steps"] == 2
