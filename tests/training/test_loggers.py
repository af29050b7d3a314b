"""Loggers by name: what recipes may write, and what they are given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from dalle_zoo.training.loggers import KINDS, completed, listed, log_image

PATH = "lightning.pytorch.loggers"


@pytest.mark.parametrize("value", ["wandb", "WandbLogger", {"class_path": "wandb"}, ["wandb"], f"{PATH}.WandbLogger"])
def test_a_logger_is_named_in_any_form(value: Any) -> None:
    assert listed(value) == [{"class_path": f"{PATH}.WandbLogger", "init_args": {}}]


def test_none_and_true_are_the_csv_file_alone() -> None:
    assert listed(None) == listed(True) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (False, "trainer.logger cannot be False: a run always writes its curves"),
        ("wandbb", "unknown logger 'wandbb'. Did you mean 'wandb'"),
        ([3], "trainer.logger must name loggers, got 3"),
    ],
)
def test_what_names_no_logger_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(value)


def test_what_is_given_wins_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo.training.loggers.find_spec", lambda package: True)
    entry = {"class_path": "wandb", "init_args": {"offline": False, "project": "mine"}}
    first, second, external = completed(listed([entry, "wandb", "their.Logger"]), tmp_path, {"wandb": "old"})
    assert first["init_args"] == {
        "save_dir": str(tmp_path), "project": "mine", "name": tmp_path.name, "offline": False, "resume": "allow",
        "id": "old",
    }  # fmt: skip
    assert second["init_args"]["offline"] is True
    assert second["init_args"]["id"] != "old", "a second logger of a kind has a run of its own"
    assert external == {"class_path": "their.Logger", "init_args": {}}


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo.training.loggers.find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"pip install 'dalle-zoo\[{name}\]'"):
        completed(listed(name), tmp_path, {})


def test_images_reach_every_kind_of_logger() -> None:
    image, sent = Image.new("RGB", (4, 2)), []
    wandb = SimpleNamespace(log_image=lambda key, images, step: sent.append((key, images[0].size, step)))
    board = SimpleNamespace(add_image=lambda name, array, step, dataformats: sent.append((name, array.shape, step)))
    mlflow = SimpleNamespace(log_image=lambda run, image, key, step: sent.append((run, key, step)))
    for logger in (
        wandb,
        SimpleNamespace(experiment=board),
        SimpleNamespace(experiment=mlflow, run_id="r"),
        SimpleNamespace(experiment=None),
        SimpleNamespace(),
    ):
        log_image(logger, "samples", image, 7)  # type: ignore[arg-type]
    assert sent == [("samples", (4, 2), 7), ("samples", (2, 4, 3), 7), ("r", "samples", 7)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard itself
def test_tensorboard_of_two_starts_is_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="of the extra tensorboard")
    (spec,) = completed(listed("tensorboard"), tmp_path, {})
    for step in (1, 2):
        logger = TensorBoardLogger(**spec["init_args"])
        logger.log_metrics({"loss": 0.5}, step)
        logger.finalize("success")
    files = [path.name for path in (tmp_path / "tensorboard").iterdir()]
    assert len([name for name in files if name.startswith("events.")]) == 2
