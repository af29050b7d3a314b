"""Loggers by name: what recipes may write, and what they are given."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from dalle_zoo.training.loggers import KINDS, completed, listed, log_image, rewind, start
from dalle_zoo.training.trackio_logger import TrackioLogger

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


def test_settings_are_sent_once_except_where_a_start_replaces_them() -> None:
    sent: list[tuple[str, int]] = []

    def service(name: str) -> Any:
        return SimpleNamespace(log_hyperparams=lambda given: sent.append((name, given["seed"])), version=f"{name}-id")

    names = ["tensorboard", "wandb", "trackio", "their.Logger"]
    loggers = [service(name) for name in names]
    first = start(listed(names), loggers, {}, {"seed": 3})
    assert first == {"tensorboard": "", "wandb": "wandb-id", "trackio": "trackio-id", "Logger": ""}
    assert sent == [(name, 3) for name in names]
    sent.clear()
    assert start(listed(names), loggers, first, {"seed": 4}) == first
    assert sent == [("trackio", 4)]
    sent.clear()
    start(listed(names), loggers, {"wandb": "wandb-id"}, {"seed": 5})
    assert [name for name, _ in sent] == ["tensorboard", "trackio", "their.Logger"], "loggers that were added later"


def test_trackio_gets_one_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(project: str, **options: Any) -> Any:
        calls.append((project, options["name"], options["resume"], options["config"], options["space_id"]))
        return SimpleNamespace(log=lambda values, step: calls.append((values, step)))

    fake = SimpleNamespace(init=init, finish=lambda: calls.append("finish"), Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr("dalle_zoo.training.loggers.find_spec", lambda package: True)
    (spec,) = completed(listed("trackio"), tmp_path, {})
    assert spec["class_path"] == "dalle_zoo.training.trackio_logger.TrackioLogger"
    name = spec["init_args"]["name"]
    assert name.startswith(f"{tmp_path.name}-")
    assert completed(listed("TrackioLogger"), tmp_path, {"trackio": name}) == [spec], "a resumed run has the name"
    logger = TrackioLogger(**spec["init_args"])
    assert (logger.name, logger.version) == ("dalle-zoo", name)
    logger.finalize("failed")
    assert calls == [], "nothing begins before the first row"
    logger.log_hyperparams({"seed": 3})
    logger.log_metrics({"loss": 0.5}, step=4)
    log_image(logger, "samples", Image.new("RGB", (4, 2)), 4)
    logger.finalize("success")
    expected = [("dalle-zoo", name, "allow", {"seed": 3}, None), ({"loss": 0.5}, 4), ({"samples": (4, 2)}, 4)]
    assert calls == [*expected, "finish"]


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
def test_tensorboard_of_two_starts_is_one_folder_without_rows_that_are_made_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="of the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (spec,) = completed(listed("tensorboard"), tmp_path, {})
    for begin, end in ((0, 5), (3, 6)):  # killed after step 4, resumed at step 3
        logger = TensorBoardLogger(**spec["init_args"])
        rewind(logger, begin)
        for step in range(begin, end):
            logger.log_metrics({"loss": begin + step / 10}, step)
        logger.finalize("success")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [(event.step, pytest.approx(event.value)) for event in found.Scalars("loss")]
    assert rows == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 3.3), (4, 3.4), (5, 3.5)]
