"""Stage 2: trains the prior on text and image tokens (section 2.2, appendix B)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from dalle_zoo.data import CodeDataset
from dalle_zoo.files import sha256_file
from dalle_zoo.model_folder import WEIGHTS
from dalle_zoo.models.gradient_scaling import ScaledBranch
from dalle_zoo.models.initial import shapes_only
from dalle_zoo.models.prior import Prior, PriorConfig, PriorLoss
from dalle_zoo.models.tokenizer import ImageTokenizer
from dalle_zoo.networks import load_image_tokenizer, load_prior
from dalle_zoo.sampling import derive_seed, sample_codes
from dalle_zoo.training.base import STAGES, StageModule, build
from dalle_zoo.training.data_modules import CaptionedDataModule, CodeDataModule, ImageDataModule
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.optimizer import AdamWConfig
from dalle_zoo.training.samples import Samples
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.zoo import find_component


@STAGES.register("prior")
class PriorModule(StageModule):
    """Trains a `Prior`; the defaults are the paper's recipe.

    Args:
        config: Architecture.
        image_tokenizer: Folder or name of a model whose image tokenizer encodes images and decodes sample images.
            May be omitted when training from code shards; no sample images are generated then.
        caption_dropout: Share of captions replaced by the empty caption, for classifier-free guidance. Defaults to 0,
            as in the paper.
        adamw: Optimizer settings.
        learning_rate: Learning-rate schedule.
        seed: Seed of the dropped captions and of the sample images.
        init_from: Name or folder of a model whose weights training starts from. Defaults to fresh weights.
        attention: Attention back-end.
        recompute: Whether residual blocks store only their input and are recomputed in the backward pass.
        compile: Whether to compile the branch of each residual block; on the CPU this needs a C++ compiler.
        num_samples: Maximum number of captions for which sample images are generated.
        muon: Settings of Muon for the matrices of the residual blocks. Defaults to AdamW for all parameters.
        grow_from: Model, by name or folder, whose prior has a smaller grid of the same codes; training starts from its
            weights, each row and column embedding repeated. Defaults to none.
    """

    stage = "prior"
    config_class = PriorConfig
    data_classes = (ImageDataModule, CodeDataModule)
    entries = ("forward", "loss")
    generates_from_captions = True
    net: Prior

    def __init__(
        self,
        config: PriorConfig,
        image_tokenizer: str | None = None,
        caption_dropout: float = 0.0,
        adamw: AdamWConfig = AdamWConfig(beta2=0.96, weight_decay=4.5e-2, variance_clip=5.0),  # noqa: B008 (frozen)
        learning_rate: LearningRate = LearningRate(),  # noqa: B008 (frozen)
        seed: int = 0,
        init_from: str | None = None,
        attention: str = "auto",
        recompute: bool = False,
        compile: bool = False,
        num_samples: int = 8,
        muon: MuonConfig | None = None,
        grow_from: str | None = None,
    ) -> None:
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {caption_dropout}")
        super().__init__(build(lambda: Prior(config, attention)), adamw, learning_rate, seed, muon)
        for block in self.net.residual_blocks():
            block.residual.recompute = recompute
            block.residual.compiled = compile
        self.compiled, self.attention = compile, attention
        if grow_from is not None and init_from is not None:
            raise ValueError("grow_from and init_from both give the first weights: set one of the two to null")
        self.start_from(init_from)
        if grow_from is not None:
            self._grow_from(grow_from)
        self.caption_dropout = caption_dropout
        self.num_samples = num_samples
        # In a tuple, so that the frozen network is not a submodule: not trained, not averaged, not in checkpoints.
        self._frozen: tuple[ImageTokenizer, ...] = ()
        self.image_tokenizer = image_tokenizer
        if image_tokenizer is not None:
            tokenizer = load_image_tokenizer(find_component(image_tokenizer, "dvae"))
            self._check_tokenizer(tokenizer)
            self._frozen = (tokenizer.requires_grad_(False).eval(),)

    def _grow_from(self, location: str) -> None:
        if self.deferred:
            raise ValueError("grow_from needs the complete network in each process: use strategy ddp")
        small = load_prior(find_component(location, self.stage))
        if not isinstance(small, Prior):
            raise ValueError(f"grow_from {location!r} is a {type(small).__name__}, expected a Prior")
        self.net.grow_from(small)

    def hidden_matrices(self) -> frozenset[str]:
        """Names of the matrices of every attention and every MLP."""
        inside = {id(p) for block in self.net.residual_blocks() for p in block.branch.parameters() if p.ndim == 2}
        return frozenset(name for name, p in self.net.named_parameters() if id(p) in inside)

    @classmethod
    def num_parameters(cls, config: PriorConfig) -> int:
        """Number of parameters of a prior, without building it."""
        return sum(config.count_parameters().values())

    def sharding_units(self) -> list[nn.Module]:
        """The attention and the MLP of every layer."""
        return [block.branch for block in self.net.residual_blocks()]

    def on_fit_start(self) -> None:
        """Rejects what PyTorch cannot compile: weights of FSDP1, and float16 emulated on the CPU."""
        if not self.compiled:
            return
        if not hooks_of(self.trainer.strategy).compiles:
            raise ValueError("model.compile does not work with strategy fsdp: use fsdp2, or set it to false")
        arounds = [block.residual.around for block in self.net.residual_blocks()]
        if any(isinstance(around, ScaledBranch) and around.carrier == "emulated" for around in arounds):
            raise ValueError(
                "model.compile does not work with precision 16-resblock on the CPU, where float16 is emulated: use "
                "another precision, or set it to false"
            )

    def _check_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        want, have = self.net.config.codebook_size, tokenizer.codebook_size
        if want != have:
            raise ValueError(
                f"the image tokenizer has {have} codes, the prior's config expects {want}: set codebook_size to {have}"
            )

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` unless the captions and codes fit the network."""
        super().check_data(data)
        if not isinstance(data, CaptionedDataModule):
            return
        if data.text is None:
            raise ValueError("the prior is trained on captions: set data.init_args.text")
        assert data.tokenizer is not None, "setup comes first"
        fits = {
            "text_length": (data.text.length, "data.init_args.text.length"),
            "text_vocab": (data.tokenizer.vocab_size, f"the vocabulary of the tokenizer {data.text.tokenizer!r}"),
        }
        self._check_sizes(fits)
        for codes in data.opened.values():
            if isinstance(codes, CodeDataset):
                self._check_codes(codes)
        if isinstance(data, ImageDataModule):
            self._check_images(data.image_size)

    def _check_sizes(self, fits: dict[str, tuple[int, str]]) -> None:
        for name, (have, what) in fits.items():
            want = getattr(self.net.config, name)
            if have != want:
                raise ValueError(f"{what} is {have}, the prior's config.{name} {want}: set it to {have}")

    def _check_codes(self, codes: CodeDataset) -> None:
        location = str(codes.folder)
        self._check_sizes(
            {
                "codebook_size": (codes.codebook_size, f"the codebook of {location!r}"),
                "image_height": (codes.grid[0], f"the height of the codes of {location!r}"),
                "image_width": (codes.grid[1], f"the width of the codes of {location!r}"),
            }
        )
        wrote = codes.manifest["tokenizer"].get("weights_sha256")
        if wrote is None or self.image_tokenizer is None:
            return
        own = sha256_file(find_component(self.image_tokenizer, "dvae") / WEIGHTS)
        if own != wrote:
            raise ValueError(
                f"the codes of {location!r} were written by other weights than those of the image tokenizer "
                f"{self.image_tokenizer!r}: expected sha256 {own}, got {wrote}; encode again with it, or set "
                "model.init_args.image_tokenizer to the tokenizer that wrote them"
            )

    def _check_images(self, size: int) -> None:
        if not self._frozen:
            raise ValueError("the data are images: set model.init_args.image_tokenizer, or train from code shards")
        config, factor = self.net.config, self._frozen[0].factor
        if (size, size) != (config.image_height * factor, config.image_width * factor):
            raise ValueError(
                f"data.init_args.image_size is {size}, which the image tokenizer turns into {size // factor}x"
                f"{size // factor} codes; the prior's config expects {config.image_height}x{config.image_width}: set "
                f"image_size to {config.image_height * factor}, or image_height and image_width to match"
            )

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights of the image tokenizer, which determine the codes of images."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._frozen[0].state_dict().items() if self._frozen else ()):
            digest.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return {"model.image_tokenizer": digest.hexdigest()} if self._frozen else {}

    def codes(self, batch: dict[str, Any]) -> Tensor:
        """Returns the image tokens (B, h, w) of a batch: stored codes, or the argmax codes of its images."""
        if "codes" in batch:
            codes: Tensor = batch["codes"]
            return codes
        if not self._frozen:
            raise ValueError("the batch holds images: set model.image_tokenizer, or train from code shards")
        tokenizer = self._frozen[0].to(self.device)
        # In float32 with any precision of the trainer, so that images give the same codes as code shards.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return tokenizer.encode(batch["image"].float())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted cross-entropy of text and image tokens."""
        text = batch["text"]
        if self.caption_dropout:
            generator = self.noise_generator(batch_idx)
            dropped = torch.rand(len(text), generator=generator, device=self.device) < self.caption_dropout
            text = torch.where(dropped[:, None], self.net.null_text(), text)
        loss = self.net.loss(text, self.codes(batch), self._text_tokens(text))
        self.log("train/loss", loss.total, prog_bar=True)
        self._log_parts("train", loss, len(text))
        self.observe_loss(loss.total)
        return loss.total

    def _text_tokens(self, text: Tensor) -> Tensor:
        """Mean number of text tokens per process, since captions differ in length between processes."""
        count = self.net.is_token(text).sum().float()
        return self.trainer.strategy.reduce(count, reduce_op="mean")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the losses, and the image loss in bits per token."""
        loss = self.net.loss(batch["text"], self.codes(batch))
        self.log("val/loss", loss.total, batch_size=len(batch["text"]), sync_dist=True)
        self._log_parts("val", loss, len(batch["text"]))

    def _log_parts(self, split: str, loss: PriorLoss, size: int) -> None:
        sync = split == "val"
        parts = {
            f"{split}/text_loss": loss.text,
            f"{split}/image_loss": loss.image,
            f"{split}/image_bits": loss.image / math.log(2),
        }
        self.log_dict(parts, batch_size=size, sync_dist=sync)

    @property
    def missing_for_samples(self) -> str:
        """Says that images need an image tokenizer."""
        return "" if self._frozen else "set model.image_tokenizer to the model that encoded the images"

    @property
    def has_sample_images(self) -> bool:
        """Whether there is an image tokenizer, and a process holds the unsharded network."""
        return bool(self._frozen) and not self._sharded

    def network_of(self, weights: Mapping[str, Tensor]) -> Prior:
        """Builds the unsharded network with given weights."""
        with shapes_only():
            net = Prior(self.net.config, self.attention)
        net.load_state_dict(weights, assign=True)
        return net

    @torch.no_grad()
    def sample_images(self, batch: dict[str, Any], network: nn.Module | None = None) -> dict[str, Samples]:
        """Images generated from the captions of a batch, next to reconstructions of its images if it has them."""
        net = network if isinstance(network, Prior) else self.net
        if not self._frozen or (net is self.net and self._sharded):
            return {}
        tokenizer = self._frozen[0].to(self.device)
        only_captions = "codes" not in batch and "image" not in batch
        count = len(batch["text"]) if only_captions else min(self.num_samples, len(batch["text"]))
        text = batch["text"][:count]
        seeds = torch.tensor([[derive_seed(self.seed, "grid", i)] for i in range(count)], device=self.device)
        sampled = tokenizer.decode(sample_codes(net, text, seeds)[:, 0])
        captions = batch["caption"][:count] if "caption" in batch else None
        if only_captions:
            return {"samples": Samples((sampled,), captions)}
        return {"samples": Samples((tokenizer.decode(self.codes(batch)[:count]), sampled), captions)}
