"""What the three stages share: optimiser, learning rate, noise, and the export of trained weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dalle_zoo.hub import save_network
from dalle_zoo.sampling.noise import picture_seed
from dalle_zoo.training.schedules import LearningRate, LearningRateScheduler


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW; matrices and convolutions decay, biases, gains and embeddings of positions do not."""

    beta1: float = 0.9
    """Decay of the running mean."""
    beta2: float = 0.999
    """Decay of the running variance."""
    eps: float = 1e-8
    """Added to the root of the running variance."""
    weight_decay: float = 1e-4
    """Decoupled weight decay multiplier."""


class StageModule(LightningModule):
    """Base of the LightningModules.

    A subclass sets ``stage``, ``self.net`` and implements ``training_step`` and ``validation_step``.

    Args:
        net: Network that is trained.
        adamw: Optimiser settings.
        learning_rate: Learning-rate schedule.
        seed: Seed of the noise; with the update and the rank it determines every random number of the stage.
    """

    stage: str
    """Name of the stage, also of its folder in a published model."""

    def __init__(self, net: nn.Module, adamw: AdamWConfig, learning_rate: LearningRate, seed: int) -> None:
        super().__init__()
        self.net = net
        self.adamw = adamw
        self.learning_rate = learning_rate
        self.seed = seed

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with two groups, and the learning-rate schedule, once an update."""
        decayed = [p for p in self.net.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.net.parameters() if p.requires_grad and p.ndim < 2]
        a = self.adamw
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": a.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.learning_rate.peak,
            betas=(a.beta1, a.beta2),
            eps=a.eps,
        )
        scheduler = LearningRateScheduler(optimizer, self.learning_rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
        }

    def observe_loss(self, loss: Tensor) -> None:
        """Feeds the plateau rule; all processes see the same mean, so they halve together."""
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, LearningRateScheduler) or scheduler.rate.decay != "plateau":
            return
        mean = scheduler.window_mean(float(loss.detach()))
        if mean is not None:
            everywhere = self.trainer.strategy.reduce(torch.tensor(mean, device=self.device))
            scheduler.observe(float(everywhere))

    def noise_generator(self, batch_index: int) -> torch.Generator:
        """Generator of this batch's noise: a pure function of (seed, update, batch, rank), so resume is exact."""
        seed = picture_seed(self.seed, self.stage, self.global_step, batch_index, self.global_rank)
        return torch.Generator(self.device).manual_seed(seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the stage and the architecture as plain data, so that export needs no recipe."""
        checkpoint["dalle_zoo"] = {"stage": self.stage, "config": self.architecture()}

    def architecture(self) -> dict[str, Any]:
        """Architecture of the network as plain data."""
        return asdict(self.net.config)  # type: ignore[call-overload, no-any-return]

    def export(self, folder: Path) -> None:
        """Writes the trained weights as a component folder of a published model."""
        save_network(self.net, self.stage, folder)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Testing measures what validation measures."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Prediction draws the pictures of a batch."""
        return self.pictures(batch)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Grids worth looking at while training, name to uint8 (3, H, W); empty if the stage has none."""
        del batch
        return {}
