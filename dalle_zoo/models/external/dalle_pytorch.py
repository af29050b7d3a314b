"""DALLE-pytorch's prior: text behind a <bos> token, then the image, with many options of positions and layers.

```
position   0     1    …  T    │ T+1  T+2  …  T+N-1
input      <bos> t_0  …  t_T-1│ i_0  i_1  …  i_N-2      each + text position, or row and column, unless rotary
target     t_0   t_1  …  i_0  │ i_1  i_2  …  i_N-1
           └─ text ids ─┘└──────── image tokens ───────┘  columns of one joint head
```
What differs from the paper's prior: a position holds its own token, so the last text token predicts the first image
token; id 0 of the text vocabulary is <bos>, and padding wherever a caption has it; masks are other ones, and so is
everything around attention and MLP, see `dalle_pytorch_layers`. Some layers may have block-sparse attention
(`dalle_pytorch_sparse`) or a gMLP block (`dalle_pytorch_gmlp`) instead.

Reference: https://github.com/lucidrains/DALLE-pytorch, versions 0.1 to 1.6.6; its names stand in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask, TextImageLayout, layer_masks
from dalle_zoo.models.attention import BACKENDS
from dalle_zoo.models.cache import LayerCache
from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.external.dalle_pytorch_gmlp import GateCache, GatedMixing
from dalle_zoo.models.external.dalle_pytorch_layers import (
    Attention,
    Branch,
    GatedMLP,
    ShiftCache,
    attend_readable,
    make_norm,
    rotations,
    shift_tokens,
)
from dalle_zoo.models.external.dalle_pytorch_sparse import BLOCK, BlockCache, attend_blocks, sure_blocks
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.tokenizers import TextTokenizer

# B batch, P prompts, n candidates of each, T text tokens, h w code grid, N = h * w image tokens, L = T + 1 + N
# positions of the layout, M of those that are there, d width, V text vocabulary, K codebook size

BOS = 0
"""Id in front of every caption, and of padding in a caption as it comes from the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DallePytorchConfig(ImagePriorConfig):
    """Architecture of DALLE-pytorch's prior; defaults are its own, sizes those of its training script."""

    text_length: int = 256
    """Text tokens T [text_seq_len]."""
    text_vocab: int = 49408
    """Text vocabulary V, without padding tokens [num_text_tokens]."""
    image_height: int = 32
    """Rows of the code grid; the original knows square ones alone."""
    image_width: int = 32
    """Columns of the code grid."""
    codebook_size: int = 8192
    """Image vocabulary K [vae.num_tokens]."""
    width: int = 512
    """Model width d [dim]."""
    num_layers: int = 2
    """Layers [depth]."""
    num_heads: int = 8
    """Attention heads [heads]."""
    head_size: int = 64
    """Head size D [dim_head]."""
    masks: str = "full"
    """Layer schedule of attention masks, a comma-separated cycle [attn_types]."""
    sparse_layers: tuple[int, ...] = ()
    """Numbers of the layers whose attention reads certain blocks alone; their mask is full [attn_types sparse]."""
    gmlp_layers: tuple[int, ...] = ()
    """Numbers of the layers with a gMLP block for attention; their mask is full [attn_types mlp]."""
    positions: Literal["rotary", "axial"] = "rotary"
    """Rotations in every attention, or learned text positions, rows and columns at the input [rotary_emb]."""
    padding: Literal["learned", "masked"] = "learned"
    """One learned padding token per position, or, before version 0.9, padding that is not attended to."""
    padding_id: int = BOS
    """Id that fills captions. 0, the original's, becomes the padding of its position; learning-at-home/dalle has 1."""
    shift_tokens: bool = True
    """Whether every branch sees channels of the positions before [shift_tokens]."""
    layer_scale: bool = True
    """Whether every branch has a learned scale; since version 0.8."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm; or, in versions 0.5 and 0.6, division by the root mean square, with a gain and no bias."""
    sandwich_norm: bool = False
    """Whether every branch is normalized behind too [sandwich_norm]."""
    divide_by_max: bool = False
    """Whether the last hidden state is divided by its largest number [stable]."""
    reversible: bool = False
    """Whether there are two streams, attention adding to one and the MLP to the other [reversible]."""
    tied_embeddings: bool = False
    """Whether the joint head is the table of token embeddings too [share_input_output_emb]."""
    shared_attention: tuple[int, ...] = ()
    """Number of each layer's attention, where layers share some; empty: each has its own [shared_attn_ids]."""
    shared_mlp: tuple[int, ...] = ()
    """The same for MLPs [shared_ff_ids]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers", "num_heads", "head_size")
        for name, known in (
            ("positions", ("rotary", "axial")), ("padding", ("learned", "masked")), ("norm", ("layer", "rms")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.padding_id < self.text_vocab:
            raise ValueError(f"padding_id must lie in 0..{self.text_vocab - 1}, got {self.padding_id}")
        for name in ("shared_attention", "shared_mlp"):
            numbers = tuple(getattr(self, name))  # a list in a JSON file
            object.__setattr__(self, name, numbers)
            if numbers and (len(numbers) != self.num_layers or {*numbers} != {*range(max(numbers) + 1)}):
                raise ValueError(
                    f"{name} must give each of {self.num_layers} layers a number, 0, 1 and so on, got {numbers}"
                )
        if self.shift_tokens and self.width < 2:
            raise ValueError(f"shifted tokens need a width of at least 2, got {self.width}")
        self._check_special_layers(layer_masks(self.masks, self.num_layers))  # where a typo stops, with a suggestion

    def _check_special_layers(self, masks: Sequence[str]) -> None:
        """Raises `ValueError` unless block-sparse and gMLP layers can be what they are said to be."""
        for name in ("sparse_layers", "gmlp_layers"):
            numbers = tuple(getattr(self, name))
            object.__setattr__(self, name, numbers)
            if any(number not in range(self.num_layers) or masks[number] != "full" for number in numbers):
                raise ValueError(f"{name} must be numbers of layers whose mask is full, got {numbers}")
        if {*self.sparse_layers} & {*self.gmlp_layers}:
            raise ValueError(f"a layer is either sparse or gMLP, got {self.sparse_layers} and {self.gmlp_layers}")
        if self.gmlp_layers and self.shared_attention:
            raise ValueError("gMLP layers cannot be among layers that share their attention")
        if self.sparse_layers and self.fed_length % BLOCK:
            raise ValueError(f"block-sparse attention needs a multiple of {BLOCK} positions, got {self.fed_length}")

    @property
    def layout(self) -> TextImageLayout:
        """Positions of the stream with <bos>; the last one is never fed."""
        return TextImageLayout(self.text_length + 1, self.image_height, self.image_width)

    @property
    def fed_length(self) -> int:
        """Positions but the last one."""
        return self.layout.length - 1

    @property
    def text_ids(self) -> int:
        """Rows of the table of text tokens, and text columns of the head."""
        return self.text_vocab + (self.text_length if self.padding == "learned" else 0)


class Layer(nn.Module):
    """What a layer has of its own; attention and MLP may be those of other layers too."""

    def __init__(self, config: DallePytorchConfig, index: int, mask: Mask, attention: int, mlp: int) -> None:
        super().__init__()
        first = 0.1 if index < 18 else 1e-5 if index < 24 else 1e-6
        scale = first if config.layer_scale else None
        self.attention, self.mlp = (
            Branch(config.width, norm=config.norm, norm_behind=config.sandwich_norm, scale=scale) for _ in range(2)
        )
        self.mask = mask
        self.attention_number, self.mlp_number = attention, mlp


Cache = LayerCache | BlockCache | GateCache
"""What a layer keeps while images are generated."""
Attend = Callable[[int, Tensor], Tensor]
"""Attention of a layer, given by its number, over normalized and shifted inputs."""
Shift = Callable[[int, Tensor], Tensor]
"""Shift of a branch, given by its number (2 i of the attention of layer i, 2 i + 1 of its MLP)."""


@PRIORS.register("dalle_pytorch")
class DallePytorch(ImagePrior):
    """DALLE-pytorch's transformer, for sampling.

    The original's guidance is broken: its second pass sees the same caption, and without a cache wipes it out. Here
    the empty caption has a pass of its own, as the original meant and as its weights were trained.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`.
    """

    config_class = DallePytorchConfig
    config: DallePytorchConfig
    rotation: Tensor
    blocks: Tensor

    def __init__(self, config: DallePytorchConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend = BACKENDS[backend]
        d = config.width
        if not config.tied_embeddings:
            self.text_embedding = nn.Embedding(config.text_ids, d)
            self.image_embedding = nn.Embedding(config.codebook_size, d)
        if config.positions == "rotary":
            self.register_buffer("rotation", rotations(config.layout, config.head_size))
        else:
            self.text_position = nn.Embedding(config.layout.text, d)
            self.row_position = nn.Embedding(config.image_height, d)
            self.column_position = nn.Embedding(config.image_width, d)
        if config.sparse_layers:
            self.register_buffer("blocks", sure_blocks(config.fed_length))
        specs = layer_masks(config.masks, config.num_layers)
        masks = {spec: Mask.from_spec(spec, config.layout) for spec in dict.fromkeys(specs)}
        own = tuple(range(config.num_layers))
        attentions, mlps = config.shared_attention or own, config.shared_mlp or own
        layers = nn.ModuleList(
            Layer(config, index, masks[spec], attention, mlp)
            for index, (spec, attention, mlp) in enumerate(zip(specs, attentions, mlps, strict=True))
        )
        self.layers = cast(Sequence[Layer], layers)  # what PyTorch's container does not say of its members
        self.attentions = nn.ModuleList(
            GatedMixing(d, config.fed_length)
            if number in config.gmlp_layers  # which share nothing, so that attentions have the numbers of layers
            else Attention(d, config.num_heads, config.head_size)
            for number in range(max(attentions) + 1)
        )
        self.mlps = nn.ModuleList(GatedMLP(d) for _ in range(max(mlps) + 1))
        self.final_norm = make_norm(config.norm, d)
        self.head = nn.Linear(d, config.text_ids + config.codebook_size)

    # ------------------------------------------------------------ captions

    def encode_captions(self, tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
        """Ids as the original has them, int64 (P, T): a token of id 0 is padding there, whatever it means."""
        ids = super().encode_captions(tokenizer, captions)
        ids = ids.where(ids < self.config.text_vocab, self.config.padding_id)
        if self.config.padding == "masked":
            return ids
        return ids.where(ids != BOS, torch.arange(ids.shape[1]) + self.config.text_vocab)

    def null_text(self) -> Tensor:
        """The empty caption, all padding: int64 (T,)."""
        pads = torch.arange(self.config.text_length, device=self.device) + self.config.text_vocab
        return pads if self.config.padding == "learned" else torch.full_like(pads, BOS)

    # ------------------------------------------------------------ network

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Embeddings of text tokens and of image tokens."""
        if not self.config.tied_embeddings:
            return self.text_embedding.weight, self.image_embedding.weight
        return self.head.weight[: self.config.text_ids], self.head.weight[self.config.text_ids :]

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions, <bos> first: ids (B, T) to (B, T + 1, d)."""
        x = F.embedding(F.pad(text, (1, 0), value=BOS), self._tables()[0])
        return x + self.text_position.weight if self.config.positions == "axial" else x

    def embed_image(self, codes: Tensor, first: int = 0) -> Tensor:
        """Inputs of image positions from ``first`` on: image tokens (…, M) to (…, M, d)."""
        x = F.embedding(codes, self._tables()[1])
        if self.config.positions == "rotary":
            return x
        cells = self.row_position.weight[:, None] + self.column_position.weight[None]
        return x + cells.flatten(0, 1)[first : first + codes.shape[-1]]

    def through_layers(self, x: Tensor, attend: Attend, shift: Shift) -> Tensor:
        """Runs all layers over some positions; ``attend`` and ``shift`` know where the others are.

        Args:
            x: Inputs, (…, d).
            attend: Called once per layer, in order.
            shift: Called once a branch, in order.

        Returns:
            Hidden states in front of the last normalization, (…, d).
        """
        first = second = x  # which stay one stream unless reversible
        for index, layer in enumerate(self.layers):
            inputs = shift(2 * index, layer.attention.norm(second))
            first = first + layer.attention.close(attend(index, inputs))
            if not self.config.reversible:
                second = first
            inputs = shift(2 * index + 1, layer.mlp.norm(first))
            second = second + layer.mlp.close(self.mlps[layer.mlp_number](inputs))
            if not self.config.reversible:
                first = second
        return (first + second) / 2

    def _logits(self, x: Tensor, columns: slice) -> Tensor:
        """Columns of the joint head: hidden states (…, d) to (…, columns)."""
        if self.config.divide_by_max:
            x = x / x.amax(-1, keepdim=True)
        return F.linear(self.final_norm(x), self.head.weight[columns], self.head.bias[columns])

    def image_head(self, x: Tensor) -> Tensor:
        """Logits of image tokens, which stand last in the joint head: (…, d) to (…, K)."""
        return self._logits(x, slice(self.config.text_ids, None))

    def readable(self, text: Tensor) -> Tensor | None:
        """Which text positions are attended to, bool (B, T + 1); None if all are."""
        if self.config.padding == "learned":
            return None
        return F.pad(text != BOS, (1, 0), value=True)

    def attend_stream(
        self,
        index: int,
        x: Tensor,
        readable: Tensor | None,
        caches: list[Cache] | None = None,
        candidates: int = 1,
    ) -> Tensor:
        """Attention, or gMLP block, of a layer over the first M positions at once, (B, M, d).

        Args:
            index: Number of the layer.
            x: Normalized and shifted inputs, (B, M, d).
            readable: As of `readable`.
            caches: Where a cache is added that holds these positions, if they are to be decoded from.
            candidates: Of each prompt, for the cache.
        """
        layer, length = self.layers[index], x.shape[1]
        attention = self.attentions[layer.attention_number]
        if isinstance(attention, GatedMixing):
            outputs, gates = attention.project(x)
            if caches is not None:
                caches.append(GateCache(attention, gates, candidates))
            return attention.merge(outputs, attention.mix(gates))
        attention = cast(Attention, attention)
        query, key, value = attention.project(x, self._rotation(slice(length)))
        if index in self.config.sparse_layers:
            if caches is not None:
                caches.append(BlockCache(self.blocks, key, value, candidates, readable))
            return attention.merge(attend_blocks(query, key, value, self.blocks, readable))
        if caches is not None:
            caches.append(LayerCache(layer.mask, key, value, candidates, readable))
        if readable is None:
            return attention.merge(self.backend(query, key, value, layer.mask))
        return attention.merge(attend_readable(query, key, value, layer.mask, readable))

    def attend_token(self, position: int, caches: Sequence[Cache], index: int, x: Tensor) -> Tensor:
        """Attention, or gMLP block, of a layer for one image position of every candidate, (P, n, d)."""
        attention, cache = self.attentions[self.layers[index].attention_number], caches[index]
        if isinstance(cache, GateCache):
            outputs, gates = cache.block.project(x)
            return cache.block.merge(outputs, cache.mix(position, gates))
        attention = cast(Attention, attention)
        rotation = self._rotation(self.config.layout.text + position)
        # Candidates stand where the positions of a sequence usually do: (P, n, d) → (P, H, n, D).
        query, key, value = attention.project(x, rotation)
        return attention.merge(cache.attend(position, query, key, value))

    def _rotation(self, positions: slice | int) -> Tensor | None:
        return self.rotation[:, positions] if self.config.positions == "rotary" else None

    def shift_stream(self, branch: int, x: Tensor) -> Tensor:
        """Shift of a branch over the first M positions at once, (B, M, d)."""
        return shift_tokens(x, self.config.layout) if self.config.shift_tokens else x

    def text_logits(self, text: Tensor) -> Tensor:
        """Logits of every text token, padding tokens last: ids (B, T) to (B, T, V + T), or V columns if masked."""
        attend = partial(self.attend_stream, readable=self.readable(text))
        x = self.through_layers(self.embed_text(text), attend, self.shift_stream)
        return self._logits(x[:, :-1], slice(self.config.text_ids))

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass: ids (B, T) and codes (B, h, w) to (B, N, K)."""
        self.check(text, codes)
        x = torch.cat([self.embed_text(text), self.embed_image(codes.flatten(1)[:, :-1])], 1)
        x = self.through_layers(x, partial(self.attend_stream, readable=self.readable(text)), self.shift_stream)
        return self.image_head(x[:, self.config.text_length :])

    def decoding(self, text: Tensor, num_candidates: int) -> DallePytorchDecoding:
        """Reads the captions and prepares for sampling."""
        return DallePytorchDecoding(self, text, num_candidates)


class DallePytorchDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, prior: DallePytorch, text: Tensor, num_candidates: int) -> None:
        self.prior = prior
        self.caches: list[Cache] = []
        self.shifts = [ShiftCache(prior.config.layout) for _ in range(2 * prior.config.num_layers)]
        attend = partial(
            prior.attend_stream, readable=prior.readable(text), caches=self.caches, candidates=num_candidates
        )
        x = prior.through_layers(prior.embed_text(text), attend, prior.shift_stream)
        self.last_text = x[:, -1:].expand(-1, num_candidates, -1)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior, x = self.prior, self.last_text
        if previous is not None:  # the token before stands at its own position
            position = index - 1
            x = prior.embed_image(previous[..., None], position).squeeze(-2)
            x = prior.through_layers(
                x, partial(prior.attend_token, position, self.caches), partial(self._shift, position)
            )
        return prior.image_head(x)

    def _shift(self, position: int, branch: int, x: Tensor) -> Tensor:
        return self.shifts[branch].shift(position, x) if self.prior.config.shift_tokens else x
