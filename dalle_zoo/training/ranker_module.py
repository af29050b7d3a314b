"""Trains the ranker on images and captions by contrast (Radford et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from dalle_zoo.models.losses import contrastive_loss
from dalle_zoo.models.ranker import Ranker, RankerConfig, retrieval_accuracy
from dalle_zoo.ranker_folder import save_ranker
from dalle_zoo.tokenizers.library import LibraryTokenizer
from dalle_zoo.training.base import STAGES, StageModule
from dalle_zoo.training.data_modules import CaptionedDataModule
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.zoo import open_text_tokenizer

# B pairs of a process, d features

MAX_LOG_SCALE = math.log(100)
"""Upper limit of the logarithmic inverse temperature (Radford et al., section 2.5)."""


@STAGES.register("ranker")
class RankerModule(StageModule):
    """Trains a `Ranker`.

    Captions are tokenized in this module, since the ranker's ids need start and end tokens, unlike those of the
    prior.

    Args:
        config: Architecture.
        tokenizer: Folder of a text tokenizer, a model that has one, or "byte", which needs no training.
        adamw: Optimizer settings; the defaults are CLIP's.
        learning_rate: Learning-rate schedule.
        seed: Seed of the stage.
    """

    stage = "ranker"
    config_class = RankerConfig
    net: Ranker

    def __init__(
        self,
        config: RankerConfig,
        tokenizer: str,
        adamw: AdamWConfig = AdamWConfig(beta2=0.98, eps=1e-6, weight_decay=0.2),  # noqa: B008 (frozen)
        learning_rate: LearningRate = LearningRate(peak=5e-4, warmup_steps=2000),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        text = open_text_tokenizer(tokenizer)
        if not isinstance(text, LibraryTokenizer):
            raise ValueError(
                f"tokenizer {tokenizer!r} is a {type(text).__name__}, which has no tokenizer.json: "
                "use a bpe, byte or hf tokenizer"
            )
        super().__init__(Ranker.create(config, text), adamw, learning_rate, seed)
        self.config, self.tokenizer = config, tokenizer
        self._tokenizer_digest = text.fingerprint()
        self._seen: list[tuple[Tensor, Tensor]] = []

    @property
    def image_size(self) -> int:
        """Side of the images of the network, pixels; it takes others too."""
        return self.config.image_size

    def complete_data(self, data: LightningDataModule) -> None:
        """Adds the tokenizer; captions are encoded in this module."""
        super().complete_data(data)
        if isinstance(data, CaptionedDataModule) and data.text is not None and data.text.tokenizer is None:
            data.text = replace(data.text, tokenizer=self.tokenizer)

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` unless the data are captioned images; they may have any size."""
        super().check_data(data)
        if isinstance(data, CaptionedDataModule) and data.text is None:
            raise ValueError("the ranker is trained on captions: set data.init_args.text")

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the tokenizer of this module."""
        return {"model.tokenizer": self._tokenizer_digest}

    def features(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and captions, (B, d) each."""
        return self.net.image_features(batch["image"]), self.net.text_features(batch["caption"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Symmetric cross-entropy over the pairs of all processes."""
        # Every process computes the loss of all pairs. Gathering sums the gradients over the processes and data
        # parallelism averages them, so the step equals that of one process with the total batch.
        image, text = (self._gather(x) for x in self.features(batch))
        loss = contrastive_loss(image, text, self.net.scale)
        self.log("train/loss", loss)
        self.log("train/scale", self.net.scale.detach())
        self.observe_loss(loss)
        return loss

    def _gather(self, features: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return features
        everywhere = self.all_gather(features, sync_grads=self.training)
        assert isinstance(everywhere, Tensor)
        return everywhere.flatten(0, 1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Clamps the inverse temperature to at most 100."""
        # In the step: this module's on_train_batch_end is called after those of the callbacks, which average and
        # save the weights.
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net.model.logit_scale.clamp_(max=MAX_LOG_SCALE)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the loss of the batch, and collects its features."""
        image, text = self.features(batch)
        loss = contrastive_loss(image, text, self.net.scale)
        self.log("val/loss", loss, batch_size=len(image), sync_dist=True, prog_bar=True)
        self._seen.append((image.detach(), text.detach()))

    def on_validation_epoch_start(self) -> None:
        """Clears the features of an earlier validation."""
        self._seen.clear()

    def on_validation_epoch_end(self) -> None:
        """Logs the retrieval accuracy over the validation set."""
        image, text = (self._gather(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        found = retrieval_accuracy(image, text)
        self.log_dict({f"val/{name}": value for name, value in found.items()}, sync_dist=True)
        self._seen.clear()

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def architecture(self) -> dict[str, Any]:
        """Architecture of the network as plain data."""
        return asdict(self.config)

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained ranker as a CLIP folder for transformers."""
        save_ranker(self.net, folder)
