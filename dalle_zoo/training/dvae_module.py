"""Stage 1: trains the discrete VAE (section 2.1, appendix A.2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.images import psnr
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.losses import dvae_loss, logit_laplace_nll
from dalle_zoo.networks import load_image_tokenizer
from dalle_zoo.training.base import STAGES, StageModule, weights_digest
from dalle_zoo.training.data_modules import ImageDataModule
from dalle_zoo.training.layer_tokens import LayerTokens
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.samples import Samples
from dalle_zoo.training.schedules import Cosine, LearningRate
from dalle_zoo.training.warm_start import Codebook, WarmStart, kmeans, set_codes
from dalle_zoo.zoo import find_component

PAPER_KL = Cosine(start=0.0, end=6.6, steps=5_000)
PAPER_TEMPERATURE = Cosine(start=1.0, end=1 / 16, steps=150_000)
PAPER_RATE = LearningRate(peak=1e-4, warmup_steps=0, decay="cosine", final=1.25e-6, decay_steps=1_200_000)


@STAGES.register("dvae")
class DVAEModule(StageModule):
    """Trains a `DVAE`; the defaults are the paper's recipe.

    With ``layers`` of `ImageDataModule`, the codes of a trained model stay: by cross-entropy the encoder learns to
    give a composed image the codes that its layers have in that model (`LayerTokens`), and the decoder to decode them.

    Args:
        config: Architecture.
        kl_weight: Schedule of the KL weight beta.
        temperature: Schedule of the relaxation temperature tau.
        adamw: Optimizer settings.
        learning_rate: Learning-rate schedule.
        seed: Seed of the Gumbel noise.
        init_from: Name or folder of a model whose weights training starts from. Defaults to fresh weights.
        freeze_encoder: Whether to train only the decoder, on hard codes or those of layers: reconstructions improve
            while the codes, and priors trained on them, stay valid. Temperature and KL weight are then unused.
        warm_start: Train an autoencoder, cluster its features with k-means, and train with quantized features before
            the relaxation begins. Validation uses hard codes, so its metrics are meaningless before k-means. Defaults
            to none, as in the paper.
        squared_error: Weight of the mean squared error of the decoded pixels, added to the likelihood: like PSNR, it
            favors the mean of what a code represents over the median. Defaults to 0, as in the paper.
        layer_codes: Name or folder of the model whose codes layers have. Defaults to ``init_from``.
    """

    stage = "dvae"
    config_class = DVAEConfig
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
        freeze_encoder: bool = False,
        warm_start: WarmStart | None = None,
        squared_error: float = 0.0,
        layer_codes: str | None = None,
    ) -> None:
        if squared_error < 0:
            raise ValueError(f"squared_error must be at least 0, got {squared_error}")
        if warm_start is not None and init_from is not None:
            raise ValueError("warm_start would overwrite the codes of init_from: set one of them to null")
        if freeze_encoder and init_from is None:
            raise ValueError("freeze_encoder needs init_from, the model whose codes are kept")
        super().__init__(DVAE(config), adamw, learning_rate, seed)
        self.start_from(init_from)
        self.layer_codes = layer_codes or init_from
        self.init_from = init_from
        self.freeze_encoder = freeze_encoder
        self.net.encoder.requires_grad_(not freeze_encoder)
        self._frozen = {n: t.clone() for n, t in self.net.encoder.state_dict().items()} if freeze_encoder else {}
        net: Any = self.net  # torch 2.13 does not declare this overload of `to`, later ones do
        net.to(memory_format=torch.channels_last)
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.code_counts = torch.zeros(config.codebook_size)
        self.squared_error = squared_error
        self.warm_start = warm_start
        self._latest: Tensor | None = None  # features of the last batch, for unused codes to move to
        self.features: list[Tensor] = []  # of the last steps of the warm start, from all processes
        if warm_start is not None:
            self.bridge = nn.Conv2d(config.widths[-1], config.decoder_stem, 1)
            self.codebook = Codebook(config.codebook_size, config.decoder_stem, warm_start)

    def other_parameters(self) -> list[nn.Parameter]:
        """The bridge of the warm start."""
        return [] if self.warm_start is None else list(self.bridge.parameters())

    @property
    def image_size(self) -> int:
        """Side of the images of the network, pixels."""
        return self.net.image_size

    @property
    def grid_size(self) -> int:
        """Image tokens in a row."""
        return self.net.config.grid_size

    def complete_data(self, data: LightningDataModule) -> None:
        """Loads the codes of layers, if the data have them; raises `ValueError` if there are none."""
        super().complete_data(data)
        if not isinstance(data, ImageDataModule) or not data.layers:
            if self.layer_codes not in (None, self.init_from):
                raise ValueError("model.layer_codes has no effect without data.init_args.layers: set both, or none")
            return
        if self.layer_codes is None or self.warm_start is not None:
            raise ValueError(
                "data.init_args.layers keeps the codes of a trained dVAE: name it in model.init_args.init_from, and "
                "set warm_start to null"
            )
        if self._layer_tokens is None:
            tokenizer = load_image_tokenizer(find_component(self.layer_codes, self.stage))
            if tokenizer.codebook_size != self.net.codebook_size or tokenizer.factor != self.net.factor:
                raise ValueError(
                    f"model.layer_codes has {tokenizer.codebook_size} codes of {tokenizer.factor} pixels, "
                    f"model.config {self.net.codebook_size} of {self.net.factor}: set config to that of the codes"
                )
            self._layer_tokens = LayerTokens(tokenizer.requires_grad_(False).eval())  # not a submodule: not saved

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` unless the data are images of the network's size."""
        super().check_data(data)
        if isinstance(data, ImageDataModule) and (data.image_size or self.image_size) != self.image_size:
            raise ValueError(
                f"data.init_args.image_size is {data.image_size}, the dVAE's config.image_size {self.net.image_size}: "
                "set both to the same"
            )

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights whose codes layers have, if the data have layers."""
        tokens = self._layer_tokens
        return {} if tokens is None else {"model.layer_codes": weights_digest(tokens.tokenizer)}

    def schedule_ends(self) -> dict[str, int]:
        """Adds the schedules of the relaxation, if there is one after the warm start."""
        ends = super().schedule_ends()
        if not self.freeze_encoder and self._layer_tokens is None and self.warm_start is None:
            ends |= {"kl_weight.steps": self.kl_weight.steps, "temperature.steps": self.temperature.steps}
        return ends

    def check_length(self, max_steps: int) -> None:
        """Raises `ValueError` for a run that ends inside the warm start, whose weights have no codes yet."""
        if self.warm_start is not None and max_steps <= self.warm_start.steps:
            raise ValueError(
                f"the run ends at step {max_steps} inside the warm start of {self.warm_start.steps} steps, before "
                "it has codes: set trainer.max_steps higher, or model.warm_start to fewer steps or to null"
            )
        super().check_length(max_steps)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Negative evidence lower bound with the beta and tau of this step."""
        images = batch["image"].to(memory_format=torch.channels_last)
        if self._layer_tokens is not None:
            return self._learn_layers(images, self._layer_tokens(batch))
        if self.warm_start is not None and self.global_step < self.warm_start.steps:
            return self._autoencode(images, self.warm_start)
        if self.warm_start is not None and self.features:
            self._start_codes(self.warm_start)
        if self.warm_start is not None and self.global_step < self.warm_start.total_steps:
            return self._quantize(images, self.warm_start)
        if self.freeze_encoder:
            return self._decode_hard_codes(images)
        tau, beta = self.temperature(self.global_step), self.kl_weight(self.global_step)
        parameters, logits = self.net(images, tau, self.noise_generator(batch_idx))
        x = self.net.map_pixels(images)
        loss, parts = dvae_loss(x, parameters, logits, beta)
        loss = loss + self._squares(x, parameters[:, : x.shape[1]])
        if self.warm_start is not None:
            loss = loss + _nothing(self.bridge)
        self.log("train/loss", loss)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        self.log_settings({"schedule/temperature": tau, "schedule/kl_weight": beta})
        self.observe_loss(loss)
        return loss

    def _autoencode(self, images: Tensor, warm: WarmStart) -> Tensor:
        """Loss of the autoencoder without codes; the last steps store their features."""
        x = self.net.map_pixels(images)
        vectors = self.bridge(self.net.encoder.features(x))
        loss = self._likelihood(x, self.net.decoder.from_stem(vectors))
        if self.global_step >= warm.steps - warm.gather:
            mine = vectors.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            self.features.append(_gathered(mine))
        return loss + _nothing(self.net.encoder.output, self.net.decoder.input)

    def _quantize(self, images: Tensor, warm: WarmStart) -> Tensor:
        """Likelihood given quantized features, plus the loss that pulls codes and features together."""
        x = self.net.map_pixels(images)
        features = self.bridge(self.net.encoder.features(x)).float()
        quantized, pull, facts = self.codebook(features)
        everywhere = self.trainer.strategy.reduce(facts, reduce_op="mean")
        assert isinstance(everywhere, Tensor)
        self.codebook.observe(everywhere)
        loss = self._likelihood(x, self.net.decoder.from_stem(quantized))
        self.log("train/quantization", pull.detach())
        if (self.global_step + 1) % warm.revive_every == 0:
            self._latest = _gathered(features.detach().permute(0, 2, 3, 1).flatten(0, 2))
        total: Tensor = loss + pull + _nothing(self.net.encoder.output, self.net.decoder.input)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the network's own layers equal to the codebook while it is learned."""
        super().optimizer_step(*args, **kwargs)
        warm = self.warm_start
        if warm is None or not warm.steps <= self.global_step < warm.total_steps:
            return
        if self._latest is not None:
            self.codebook.revive(self._latest, torch.Generator().manual_seed(self.seed + self.global_step))
            self._latest = None
        self._write_codes(warm)

    def _write_codes(self, warm: WarmStart) -> None:
        distance = max(float(self.codebook.distance), 1e-12)
        set_codes(self.net, self.bridge, self.codebook.vectors, warm.sharpness / distance)

    def _learn_layers(self, images: Tensor, codes: Tensor) -> Tensor:
        """Likelihood of images given the codes of their layers, and cross-entropy of these codes given the images."""
        of_codes: Tensor | float = 0.0
        if not self.freeze_encoder:
            of_codes = F.cross_entropy(self.net.logits(images), codes)
            self.log("train/codes", of_codes.detach())
        return self._likelihood(self.net.map_pixels(images), self.net.decoder.from_codes(codes), of_codes)

    def _decode_hard_codes(self, images: Tensor) -> Tensor:
        """Negative log-likelihood of images given their hard codes."""
        with torch.no_grad():
            codes = self.net.encode(images)
        return self._likelihood(self.net.map_pixels(images), self.net.decoder.from_codes(codes))

    def _likelihood(self, x: Tensor, parameters: Tensor, other: Tensor | float = 0.0) -> Tensor:
        """Mean negative log-likelihood of mapped pixels, plus another loss; logs both and their sum."""
        mu, log_scale = parameters.chunk(2, dim=1)
        loss = logit_laplace_nll(x, mu, log_scale).mean()
        self.log("train/nll", loss.detach())
        loss = loss + self._squares(x, mu) + other
        self.log("train/loss", loss)
        self.observe_loss(loss)
        return loss

    def _squares(self, x: Tensor, mu: Tensor) -> Tensor | float:
        """Weighted mean squared error of mapped pixels (B, C, H, W) and the locations predicted for them."""
        return self.squared_error * (torch.sigmoid(mu) - x).square().mean() if self.squared_error else 0.0

    def _start_codes(self, warm: WarmStart) -> None:
        """Ends the warm start: the cluster centers of the features become the codes."""
        generator = torch.Generator().manual_seed(self.seed)
        vectors = torch.cat([part.to(self.device) for part in self.features])
        centers, distance = kmeans(vectors, self.net.codebook_size, warm.iterations, generator)
        centers, distance = self.trainer.strategy.broadcast((centers, distance))
        self.codebook.start(centers, distance)
        self._write_codes(warm)
        self.features.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the features of the warm start, which a run interrupted in it needs."""
        super().on_save_checkpoint(checkpoint)
        if self.features:
            checkpoint["warm_start_features"] = list(self.features)
        if self.warm_start is not None:
            checkpoint["codebook"] = self.codebook.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the features of the warm start."""
        super().on_load_checkpoint(checkpoint)
        self.features = list(checkpoint.get("warm_start_features", ()))
        if self.warm_start is not None:
            self.codebook.restore(checkpoint["codebook"])

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the network, with the original weights of a frozen encoder."""
        if self._frozen:
            self.net.encoder.load_state_dict(self._frozen)
        super().export(folder, weights)

    def on_validation_epoch_start(self) -> None:
        """Resets the counts of codes."""
        self.code_counts = torch.zeros(self.net.codebook_size, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Evidence lower bound and PSNR with hard codes, as stage 2 uses them."""
        images = batch["image"].to(memory_format=torch.channels_last)
        logits = self.net.logits(images)
        codes = logits.argmax(1)
        parameters = self.net.decoder.from_codes(codes)
        beta = self.kl_weight(self.optimizer_steps)
        loss, parts = dvae_loss(self.net.map_pixels(images), parameters, logits, beta)
        metrics = {"val/loss": loss, "val/psnr": psnr(self.net.pixels(parameters), images).mean()}
        metrics |= {f"val/{name}": value for name, value in parts.items()}
        if self._layer_tokens is not None:
            metrics["val/codes_of_layers"] = (codes == self._layer_tokens(batch)).float().mean()
        self.log_dict(metrics, batch_size=len(images), sync_dist=True)
        self.code_counts += torch.bincount(codes.flatten(), minlength=self.net.codebook_size)

    def on_validation_epoch_end(self) -> None:
        """Logs the codebook use: number of codes that occur, and perplexity of their distribution."""
        counts = self.trainer.strategy.reduce(self.code_counts, reduce_op="sum")
        assert isinstance(counts, Tensor)
        p = counts / counts.sum()
        perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
        # Already those of all processes: Lightning warns about metrics that are not averaged.
        self.log_dict({"val/codes_used": (p > 0).sum().float(), "val/code_perplexity": perplexity}, sync_dist=True)

    @property
    def has_sample_images(self) -> bool:
        """Always true: a dVAE reconstructs images."""
        return True

    @torch.no_grad()
    def sample_images(self, batch: dict[str, Any], network: nn.Module | None = None) -> dict[str, Samples]:
        """Originals above their reconstructions from hard codes."""
        del network
        images = batch["image"].to(self.device)
        return {"reconstructions": Samples((images, self.net.decode(self.net.encode(images))))}


def _gathered(mine: Tensor) -> Tensor:
    """Gathers rows (N, D) of all processes to (world * N, D); Lightning's function for it is deprecated in torch."""
    if not torch.distributed.is_initialized():
        return mine
    everyones = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyones, mine.contiguous())
    return torch.cat(everyones)


def _nothing(*unused: nn.Module) -> Tensor:
    """A zero that depends on the parameters of modules, since DDP expects all parameters in every step."""
    return torch.stack([0.0 * p.sum() for module in unused for p in module.parameters()]).sum()
