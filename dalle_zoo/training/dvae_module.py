"""Stage 1: trains the discrete VAE (section 2.1, appendix A.2)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.losses import dvae_loss
from dalle_zoo.pictures import picture_rows
from dalle_zoo.training.base import AdamWConfig, StageModule
from dalle_zoo.training.data_modules import CodeData, PictureData
from dalle_zoo.training.schedules import Cosine, LearningRate

PAPER_KL = Cosine(start=0.0, end=6.6, steps=5_000)
PAPER_TEMPERATURE = Cosine(start=1.0, end=1 / 16, steps=150_000)
PAPER_RATE = LearningRate(peak=1e-4, warmup_steps=0, decay="cosine", final=1.25e-6, decay_steps=1_200_000)


class DVAEModule(StageModule):
    """Trains a `DVAE`; the defaults are the paper's recipe.

    Args:
        config: Architecture.
        kl_weight: beta over the updates.
        temperature: Relaxation temperature tau over the updates.
        adamw: Optimiser settings.
        learning_rate: Step size over the updates.
        seed: Seed of the Gumbel noise.
        init_from: Model, by name or folder, whose weights training starts from; fresh weights if missing.
    """

    stage = "dvae"
    net: DVAE

    def __init__(
        self,
        config: DVAEConfig,
        kl_weight: Cosine = PAPER_KL,
        temperature: Cosine = PAPER_TEMPERATURE,
        adamw: AdamWConfig = AdamWConfig(weight_decay=1e-4),  # noqa: B008 (frozen)
        learning_rate: LearningRate = PAPER_RATE,
        seed: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(DVAE(config), adamw, learning_rate, seed)
        self.start_from(init_from)
        net: Any = self.net  # torch 2.13 does not declare this overload of `to`, later ones do
        net.to(memory_format=torch.channels_last)
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.code_counts = torch.zeros(config.codebook_size)

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` unless the data are pictures of the network's size."""
        if isinstance(data, CodeData):
            raise ValueError("stage 1 is trained on pictures, got CodeData: set data.class_path to PictureData")
        if isinstance(data, PictureData) and data.image_size != self.net.image_size:
            raise ValueError(
                f"data.init_args.image_size is {data.image_size}, the dVAE's config.image_size {self.net.image_size}: "
                "set both to the same"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Negative evidence bound at this update's beta and tau."""
        images = batch["image"].to(memory_format=torch.channels_last)
        tau, beta = self.temperature(self.global_step), self.kl_weight(self.global_step)
        parameters, logits = self.net(images, tau, self.noise_generator(batch_idx))
        loss, parts = dvae_loss(self.net.map_pixels(images), parameters, logits, beta)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        self.log_dict({"schedule/temperature": tau, "schedule/kl_weight": beta})
        self.observe_loss(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Empties the counts of codes."""
        self.code_counts = torch.zeros(self.net.codebook_size, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Evidence bound and PSNR with hard codes, as stage 2 will use them."""
        images = batch["image"].to(memory_format=torch.channels_last)
        logits = self.net.logits(images)
        codes = logits.argmax(1)
        parameters = self.net.decoder.from_codes(codes)
        beta = self.kl_weight(self.updates)
        loss, parts = dvae_loss(self.net.map_pixels(images), parameters, logits, beta)
        error = (self.net.pixels(parameters) - images).square().mean((1, 2, 3)).clamp(min=1e-10)
        metrics = {"val/loss": loss, "val/psnr": (-10 * error.log10()).mean()}
        metrics |= {f"val/{name}": value for name, value in parts.items()}
        self.log_dict(metrics, batch_size=len(images), sync_dist=True)
        self.code_counts += torch.bincount(codes.flatten(), minlength=self.net.codebook_size)

    def on_validation_epoch_end(self) -> None:
        """Codebook use: codes that occur, and the perplexity of their distribution."""
        counts = self.trainer.strategy.reduce(self.code_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        p = counts / counts.sum()
        perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
        self.log_dict({"val/codes_used": (p > 0).sum().float(), "val/code_perplexity": perplexity})

    @property
    def draws(self) -> bool:
        """Reconstructions are always drawn."""
        return True

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Originals above their reconstructions from hard codes."""
        images = batch["image"].to(self.device)
        return {"reconstructions": picture_rows(images, self.net.decode(self.net.encode(images)))}
