"""Stage 2: trains the prior on text and image tokens (section 2.2, appendix B)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dalle_zoo.adapters import LoRAConfig, add_adapters, merged_weights, save_adapters
from dalle_zoo.data import CodeDataset
from dalle_zoo.files import sha256_file
from dalle_zoo.model_folder import ADAPTER, WEIGHTS
from dalle_zoo.models.gradient_scaling import ScaledBranch
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, PriorLoss
from dalle_zoo.models.initial import shapes_only
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.tokenizer import ImageTokenizer
from dalle_zoo.networks import load_image_tokenizer, load_prior, read_prior, save_network
from dalle_zoo.sampling import derive_seed, sample_codes
from dalle_zoo.training.base import STAGES, StageModule, build, weights_digest
from dalle_zoo.training.data_modules import LENGTH, SIZE, CaptionedDataModule, CodeDataModule, ImageDataModule
from dalle_zoo.training.layer_tokens import LayerTokens, image_tokens
from dalle_zoo.training.muon import MuonConfig
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names
from dalle_zoo.training.samples import Samples
from dalle_zoo.training.schedules import LearningRate
from dalle_zoo.training.strategy_hooks import hooks_of
from dalle_zoo.training.words import freeze_all_but_words, limit_to_words
from dalle_zoo.weights import read_headers, without_storage
from dalle_zoo.zoo import find_component, model_component

TARGETS = "text_targets"
"""Key of the text tokens of the loss in a batch."""


@STAGES.register("prior")
class PriorModule(StageModule):
    """Trains a prior; the defaults are the paper's recipe.

    With ``init_from`` it fine-tunes any prior that the library opens, native or converted, and takes from that model
    whatever is not stated: architecture, image tokenizer, text tokenizer and the sizes of the data.

    Args:
        config: Architecture of a `Prior`. Defaults to that of ``init_from``, whatever its type.
        image_tokenizer: Folder or name of a model whose image tokenizer encodes images and decodes sample images.
            Defaults to that of ``init_from``, if it has one. May be omitted when training from code shards; no sample
            images are generated then.
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
        tune: What is trained of the weights of ``init_from``: "lora", adapters of the matrices; "words", the
            embeddings of text tokens. Defaults to all weights.
        lora: Which matrices get adapters, and their size. Defaults to those of `LoRAConfig`.
        words: With tune "words", the words whose tokens alone are trained. Defaults to all text tokens.
    """

    stage = "prior"
    config_class = PriorConfig
    data_classes = (ImageDataModule, CodeDataModule)
    entries = ("forward", "loss")
    generates_from_captions = True
    net: ImagePrior

    def __init__(
        self,
        config: PriorConfig | None = None,
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
        tune: Literal["lora", "words"] | None = None,
        lora: LoRAConfig | None = None,
        words: list[str] | None = None,
    ) -> None:
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {caption_dropout}")
        if grow_from is not None and init_from is not None:
            raise ValueError("grow_from and init_from both give the first weights: set one of the two to null")
        _check_tuning(tune, lora, words, init_from, muon)
        super().__init__(build(partial(_network, config, init_from, attention)), adamw, learning_rate, seed, muon)
        self.kind = PRIORS.name_of(type(self.net))  # before a strategy that shards replaces the network's class
        self._run_blocks(recompute, compile)
        self.attention = attention
        self.init_from = init_from
        self.start_from(init_from)
        if grow_from is not None:
            self._grow_from(grow_from)
        self.caption_dropout = caption_dropout
        if caption_dropout:
            self.net.null_text()  # raises if the prior has no empty caption
        self.num_samples = num_samples
        self.tune, self.words = tune, words
        self._embeddings: list[nn.Parameter] = []  # those that tune "words" trains
        self._limits: list[RemovableHandle] = []
        if tune is not None:
            self._tune(lora or LoRAConfig())
        # In a tuple, so that the frozen network is not a submodule: not trained, not averaged, not in checkpoints.
        self._frozen: tuple[ImageTokenizer, ...] = ()
        own = model_component(init_from, "dvae")
        self.image_tokenizer = str(own) if image_tokenizer is None and own is not None else image_tokenizer
        if self.image_tokenizer is not None:
            tokenizer = load_image_tokenizer(find_component(self.image_tokenizer, "dvae"))
            self._check_tokenizer(tokenizer)
            self._frozen = (tokenizer.requires_grad_(False).eval(),)
            self._layer_tokens = LayerTokens(tokenizer)

    def _run_blocks(self, recompute: bool, compile: bool) -> None:
        """Sets how residual blocks run."""
        blocks = self.net.residual_blocks()
        for name in [name for name, wanted in (("recompute", recompute), ("compile", compile)) if wanted]:
            if not blocks:
                raise ValueError(
                    f"{type(self.net).__name__} has no residual blocks for model.{name}: set it to false, and a "
                    "smaller data.batch_size if memory does not suffice"
                )
        for block in blocks:
            block.residual.recompute = recompute
            block.residual.compiled = compile
        self.compiled = compile

    def _tune(self, lora: LoRAConfig) -> None:
        """Freezes the weights, all but adapters or the embeddings of text tokens."""
        if self.deferred:
            raise ValueError(f"model.tune {self.tune} needs the complete network in each process: use strategy ddp")
        if self.tune == "lora":
            add_adapters(self.net, lora, self.seed)
            self.decayed = decayed_names(self.net)
            return
        self._embeddings = freeze_all_but_words(self.net)
        self.decayed = frozenset()  # words that are in no caption stay as they are

    def _grow_from(self, location: str) -> None:
        if self.deferred:
            raise ValueError("grow_from needs the complete network in each process: use strategy ddp")
        small = load_prior(find_component(location, self.stage))
        if not isinstance(small, Prior) or not isinstance(self.net, Prior):
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

    def configure_model(self) -> None:
        """Shards or initializes the network; called by Lightning."""
        strategy = hooks_of(self.trainer.strategy)
        if self.tune is not None and (strategy.shards or strategy.needs_units):
            raise ValueError(f"model.tune {self.tune} trains in complete networks: use strategy auto or ddp")
        super().configure_model()

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

    @property
    def image_size(self) -> int | None:
        """Side of the images that become the grid of codes, pixels; None without an image tokenizer."""
        return self.net.config.image_height * self._frozen[0].factor if self._frozen else None

    @property
    def grid_size(self) -> int:
        """Image tokens in a row."""
        width: int = self.net.config.image_width
        return width

    def complete_data(self, data: LightningDataModule) -> None:
        """Adds the text tokenizer of the model that training starts from, and the network's encoding of captions."""
        super().complete_data(data)
        if isinstance(data, CaptionedDataModule):
            own = model_component(self.init_from, "tokenizer")
            data.complete(None if own is None else str(own), self.net.config.text_length, self.net.caption_encoder)

    def check_data(self, data: LightningDataModule) -> None:
        """Raises `ValueError` unless the captions and codes fit the network."""
        super().check_data(data)
        if not isinstance(data, CaptionedDataModule):
            return
        if data.text is None:
            raise ValueError("the prior is trained on captions: set data.init_args.text")
        assert data.tokenizer is not None, "setup comes first"
        fits = {"text_length": (data.text.length or LENGTH, "data.init_args.text.length")}
        if self._weights is None:  # fresh weights can have any size
            fits["text_vocab"] = data.tokenizer.vocab_size, f"the vocabulary of the tokenizer {data.text.tokenizer!r}"
        self._check_sizes(fits)
        self.net.check_tokenizer(data.tokenizer)
        if self.words is not None:
            for limit in self._limits:  # of an earlier check
                limit.remove()
            self._limits = limit_to_words(self._embeddings, self.words, self.net.caption_encoder(data.tokenizer))
        for codes in data.opened.values():
            if isinstance(codes, CodeDataset):
                self._check_codes(codes)
        if isinstance(data, ImageDataModule):
            self._check_images(data.image_size or SIZE)

    def _check_sizes(self, fits: dict[str, tuple[int, str]]) -> None:
        for name, (have, what) in fits.items():
            want = getattr(self.net.config, name)
            if have != want:
                raise ValueError(
                    f"{what} is {have}, the prior's config.{name} {want}: set model.config.{name} to {have}"
                )

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
        return {"model.image_tokenizer": weights_digest(self._frozen[0])} if self._frozen else {}

    def codes(self, batch: dict[str, Any]) -> Tensor:
        """Returns the image tokens (B, h, w) of a batch: stored codes, or those of its layers or images."""
        if "codes" in batch:
            codes: Tensor = batch["codes"]
            return codes
        if not self._frozen:
            raise ValueError("the batch holds images: set model.image_tokenizer, or train from code shards")
        if self._layer_tokens is not None and "layers" in batch:
            return self._layer_tokens(batch)
        return image_tokens(self._frozen[0], batch["image"])

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Selects the text tokens of the loss on the host, so that no step waits for a GPU to count them.

        Captions that are dropped have no tokens. They are dropped later, so then the step selects the tokens itself.
        """
        if self.caption_dropout or "text" not in batch:
            return batch
        return {**batch, TARGETS: self.net.text_targets(batch["text"])}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted cross-entropy of text and image tokens."""
        text = batch["text"]
        if self.caption_dropout:
            generator = self.noise_generator(batch_idx)
            dropped = torch.rand(len(text), generator=generator, device=self.device) < self.caption_dropout
            text = torch.where(dropped[:, None], self.net.null_text(), text)
        loss = self.net.loss(text, self.codes(batch), self._text_tokens(text), batch.get(TARGETS))
        self.log("train/loss", loss.total)
        self._log_parts("train", loss, len(text))
        self.observe_loss(loss.total)
        return loss.total

    def _text_tokens(self, text: Tensor) -> Tensor:
        """Mean number of text tokens per process, since captions differ in length between processes."""
        count = self.net.is_text_target(text).sum().float()
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

    def architecture(self) -> dict[str, Any]:
        """Architecture of the network as plain data, with its type unless it is a `Prior`."""
        return ({} if self.kind == self.stage else {"type": self.kind}) | super().architecture()

    def export(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the trained weights, with adapters merged into the matrices."""
        merged = merged_weights(self.net) if self.tune == "lora" else weights
        save_network(self.net, self.kind, folder, weights=merged)

    def exports(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Callable[[Path], None]]:
        """The prior, and its adapters alone if it has any."""
        exports = super().exports(weights)
        if self.tune == "lora" and self.init_from is not None:
            base_folder = find_component(self.init_from, self.stage)
            exports[ADAPTER] = partial(save_adapters, self.net, base=self.init_from, base_folder=base_folder)
        return exports

    @property
    def missing_for_samples(self) -> str:
        """Says that images need an image tokenizer."""
        return "" if self._frozen else "set model.image_tokenizer to the model that encoded the images"

    @property
    def has_sample_images(self) -> bool:
        """Whether there is an image tokenizer, and a process holds the unsharded network."""
        return bool(self._frozen) and not self._sharded

    def network_of(self, weights: Mapping[str, Tensor]) -> ImagePrior:
        """Builds the unsharded network with given weights."""
        with shapes_only():
            net = PRIORS[self.kind](self.net.config)
        net.load_state_dict(weights, assign=True)
        net.use_attention(self.attention)
        return net

    @torch.no_grad()
    def sample_images(self, batch: dict[str, Any], network: nn.Module | None = None) -> dict[str, Samples]:
        """Images generated from the captions of a batch, next to reconstructions of its images if it has them."""
        net = network if isinstance(network, ImagePrior) else self.net
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


def _network(config: PriorConfig | None, init_from: str | None, attention: str) -> ImagePrior:
    """Builds the network of a config, or of the model that training starts from."""
    if config is not None:
        return Prior(config, attention)
    if init_from is None:
        raise ValueError(
            "model.init_args.config is missing: state the architecture, or a model to start from in init_from"
        )
    folder = find_component(init_from, PriorModule.stage)
    cls, own = read_prior(folder)
    net: ImagePrior = without_storage(lambda: cls(own), read_headers(folder / WEIGHTS))  # the weights follow
    net.use_attention(attention)
    return net


def _check_tuning(
    tune: str | None, lora: LoRAConfig | None, words: list[str] | None, init_from: str | None, muon: MuonConfig | None
) -> None:
    """Raises `ValueError` for options that contradict each other."""
    if words is not None and (tune != "words" or not words):
        raise ValueError("model.words must name words, and needs model.tune words: set it, or leave model.words out")
    if lora is not None and tune != "lora":
        raise ValueError(f"model.lora has no effect with model.tune {tune or 'null'}: set model.tune to lora")
    if tune is None:
        return
    if init_from is None:
        raise ValueError(f"model.tune {tune} keeps most weights as they are: set model.init_from to a trained model")
    if muon is not None:
        raise ValueError(f"muon updates complete matrices, which model.tune {tune} does not: leave model.muon out")
