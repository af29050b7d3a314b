"""Callbacks: images, curves and checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image

from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.plots import CURVES
from dalle_zoo.sheets import LINE
from dalle_zoo.tokenizers import CaptionEncoder
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.base import StageModule
from dalle_zoo.training.callbacks import ImageLogger
from dalle_zoo.training.checkpoints import AtomicCheckpointIO
from dalle_zoo.training.curves import CurveLogger
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule, TextConfig
from dalle_zoo.training.dvae_module import DVAEModule
from dalle_zoo.training.samples import SAMPLE_SCORES, Samples
from dalle_zoo.training.saving import Checkpoint
from dalle_zoo.zoo import open_text_tokenizer


def stand_in(**changes: Any) -> Any:
    """Attributes of a trainer that the callback reads."""
    plain = {"sanity_checking": False, "is_global_zero": True, "global_step": 7, "loggers": [], "strategy": None}
    return SimpleNamespace(**plain | changes)


@pytest.fixture
def stage() -> DVAEModule:
    return DVAEModule(
        DVAEConfig(image_size=8, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=4)
    )


def log_images(callback: ImageLogger, trainer: Any, stage: DVAEModule, index: int = 0) -> None:
    batch = {"key": list("abc"), "epoch": 0, "image": torch.rand(3, 3, 8, 8)}
    callback.on_validation_batch_start(trainer, stage, batch, index)


def test_images_of_first_batch_are_logged(tmp_path: Path, stage: DVAEModule) -> None:
    callback, shown = ImageLogger(count=2), []
    callback.folder = tmp_path / "images"
    board = SimpleNamespace(experiment=SimpleNamespace(add_image=lambda *args, dataformats: shown.append(args)))
    plain = SimpleNamespace(experiment=SimpleNamespace())
    log_images(callback, stand_in(loggers=[plain, board]), stage)
    files = list(callback.folder.iterdir())
    assert [file.name for file in files] == ["reconstructions-00000000.png"]
    with Image.open(files[0]) as image:
        assert image.size == (2 + 2 * 10, 2 + 2 * 10)  # two images of three, two rows
    assert [(name, step) for name, _, step in shown] == [("reconstructions", 0)]


@pytest.mark.parametrize(
    ("enabled", "changes", "index"),
    [(False, {}, 0), (True, {"sanity_checking": True}, 0), (True, {"is_global_zero": False}, 0), (True, {}, 1)],
)
def test_disabled_image_logger_samples_nothing(
    enabled: bool, changes: dict[str, Any], index: int, tmp_path: Path, stage: DVAEModule
) -> None:
    callback = ImageLogger(enabled=enabled)
    callback.folder = tmp_path / "images"
    log_images(callback, stand_in(**changes), stage, index)
    assert not callback.folder.exists()


def test_curves_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    logger = CurveLogger(tmp_path)
    assert list(tmp_path.iterdir()) == []
    # A line is on disk as soon as it is logged, so a kill loses none before the checkpoint.
    logger.log_metrics({"loss": 0.5}, step=3)
    assert (tmp_path / CURVES).read_text().splitlines() == ["step,loss", "3,0.5"]


def test_resumed_run_continues_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CurveLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": torch.tensor(step / 4), "epoch": 0.0}, step=step)
    with (tmp_path / CURVES).open("a") as file:
        file.write("3,0,0.")  # killed in the middle of a row
    resumed = CurveLogger(tmp_path)
    resumed.rewind(2)
    resumed.log_metrics({"loss": 0.5, "epoch": 0}, step=2)
    resumed.log_metrics({"val/loss": 7, "epoch": 0}, step=2)  # a new column
    assert (tmp_path / CURVES).read_text().splitlines() == [
        "step,epoch,loss,val/loss", "0,0,0.0,", "1,0,0.25,", "2,0,0.5,", "2,0,,7.0",
    ]  # fmt: skip
    before = (tmp_path / CURVES).read_bytes()

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        resumed.log_metrics({"another": 1.0}, step=3)
    assert (tmp_path / CURVES).read_bytes() == before, "a new column replaces the file in one step"
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["metrics.csv"]


def test_checkpoint_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "new" / "00000003.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}

    def full(state: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        io.save_checkpoint({"step": 4}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [file.name for file in path.parent.glob("*.ckpt")] == [path.name]
    with pytest.raises(TypeError, match="storage_options must be None"):
        io.save_checkpoint({}, path, storage_options={})


def test_checkpoint_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        Checkpoint(every=0)


# ------------------------------------------------------------ titles, prompts, scores


def test_titles_are_above_their_images() -> None:
    images = torch.zeros(5, 3, 64, 64)
    titled = Samples((images, images), ["a", "b", "c", "d", "e"]).sheet()
    assert titled.size == (2 * 2 * (2 * 66 + 2), 3 * (2 * 68 + LINE)), "two captions next to each other"
    assert Samples((images, images)).sheet().size == (5 * 66 + 2, 2 * 66 + 2)


class Painter(StageModule):
    """Generates an image of one color for each caption."""

    stage = "painter"
    generates_from_captions = True

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.logged: dict[str, float] = {}
        self._restored_steps = 5
        self._fabric = None

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        self.logged[name] = value

    def sample_images(self, batch: dict[str, Any], network: Any = None) -> dict[str, Samples]:
        captions = batch["caption"]
        colors = torch.tensor([len(caption) / 10 for caption in captions])
        return {"samples": Samples((colors[:, None, None, None].expand(-1, 3, 16, 16),), captions)}


def test_fixed_prompts_and_scores(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorer(torch.nn.Module):
        def scores(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
            return images.mean((1, 2, 3)) * 10  # the length of its caption

    monkeypatch.setattr("dalle_zoo.training.callbacks.find_component", lambda *where: tmp_path)
    monkeypatch.setattr("dalle_zoo.training.callbacks.load_ranker", lambda folder: Scorer())
    module, data = Painter(), CodeDataModule("nowhere", TextConfig(tokenizer=str(parts), length=12))
    data.tokenizer = open_text_tokenizer(str(parts))
    callback = ImageLogger(count=1, prompts=["ab", "abcd"], ranker="any")
    callback.folder = tmp_path
    callback.check(module, data)
    trainer = stand_in(datamodule=data, global_step=0)
    monkeypatch.setattr(Painter, "global_step", 5)
    callback.on_validation_batch_start(trainer, module, {"caption": ["abc", "left out"]}, 0)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["prompts-00000005.png", "samples-00000005.png"]
    assert module.logged["val/sample_score"] == pytest.approx((3 + 2 + 4) / 3)


def test_a_score_has_prompts_of_its_own(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lengths:
        """Stands for a score of the evaluation, which is an entry point."""

        def __init__(self, count: int) -> None:
            self.prompts = ["a", "ab", "abc"][:count]

        def __call__(self, images: torch.Tensor) -> dict[str, float]:
            return {"length": float(images.mean() * 10), "images": len(images)}

    monkeypatch.setitem(SAMPLE_SCORES._members, "lengths", Lengths)
    module, data = Painter(), CodeDataModule("nowhere", TextConfig(tokenizer=str(parts), length=12))
    data.tokenizer = open_text_tokenizer(str(parts))
    callback = ImageLogger(count=2, score="lengths")
    callback.folder = tmp_path
    callback.check(module, data)
    monkeypatch.setattr(Painter, "global_step", 5)
    callback.on_validation_batch_start(stand_in(datamodule=data), module, {"caption": ["abcdef"]}, 0)
    assert module.logged == {"val/lengths_length": pytest.approx(2.0), "val/lengths_images": 3}
    assert [path.name for path in tmp_path.glob("*.png")] == ["samples-00000005.png"]
    with pytest.raises(ValueError, match="unknown score of samples 'nothing'"):
        ImageLogger(score="nothing").check(module, data)
    with pytest.raises(ValueError, match=r"samples\.score_prompts must be at least 1, got 0"):
        ImageLogger(score_prompts=0)


def test_prompts_are_encoded_as_the_network_needs() -> None:
    data = CodeDataModule("nowhere", TextConfig(tokenizer="byte", bpe_dropout=0.0))
    data.tokenizer = open_text_tokenizer("byte")
    data.complete(None, 4, lambda tokenizer, overlong, dropout: CaptionEncoder(tokenizer, 7, overlong, dropout))
    assert data.encode_captions(["ab"]).shape == (1, 7), "by the network's encoder, as the captions of batches"


def test_prompts_need_a_stage_with_captions(stage: DVAEModule, parts: Path) -> None:
    data = ImageDataModule("nowhere", text=TextConfig(tokenizer=str(parts)))
    with pytest.raises(ValueError, match=r"the dvae generates no images from captions: leave samples\.prompts out"):
        ImageLogger(prompts=["a"]).check(stage, data)
    with pytest.raises(ValueError, match=r"the dvae generates no images from captions: leave samples\.score out"):
        ImageLogger(score="composition").check(stage, data)
    with pytest.raises(ValueError, match="unknown model"):
        ImageLogger(ranker="nobody").check(stage, data)


def test_without_validations_images_are_those_of_training_batches(tmp_path: Path, stage: DVAEModule) -> None:
    callback, batch = ImageLogger(every=3), {"image": torch.rand(2, 3, 8, 8)}
    callback.folder = tmp_path
    average = WeightEMA()
    for step in range(7):
        trainer = stand_in(global_step=step, num_val_batches=[], callbacks=[average, callback])
        stage._trainer = trainer
        if step == 0:
            callback.on_train_start(trainer, stage)
        callback.on_train_batch_end(trainer, stage, None, batch, 0)
        stage._restored_steps = step + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"reconstructions-{s:08d}.png" for s in (3, 6)]
    assert stage.training
    validated = stand_in(global_step=9, num_val_batches=[2], callbacks=[])
    callback.on_train_batch_end(validated, stage, None, batch, 0)
    assert len(list(tmp_path.iterdir())) == 2
