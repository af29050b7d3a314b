"""Training of the ranker: it learns, it stays bounded, and what it exports is a CLIP folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.utils.data
from lightning.pytorch import Trainer

from dalle_zoo.models.ranker import RankerConfig
from dalle_zoo.ranker_folder import load_ranker
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.training import LearningRate
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule, TextConfig
from dalle_zoo.training.ranker_module import RankerModule
from dalle_zoo.training.saving import Checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # lightning 2.6 calls a deprecated part of torch's pytree
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
CONFIG = RankerConfig(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=16, text_layers=1, text_heads=2, embed_dim=16, text_length=12, text_vocab=256,
)  # fmt: skip
COLORS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0), "black": (0, 0, 0)}


def batch() -> dict[str, Any]:
    pixels = torch.tensor(list(COLORS.values()))
    return {
        "key": list(COLORS),
        "image": pixels[:, :, None, None].expand(-1, -1, 16, 16).contiguous(),
        "caption": list(COLORS),
    }


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=bool(options),
        **options,
    )


def loader(batches: int = 60) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader([batch()] * batches, batch_size=None)  # type: ignore[arg-type]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    ByteTokenizer().save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def module(tokenizer: str) -> RankerModule:
    torch.manual_seed(0)
    rate = LearningRate(peak=5e-3, warmup_steps=5, decay="constant")
    return RankerModule(CONFIG, tokenizer, learning_rate=rate)


def test_training_learns_four_pairs_and_exports(module: RankerModule, tmp_path: Path) -> None:
    run = trainer(tmp_path, 60)
    run.fit(module, loader(), loader(1))
    assert run.callback_metrics["val/loss"] < 0.1 < math.log(4)
    assert run.callback_metrics["val/image_to_text_top1"] == 1
    assert run.callback_metrics["val/text_to_image_top5"] == 1
    module.export(tmp_path / "ranker")
    with torch.no_grad():
        image = load_ranker(tmp_path / "ranker").image_features(batch()["image"])
        assert torch.allclose(image, module.eval().net.image_features(batch()["image"]))


def test_temperature_is_clamped(module: RankerModule, tmp_path: Path) -> None:
    with torch.no_grad():
        module.net.model.logit_scale.fill_(20.0)
    trainer(tmp_path, 1).fit(module, loader(), loader())
    assert module.net.scale.item() == pytest.approx(100)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")  # its batches are all the same
def test_clamped_run_resumes_exactly(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo.training.ranker_module.MAX_LOG_SCALE", 1.0)  # below where it starts

    def train(folder: str, steps: int, state: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        checkpoint = Checkpoint(every=1)
        checkpoint.folder = tmp_path / folder
        stage = RankerModule(CONFIG, tokenizer, learning_rate=LearningRate(peak=5e-3, warmup_steps=5))
        trainer(tmp_path, steps, callbacks=[checkpoint, WeightEMA(decay=0.5)]).fit(
            stage, loader(6), loader(1), ckpt_path=state, weights_only=False
        )
        return cast(dict[str, Any], torch.load(tmp_path / folder / f"{steps:08d}.ckpt", weights_only=False))

    alone, first = train("alone", 3), train("broken", 1)
    assert float(first["state_dict"]["net.model.logit_scale"]) == 1.0
    after = train("broken", 3, tmp_path / "broken" / "00000001.ckpt")
    for part in ("state_dict", "average"):
        assert alone[part].keys() == after[part].keys()
        assert all(torch.equal(after[part][name], tensor) for name, tensor in alone[part].items()), part


def test_wrong_data_raise(module: RankerModule) -> None:
    captions = TextConfig(tokenizer="composition", length=12)
    module.check_data(ImageDataModule("composition:val-styles", image_size=16, text=captions))
    with pytest.raises(ValueError, match="the ranker is trained on captions"):
        module.check_data(ImageDataModule("composition:val-styles", image_size=16))
    with pytest.raises(ValueError, match="the ranker cannot be trained on CodeDataModule"):
        module.check_data(CodeDataModule.__new__(CodeDataModule))


def test_checkpoint_records_its_architecture(module: RankerModule) -> None:
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["dalle_zoo"]["stage"] == "ranker"
    assert RankerConfig(**checkpoint["dalle_zoo"]["config"]) == CONFIG


def test_other_vocabulary_raises(tokenizer: str) -> None:
    with pytest.raises(ValueError, match="set text_vocab to 256"):
        RankerModule(RankerConfig(), tokenizer)
