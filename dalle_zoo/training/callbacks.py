"""Images that a run generates while it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from dalle_zoo.images import save_png
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.ranker_folder import load_ranker
from dalle_zoo.training.averaging import WeightEMA
from dalle_zoo.training.base import StageModule
from dalle_zoo.training.data_modules import CaptionedDataModule
from dalle_zoo.training.loggers import log_image
from dalle_zoo.training.samples import SAMPLE_SCORES, Samples, SampleScore
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.zoo import find_component

log = logging.getLogger(__name__)


class ImageLogger(Callback):
    """Generates images at every validation, with the averaged weights if there are any.

    They are saved as ``images/<name>-<step>.png`` in the run folder, and sent to loggers that accept images. A dVAE
    reconstructs images of the first validation batch (``reconstructions``). A prior generates images for its captions
    (``samples``, next to the reconstruction of the true image) and for fixed prompts (``prompts``); the captions are
    their titles. Without validation data, captions are those of the current training batch.

    A network that is sharded is gathered for it in process 0, if its device has the memory.

    Args:
        enabled: Whether to generate images.
        count: Maximum number of captions or images of a batch.
        prompts: Captions to generate an image for. Defaults to none.
        ranker: Model, by name or folder, whose ranker scores generated images against their captions; the mean is
            logged as ``val/sample_score``. Defaults to none.
        every: Optimizer steps between images without validation data.
        score: Score of images for prompts of its own, a name in `SAMPLE_SCORES` such as "composition"; it is logged as
            ``val/<score>_<part>``. Defaults to none.
        score_prompts: Maximum number of prompts of ``score``, for each of which an image is generated.
    """

    def __init__(
        self,
        enabled: bool = True,
        count: int = 8,
        prompts: list[str] | None = None,
        ranker: str | None = None,
        every: int = 1000,
        score: str | None = None,
        score_prompts: int = 32,
    ) -> None:
        for name, value in {"count": count, "every": every, "score_prompts": score_prompts}.items():
            if value < 1:
                raise ValueError(f"samples.{name} must be at least 1, got {value}")
        self.enabled, self.count, self.every = enabled, count, every
        self.prompts, self.ranker = prompts or [], ranker
        self.score, self.score_prompts = score, score_prompts
        self.folder: Path | None = None
        self._last = 0
        self._scorer: Ranker | None = None
        self._score: SampleScore | None = None

    def check(self, module: LightningModule, data: LightningDataModule) -> None:
        """Raises `ValueError` for options that the stage cannot honor; warns if there will be no images."""
        if not self.enabled or not isinstance(module, StageModule):
            return
        captioned = isinstance(data, CaptionedDataModule) and data.text is not None
        for name in ("prompts", "score"):
            if getattr(self, name) and not (captioned and module.generates_from_captions):
                raise ValueError(f"the {module.stage} generates no images from captions: leave samples.{name} out")
        if self.ranker is not None:
            find_component(self.ranker, "ranker")
        if self.score is not None:
            self._score = SAMPLE_SCORES[self.score](self.score_prompts)
        if module.missing_for_samples:
            rank_zero_only(log.warning)("the run generates no sample images: %s", module.missing_for_samples)

    # ------------------------------------------------------------ when

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Generates images for the first batch, with the weights that validation uses."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._generate(trainer, pl_module, batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the step of the checkpoint, whose images exist."""
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Generates images for the batch, if it is due and there are no validations."""
        step = trainer.global_step
        if step == self._last or step % self.every or any(trainer.num_val_batches):
            return
        self._last = step
        averages: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        with ExitStack() as stack, torch.no_grad():
            for average in averages:
                if isinstance(average, WeightEMA):
                    stack.enter_context(average.applied(pl_module))
            pl_module.eval()
            self._generate(trainer, pl_module, batch)
            pl_module.train()

    # ------------------------------------------------------------ what

    def _generate(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        if not self.enabled or self.folder is None or not isinstance(module, StageModule):
            return
        network = self._unsharded(trainer, module)  # every process takes part
        if not trainer.is_global_zero:
            return
        few = {name: value[: self.count] if hasattr(value, "__len__") else value for name, value in batch.items()}
        made = module.sample_images(few, network)
        if self.prompts:
            for samples in module.sample_images(_prompt_batch(trainer, module, self.prompts), network).values():
                made["prompts"] = samples
        for name, samples in made.items():
            image = samples.sheet()
            save_png(image, self.folder / f"{name}-{module.optimizer_steps:08d}.png")
            for logger in trainer.loggers:
                log_image(logger, name, image, max(module.optimizer_steps - 1, 0))  # as the row of the validation
        if self.ranker is not None and (scores := self._scores(module, list(made.values()))):
            module.log("val/sample_score", math.fsum(scores) / len(scores), batch_size=1, rank_zero_only=True)
        if self._score is not None:
            for part, value in self._score(self._images_of(self._score.prompts, trainer, module, network)).items():
                module.log(f"val/{self.score}_{part}", value, batch_size=1, rank_zero_only=True)

    def _images_of(
        self, prompts: Sequence[str], trainer: Trainer, module: StageModule, network: nn.Module | None
    ) -> Tensor:
        """Generates an image for each prompt, ``count`` at a time: (B, 3, H, W)."""
        parts = [prompts[start : start + self.count] for start in range(0, len(prompts), self.count)]
        made = (module.sample_images(_prompt_batch(trainer, module, part), network) for part in parts)
        return torch.cat([samples.generated for each in made for samples in each.values()])

    def _unsharded(self, trainer: Trainer, module: StageModule) -> nn.Module | None:
        """Gathers a sharded network in process 0; None for others, and if its device lacks the memory."""
        hooks = hooks_of(trainer.strategy)
        if not hooks.shards or module.missing_for_samples:
            return None
        size = 4 * module.num_parameters(module.net.config)
        device = trainer.strategy.root_device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if not trainer.strategy.broadcast(size < 0.9 * free):
            warn = rank_zero_only(log.warning)
            warn("no sample images: the unsharded network takes %.3g GB, which the device lacks", size / 1e9)
            return None
        weights = hooks.unsharded_weights("net.")
        assert weights is not None, "a strategy that shards gathers"
        return module.network_of(weights).to(device).eval() if trainer.is_global_zero else None

    @torch.no_grad()
    def _scores(self, module: StageModule, made: Sequence[Samples]) -> list[float]:
        if self._scorer is None:
            self._scorer = load_ranker(find_component(str(self.ranker), "ranker"))
        scorer, found = self._scorer.to(module.device), []
        for samples in made:
            if samples.captions is not None:
                found += scorer.scores(samples.generated.to(module.device), samples.captions).tolist()
        return found

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Saves the images of every predicted batch."""
        if self.folder is None:
            return
        for name, samples in (outputs or {}).items():
            path = self.folder / f"predicted-{name}-{batch_idx:05d}-{trainer.global_rank}.png"
            save_png(samples.sheet(), path)


def _prompt_batch(trainer: Trainer, module: StageModule, prompts: Sequence[str]) -> dict[str, Any]:
    data: CaptionedDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return {"caption": prompts, "text": data.encode_captions(prompts).to(module.device)}
