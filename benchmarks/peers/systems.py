"""The compared priors behind one interface: dalle-zoo, three DALL-E packages and a language model of transformers.

All have random weights, and the depth, width, heads, positions and vocabularies of a `Shape`. Each is called as its
own sampling loop calls it, with its cache, and samples at temperature 1 without filters. Blocks differ between
packages, so numbers of parameters do too.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from decoding import make_prior
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.repairs import import_peer
from dalle_zoo.models.cpu.linears import packed_linears
from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.sampling import SamplingOptions

TEXT_VOCAB, CODES = 16384, 8192


@dataclass(frozen=True)
class Shape:
    """Shape of a prior."""

    name: str
    layers: int
    width: int
    text: int
    """Text positions."""
    side: int
    """Rows and columns of the image."""

    @property
    def heads(self) -> int:
        """Attention heads of 64."""
        return self.width // 64

    @property
    def image(self) -> int:
        """Image positions."""
        return self.side**2

    def __str__(self) -> str:
        tokens = f"{self.text} text and {self.side} x {self.side} image tokens"
        return f"{self.name}: {self.layers} layers of width {self.width}, {tokens}"


SHAPES = {
    "S": Shape("S", 12, 512, 64, 16),
    "M": Shape("M", 24, 1024, 256, 32),
}


def sample(logits: Tensor) -> Tensor:
    """Samples codes from logits, (B, K) to (B,)."""
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


class System(ABC):
    """A prior with a cache.

    Args:
        shape: Shape of the network.
        dtype: Dtype of weights and computation.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    trains: ClassVar[bool] = True
    """Whether the package can train the network."""
    network: nn.Module

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        torch.manual_seed(0)
        self.build()
        self.network = self.network.to("cpu", dtype).eval()  # ruDALL-E takes the first argument for a device
        self.dtype = dtype
        generator = torch.Generator().manual_seed(1)
        self.caption = torch.randint(2, TEXT_VOCAB, (1, shape.text), generator=generator)
        self.codes = torch.randint(CODES, (64, shape.image), generator=generator)

    @abstractmethod
    def build(self) -> None:
        """Builds the network."""

    @abstractmethod
    def start(self, batch: int, position: int) -> Tensor:
        """Prefills the caption, prepares for sampling, and returns the codes of image token ``position``, (batch,)."""

    @abstractmethod
    def step(self, previous: Tensor) -> Tensor:
        """Adds the previous codes and returns those of the next image token."""

    @abstractmethod
    def loss(self, batch: int) -> Tensor:
        """Loss of text and image tokens."""

    @abstractmethod
    def cached_difference(self) -> float:
        """Largest difference of the logits of the third image token, with the cache and by a complete forward pass."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the prior."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @classmethod
    def release(cls) -> str:
        """Name and version of the package."""
        return f"{cls.package} {version(cls.package)}"

    def captions(self, batch: int) -> Tensor:
        """The caption for each image, (batch, T)."""
        return self.caption.expand(batch, -1).clone()


class DalleZoo(System):
    """dalle-zoo: candidates of one prompt share the keys of the caption."""

    name, package = "dalle-zoo", "dalle-zoo"
    own_prompts = False
    """Whether each image has its own prompt."""

    def build(self) -> None:
        """Builds the paper's prior, with its row, column and convolutional masks."""
        s = self.shape
        config = PriorConfig(
            text_length=s.text, image_height=s.side, image_width=s.side, width=s.width, num_heads=s.heads,
            num_layers=s.layers,
        )  # fmt: skip
        self.network: Any = make_prior(config, torch.float32)
        self.packing = ExitStack()

    def start(self, batch: int, position: int) -> Tensor:
        """The cost of a step does not depend on the values in the cache, so earlier positions are skipped."""
        prompts = batch if self.own_prompts else 1
        self.seeds, self.index = torch.arange(batch), position
        self.packing.close()
        self.packing.enter_context(packed_linears(self.network, batch))  # as `sample_codes` does
        self.decoder = self.network.decoding(self.captions(prompts), batch // prompts)
        return self._sample(self.codes[:batch, position - 1] if position else None)

    def step(self, previous: Tensor) -> Tensor:
        """One step of the decoder."""
        self.index += 1
        return self._sample(previous)

    def _sample(self, previous: Tensor | None) -> Tensor:
        previous = None if previous is None else previous.view(self.decoder.shape)
        logits = self.decoder.step(self.index, previous)
        return SamplingOptions().sample(logits.flatten(0, 1), self.seeds, self.index)

    def loss(self, batch: int) -> Tensor:
        """The paper's loss."""
        self.packing.close()
        codes = self.codes[:batch].view(batch, self.shape.side, self.shape.side)
        total: Tensor = self.network.loss(self.captions(batch), codes).total
        return total

    def cached_difference(self) -> float:
        """Three steps against `Prior.image_logits`."""
        codes = self.codes[:1]
        with packed_linears(self.network, 1):
            decoder = self.network.decoding(self.caption, 1)
            for index in range(3):
                logits = decoder.step(index, codes[:, index - 1][None] if index else None)
        complete = self.network.image_logits(self.caption, codes.view(1, self.shape.side, -1))
        return float((logits[0, 0] - complete[0, 2]).abs().max())


class DallePytorch(System):
    """DALLE-pytorch with its defaults: full attention, rotary embeddings, shifted tokens."""

    name, package = "DALLE-pytorch", "dalle-pytorch"

    def build(self) -> None:
        """Builds the network around a small image tokenizer, which is not called."""
        s, self.module = self.shape, import_peer("dalle_pytorch")
        vae = self.module.DiscreteVAE(
            image_size=8 * s.side, num_layers=3, num_tokens=CODES, codebook_dim=8, hidden_dim=8
        )
        self.network: Any = self.module.DALLE(
            dim=s.width, vae=vae, num_text_tokens=TEXT_VOCAB, text_seq_len=s.text, depth=s.layers, heads=s.heads
        )

    @property
    def parameters(self) -> int:
        """Number of parameters without the image tokenizer."""
        return super().parameters - sum(parameter.numel() for parameter in self.network.vae.parameters())

    def start(self, batch: int, position: int) -> Tensor:
        """Prefills caption and codes."""
        self.text, self.before, self.cache = self.captions(batch), self.codes[:batch, :position], {}
        return self._sample()

    def step(self, previous: Tensor) -> Tensor:
        """One round of the loop of `generate_images`."""
        self.before = torch.cat([self.before, previous[:, None]], 1)
        return self._sample()

    def _sample(self) -> Tensor:
        logits = self.network.forward_with_cond_scale(self.text, self.before, cond_scale=1, cache=self.cache)
        codes: Tensor = self.module.dalle_pytorch.gumbel_sample(logits[:, -1], temperature=1.0)
        return codes - self.network.num_text_tokens

    def loss(self, batch: int) -> Tensor:
        """Its loss, text to image 1 : 7."""
        loss: Tensor = self.network(self.captions(batch), self.codes[:batch], return_loss=True)
        return loss

    def cached_difference(self) -> float:
        """Three cached calls against one without a cache."""
        cache: dict[Any, Any] = {}
        for count in range(3):
            logits = self.network(self.caption, self.codes[:1, :count], cache=cache)
        complete = self.network(self.caption, self.codes[:1, :2])
        return float((logits[:, -1] - complete[:, -1])[:, -CODES:].abs().max())


class RuDalle(System):
    """ruDALL-E, with its row, column and convolutional masks."""

    name, package = "ruDALL-E", "rudalle"

    def build(self) -> None:
        """Builds the network of version 3, without dropout."""
        s, self.module = self.shape, import_peer("rudalle")
        self.vocab = TEXT_VOCAB + s.text  # a padding token per position
        self.network: Any = self.module.dalle.model.DalleModel(
            "cpu", num_layers=s.layers, vocab_size=self.vocab, hidden_size=s.width, num_attention_heads=s.heads,
            embedding_dropout_prob=0.0, attention_dropout_prob=0.0, output_dropout_prob=0.0, text_seq_length=s.text,
            image_tokens_per_dim=s.side, image_vocab_size=CODES,
        )  # fmt: skip

    def mask(self, batch: int) -> Tensor:
        """The causal mask of `generate_images`."""
        length = self.shape.text + self.shape.image
        return torch.ones(batch, 1, length, length, dtype=self.dtype).tril()

    def start(self, batch: int, position: int) -> Tensor:
        """Prefills caption and codes."""
        self.tokens = torch.cat([self.captions(batch), self.codes[:batch, :position]], 1)
        self.causal, self.cache = self.mask(batch), None
        return self._sample()

    def step(self, previous: Tensor) -> Tensor:
        """One round of the loop of `generate_images`."""
        self.tokens = torch.cat([self.tokens, previous[:, None]], 1)
        return self._sample()

    def _sample(self) -> Tensor:
        logits, self.cache = self.network(self.tokens, self.causal, use_cache=True, cache=self.cache)
        return sample(logits[:, -1, self.vocab :])

    def loss(self, batch: int) -> Tensor:
        """Its loss, text to image 1 : 7."""
        tokens = torch.cat([self.captions(batch), self.codes[:batch]], 1)
        loss: Tensor = self.network(tokens, self.mask(batch), return_loss=True)[0]
        return loss

    def cached_difference(self) -> float:
        """Three cached calls against one without a cache."""
        cache, mask = None, self.mask(1)
        for count in range(3):
            tokens = torch.cat([self.caption, self.codes[:1, :count]], 1)
            logits, cache = self.network(tokens, mask, use_cache=True, cache=cache)
        complete, _ = self.network(tokens, mask)
        return float((logits[:, -1] - complete[:, -1])[:, self.vocab :].abs().max())


class MinDalle(System):
    """min-dalle: an encoder and a decoder of the given depth each, with two sequences per image for its guidance."""

    name, package, trains = "min-dalle", "min-dalle", False

    def build(self) -> None:
        """Builds both networks; gated linear units have the inner width of the released models, 8 / 3."""
        s, self.module = self.shape, import_peer("min_dalle")
        self.module.models.dalle_bart_decoder.IMAGE_TOKEN_COUNT = s.image
        inner = 8 * s.width // 3
        encoder = self.module.models.DalleBartEncoder(s.layers, s.width, s.heads, TEXT_VOCAB, s.text, inner, "cpu")
        decoder = self.module.models.DalleBartDecoder(CODES, s.width, s.heads, inner, s.layers, "cpu")
        self.network: Any = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def start(self, batch: int, position: int) -> Tensor:
        """Encodes the caption. The cost of a step does not depend on the position, so earlier ones are skipped."""
        self._encode(batch)
        self.index = position
        return self._sample(torch.full((batch,), CODES))

    def step(self, previous: Tensor) -> Tensor:
        """One round of the loop of `generate_raw_image_stream`."""
        self.index += 1
        return self._sample(previous)

    def _encode(self, batch: int) -> None:
        text = torch.cat([torch.ones_like(self.caption), self.caption])  # the first is the empty caption
        text[0, :2] = self.caption[0, :2]
        both = [0] * batch + [1] * batch
        encoded = self.network["encoder"](text)[both]
        state = torch.zeros(self.shape.layers, 4 * batch, self.shape.image, self.shape.width, dtype=self.dtype)
        self.given = {"attention_mask": (text != 1)[both][:, None, None], "encoder_state": encoded}
        self.state = {"attention_state": state}

    def _sample(self, previous: Tensor) -> Tensor:
        settings = torch.tensor([1.0, CODES, 1.0])  # temperature, codes to sample from, guidance
        codes, state = self.network["decoder"].sample_tokens(
            settings, prev_tokens=previous[:, None], token_index=torch.tensor([self.index]), **self.given, **self.state
        )
        self.state = {"attention_state": state}
        return codes.clamp(max=CODES - 1)

    def loss(self, batch: int) -> Tensor:
        """Not defined: the package only samples."""
        raise NotImplementedError("min-dalle only samples")

    def cached_difference(self) -> float:
        """Three steps against one call with three tokens."""
        self._encode(1)
        tokens = torch.cat([torch.full((1, 1), CODES), self.codes[:1, :2]], 1)
        decoder = self.network["decoder"]
        for index in range(3):
            logits, state = decoder(
                prev_tokens=tokens[:, [index]], token_index=torch.tensor([index]), **self.given, **self.state
            )
            self.state = {"attention_state": state}
        complete, _ = decoder(prev_tokens=tokens, token_index=torch.arange(3), **self.given, **self.state)
        return float((logits[:, -1] - complete[:, -1]).abs().max())


class Llama(System):
    """A language model of transformers over both vocabularies, with a static cache."""

    name, package = "Llama", "transformers"

    def build(self) -> None:
        """Builds the network with gated linear units of inner width 8 / 3, so that it has as many parameters."""
        from transformers import LlamaConfig, LlamaForCausalLM

        s = self.shape
        self.config = LlamaConfig(
            vocab_size=TEXT_VOCAB + CODES, hidden_size=s.width, intermediate_size=8 * s.width // 3,
            num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.heads,
            max_position_embeddings=s.text + s.image,
        )  # fmt: skip
        self.network: Any = LlamaForCausalLM(self.config)
        renamed = "cache" in inspect.signature(self.network.forward).parameters  # in transformers 5.24
        self.cache_name = "cache" if renamed else "past_key_values"

    def start(self, batch: int, position: int) -> Tensor:
        """Prefills caption and codes."""
        from transformers import StaticCache

        self.cache = StaticCache(config=self.config, max_cache_len=self.shape.text + self.shape.image)
        self.length = 0
        return sample(self._logits(torch.cat([self.captions(batch), self.codes[:batch, :position] + TEXT_VOCAB], 1)))

    def step(self, previous: Tensor) -> Tensor:
        """One step of the model."""
        return sample(self._logits(previous[:, None] + TEXT_VOCAB))

    def _logits(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + tokens.shape[1])[None]
        self.length += tokens.shape[1]
        found = self.network(tokens, position_ids=positions, logits_to_keep=1, **{self.cache_name: self.cache})
        logits: Tensor = found.logits[:, -1, TEXT_VOCAB:]
        return logits

    def loss(self, batch: int) -> Tensor:
        """Cross-entropy of all next tokens."""
        tokens = torch.cat([self.captions(batch), self.codes[:batch] + TEXT_VOCAB], 1)
        logits = self.network(tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def cached_difference(self) -> float:
        """A prefill and two steps against one call without a cache."""
        self.start(1, 0)
        for index in range(2):
            logits = self._logits(self.codes[:1, [index]] + TEXT_VOCAB)
        tokens = torch.cat([self.caption, self.codes[:1, :2] + TEXT_VOCAB], 1)
        complete = self.network(tokens, use_cache=False).logits[:, -1, TEXT_VOCAB:]
        return float((logits - complete).abs().max())


class Floor(System):
    """Each weight matrix of dalle-zoo multiplied once per token, and nothing else.

    Args:
        of: The system whose matrices are multiplied.
    """

    name, package = "floor", "dalle-zoo"

    def __init__(self, of: DalleZoo) -> None:
        self.shape, self.dtype, self.network = of.shape, of.dtype, of.network
        self.build()

    def build(self) -> None:
        """Copies the matrices, which packing moves while dalle-zoo samples."""
        linears = {name: module for name, module in self.network.named_modules() if isinstance(module, nn.Linear)}
        self.matrices = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        self.sampled = [weight for name, weight in self.matrices.items() if name != "text_head"]

    def start(self, batch: int, position: int) -> Tensor:
        """Makes inputs and multiplies once."""
        self.inputs = {size: torch.randn(batch, size).to(self.dtype) for size in {w.shape[1] for w in self.sampled}}
        return self.step(torch.zeros(batch, dtype=torch.long))

    def step(self, previous: Tensor) -> Tensor:
        """Multiplies each matrix once."""
        for weight in self.sampled:
            F.linear(self.inputs[weight.shape[1]], weight)
        return previous

    def training(self, batch: int, dtype: torch.dtype) -> Callable[[], None]:
        """Returns a training step: each matrix is multiplied at its positions, forward once and backward twice."""
        s, products = self.shape, []
        for name, weight in self.matrices.items():
            rows = batch * {"text_head": s.text, "image_head": s.image}.get(name, s.text + s.image)
            products.append((torch.randn(rows, weight.shape[1]).to(dtype), weight.to(dtype)))
        gradients = {(len(x), len(weight)): torch.randn(len(x), len(weight)).to(dtype) for x, weight in products}

        def multiply() -> None:
            for x, weight in products:
                gradient = gradients[len(x), len(weight)]
                for a, b in ((x, weight.t()), (gradient, weight), (gradient.t(), x)):
                    torch.mm(a, b)

        return multiply

    def loss(self, batch: int) -> Tensor:
        """Not defined: see `training`."""
        raise NotImplementedError("the floor of training has no loss")

    def cached_difference(self) -> float:
        """It computes no logits."""
        return 0.0


PEERS: dict[str, type[System]] = {system.name: system for system in (DallePytorch, RuDalle, MinDalle, Llama)}
"""Compared priors, by name."""
