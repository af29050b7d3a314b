"""Stage 1: schedules, noise, validation and export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from lightning.pytorch import Trainer

from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.networks import load_image_tokenizer
from dalle_zoo.training import AdamWConfig, Cosine, LearningRate
from dalle_zoo.training.data_modules import CodeDataModule, ImageDataModule, TextConfig
from dalle_zoo.training.dvae_module import PAPER_KL, PAPER_RATE, PAPER_TEMPERATURE, DVAEModule
from dalle_zoo.training.warm_start import WarmStart

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    # Lightning 2.6 calls a deprecated part of torch's pytree.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]
CONFIG = DVAEConfig(image_size=16, width=8, num_groups=3, blocks_per_group=1, decoder_stem=8, codebook_size=8)


def batch(seed: int = 0) -> dict[str, Any]:
    images = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(-1, -1, 16, 16)
    return {"key": list("abcd"), "image": images.contiguous()}


def module(**options: Any) -> DVAEModule:
    torch.manual_seed(0)
    options = {
        "kl_weight": Cosine(start=0.0, end=1.0, steps=4),
        "temperature": Cosine(start=1.0, end=0.1, steps=4),
        "learning_rate": LearningRate(peak=5e-3, warmup_steps=0, decay="constant"),
    } | options
    return DVAEModule(CONFIG, **options)


def trainer(steps: int) -> Trainer:
    return Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )


def loader(count: int = 100) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader([batch()] * count, batch_size=None)  # type: ignore[arg-type]


def test_defaults_match_the_paper() -> None:
    stage = DVAEModule(CONFIG)
    assert (stage.kl_weight, stage.temperature, stage.learning_rate) == (PAPER_KL, PAPER_TEMPERATURE, PAPER_RATE)
    assert (PAPER_KL(5000), PAPER_TEMPERATURE(150_000)) == (6.6, 1 / 16)
    assert (PAPER_RATE.at(0), PAPER_RATE.at(1_200_000)) == (1e-4, 1.25e-6)
    assert stage.adamw == AdamWConfig(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4)


def test_only_matrices_decay() -> None:
    stage = module()
    optimizer = stage.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
    groups = optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(stage.parameters()))


def test_training_reduces_loss_and_logs_schedules() -> None:
    stage, runner = module(kl_weight=Cosine(start=0.0, end=0.1, steps=4)), trainer(60)
    runner.validate(stage, loader(1), verbose=False)
    before = float(runner.callback_metrics["val/psnr"])
    runner.fit(stage, loader())
    seen = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert seen["schedule/temperature"] == pytest.approx(0.1)
    assert seen["schedule/kl_weight"] == pytest.approx(0.1)
    assert seen["schedule/learning_rate"] == pytest.approx(5e-3)
    assert {"train/loss", "train/nll", "train/kl"} <= seen.keys()
    runner.validate(stage, loader(1), verbose=False)
    assert float(runner.callback_metrics["val/psnr"]) > before + 3


def test_decoder_training_does_not_change_encoder(tmp_path: Path) -> None:
    first = module()
    first.export(tmp_path)
    stage = module(init_from=str(tmp_path), freeze_encoder=True)
    trainer(20).fit(stage, loader())
    images = batch(1)["image"]
    assert torch.equal(stage.net.encode(images), first.net.encode(images))
    for before, after in zip(first.net.encoder.parameters(), stage.net.encoder.parameters(), strict=True):
        assert torch.equal(before, after)
    codes = stage.net.encode(batch()["image"])
    error = [(net.decode(codes) - batch()["image"]).abs().mean() for net in (first.net, stage.net)]
    assert error[1] < error[0]
    with torch.no_grad():  # as averaging rounds even weights that do not change
        stage.net.encoder.output.weight.mul_(1.001)
    stage.export(tmp_path / "exported")
    assert torch.equal(
        load_image_tokenizer(tmp_path / "exported").encoder.output.weight, first.net.encoder.output.weight
    )
    with pytest.raises(ValueError, match="freeze_encoder needs init_from"):
        module(freeze_encoder=True)


def test_noise_depends_only_on_seed_step_and_batch() -> None:
    def sampled(stage: DVAEModule, index: int) -> list[float]:
        return torch.rand(4, generator=stage.noise_generator(index)).tolist()

    assert sampled(module(), 3) == sampled(module(), 3)
    assert sampled(module(), 3) != sampled(module(), 4)
    assert sampled(module(), 3) != sampled(module(seed=1), 3)


def test_validation_counts_codes_over_all_batches() -> None:
    stage = module()
    with torch.no_grad():  # one code for dark cells, another for bright ones
        for parameter in stage.net.encoder.output.parameters():
            parameter.zero_()
        stage.net.encoder.output.bias[3] = 1.0  # type: ignore[index]
    runner = trainer(1)
    runner.validate(stage, loader(1), verbose=False)
    assert float(runner.callback_metrics["val/codes_used"]) == 1
    assert float(runner.callback_metrics["val/code_perplexity"]) == pytest.approx(1)
    logits = stage.net.logits(batch()["image"]).detach()
    kl = math.log(8) + (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert float(runner.callback_metrics["val/kl"]) == pytest.approx(float(kl), rel=1e-4)


def test_exported_weights_equal_network(tmp_path: Path) -> None:
    stage = module()
    stage.export(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    net = load_image_tokenizer(tmp_path)
    assert torch.equal(net.encode(images), stage.net.encode(images))
    assert stage.sample_images(batch())["reconstructions"].sheet().size == (2 + 4 * 18, 2 + 2 * 18)


def test_wrong_data_raise(shards: Path, codes: Path, parts: Path) -> None:
    stage = module()
    stage.check_data(ImageDataModule(str(shards), image_size=16, transform="dvae"))
    with pytest.raises(ValueError, match=r"image_size is 24, the dVAE's config\.image_size 16"):
        stage.check_data(ImageDataModule(str(shards), image_size=24, transform="dvae"))
    with pytest.raises(ValueError, match=r"trained on CodeDataModule: set data\.class_path to ImageDataModule"):
        stage.check_data(CodeDataModule(str(codes), TextConfig(tokenizer=str(parts), length=12)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23}, "batch_size 23 in each of 1 processes needs at least 23 samples, got 22"),
        ({"batch_size": 0}, "batch_size must be .*0"),
        ({"train": "nowhere"}, "location 'nowhere' does not exist"),
        ({"val": "composition:val-stiles"}, "Did you mean 'val-styles'"),
        ({"text": TextConfig(tokenizer="nowhere")}, "unknown model 'nowhere'"),
    ],
)
def test_wrong_data_raise_in_setup(options: dict[str, Any], message: str, shards: Path, tmp_path: Path) -> None:
    data = ImageDataModule(**{"train": str(shards), "image_size": 16, **options})  # a constructor opens nothing
    stage = module()
    before = {name: weight.clone() for name, weight in stage.state_dict().items()}
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.fit(stage, datamodule=data)
    assert trainer.global_step == 0
    assert all(torch.equal(before[name], weight) for name, weight in stage.state_dict().items())


def test_wrong_data_stop_training(shards: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"image_size is 24, the dVAE's config\.image_size 16"):
        trainer.fit(module(), datamodule=ImageDataModule(str(shards), image_size=24))


def test_only_fit_opens_training_data(shards: Path) -> None:
    data = ImageDataModule("nowhere", val=str(shards), image_size=16)
    data.setup("validate")
    assert len(list(data.val_dataloader())) == 3  # 22 samples, 8 per batch
    with pytest.raises(ValueError, match="location 'nowhere' does not exist"):
        data.setup("fit")


def test_run_shorter_than_its_schedules_warns(caplog: pytest.LogCaptureFixture) -> None:
    rate = LearningRate(peak=1e-3, warmup_steps=10, decay="cosine", decay_steps=90)
    short = Cosine(start=1.0, end=0.5, steps=50)
    stage = DVAEModule(CONFIG, kl_weight=short, temperature=Cosine(start=1.0, end=0.5, steps=200), learning_rate=rate)
    stage.check_length(160)
    assert not caplog.text
    stage.check_length(70)
    assert "trainer.max_steps 70 is shorter than the schedules model.learning_rate" in caplog.text
    assert "decay_steps (step 100), model.temperature.steps (step 200): set them" in caplog.text
    warm = DVAEModule(CONFIG, learning_rate=rate, warm_start=WarmStart(steps=40, gather=4, quantized_steps=20))
    warm.check_length(90)
    with pytest.raises(ValueError, match="ends at step 40 inside the warm start of 40 steps"):
        warm.check_length(40)
