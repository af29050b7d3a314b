"""DALLE-pytorch's prior: <bos>, text, then the image, with many options for position embeddings and layers.

```
position   0     1    …  T    │ T+1  T+2  …  T+N-1
input      <bos> t_0  …  t_T-1│ i_0  i_1  …  i_N-2      each + position embedding(s), unless rotary
target     t_0   t_1  …  i_0  │ i_1  i_2  …  i_N-1
           └─ text ids ─┘└──────── image tokens ───────┘  logits of one joint head
```
Differences from the paper's prior:

- The input at a position is its own token, so the last text token predicts the first image token.
- Id 0 of the text vocabulary is <bos> at the start and padding in a caption.
- Masks, norms and branches are different ones, see `dalle_pytorch_layers`. Some layers may have block-sparse attention
  (`dalle_pytorch_sparse`) or a gMLP block (`dalle_pytorch_gmlp`) instead of attention.

Reference: https://github.com/lucidrains/DALLE-pytorch, versions 0.1 to 1.6.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask, layer_masks
from dalle_zoo.models.attention import BACKENDS
from dalle_zoo.models.cache import LayerCache
from dalle_zoo.models.external.dalle_pytorch_config import BOS, DallePytorchConfig
from dalle_zoo.models.external.dalle_pytorch_gmlp import GateCache, GatedMixing
from dalle_zoo.models.external.dalle_pytorch_layers import (
    Attention,
    Branch,
    GatedMLP,
    ShiftCache,
    attend_unpadded,
    make_norm,
    rotary_table,
    shift_tokens,
)
from dalle_zoo.models.external.dalle_pytorch_sparse import BlockCache, attend_blocks, fixed_blocks
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, Predicted, TextTargets
from dalle_zoo.models.losses import reduce_gradient
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong

# B batch, P prompts, n candidates of each, T text tokens, h w code grid, N = h * w image tokens, L = T + 1 + N
# positions of the layout, M positions of the input, d width, V text vocabulary, K codebook size


class Layer(nn.Module):
    """The parts that layers never share: norms, scales and mask; attention and MLP may be shared."""

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
"""Cache of one layer during generation."""
Attend = Callable[[int, Tensor], Tensor]
"""Computes the attention of a layer from its index and its normalized and shifted inputs."""
Shift = Callable[[int, Tensor], Tensor]
"""Shifts the inputs of a branch, given by its index: 2 i for the attention of layer i, 2 i + 1 for its MLP."""


EMBEDDING_GRADIENT = 0.1
"""Share of their gradient that embeddings are trained with under the original's option ``stable``."""


class PaddedCaptions(CaptionEncoder):
    """Encodes captions; as in the original, a token of id 0 becomes padding."""

    def __init__(self, config: DallePytorchConfig, tokenizer: TextTokenizer, overlong: Overlong, dropout: float):
        super().__init__(tokenizer, config.text_length, overlong, dropout)
        self.config = config

    def __call__(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch: int64 (B, T)."""
        ids = super().__call__(texts, seeds)
        ids = ids.where(ids < self.config.text_vocab, self.config.padding_id)
        if self.config.padding == "masked":
            return ids
        return ids.where(ids != BOS, torch.arange(ids.shape[1]) + self.config.text_vocab)


@PRIORS.register("dalle_pytorch")
class DallePytorch(ImagePrior):
    """DALLE-pytorch's transformer.

    Classifier-free guidance is broken in the original: its second pass also gets the caption, and without a cache it
    erases the caption. Here the second pass gets the empty caption, as intended and as the weights were trained.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`.

    Example:
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = DallePytorch(DallePytorchConfig(**shape, width=16, num_layers=1, num_heads=2, head_size=8))
        >>> text, codes = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 2, 2, dtype=torch.long)
        >>> prior.image_logits(text, codes).shape
        torch.Size([3, 4, 16])
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
            self.register_buffer("rotation", rotary_table(config.layout, config.head_size))
        else:
            self.text_position = nn.Embedding(config.layout.text, d)
            self.row_position = nn.Embedding(config.image_height, d)
            self.column_position = nn.Embedding(config.image_width, d)
        if config.sparse_layers:
            self.register_buffer("blocks", fixed_blocks(config.input_length))
        specs = layer_masks(config.masks, config.num_layers)
        masks = {spec: Mask.from_spec(spec, config.layout) for spec in dict.fromkeys(specs)}
        own = tuple(range(config.num_layers))
        attentions, mlps = config.shared_attention or own, config.shared_mlp or own
        layers = nn.ModuleList(
            Layer(config, index, masks[spec], attention, mlp)
            for index, (spec, attention, mlp) in enumerate(zip(specs, attentions, mlps, strict=True))
        )
        self.layers = cast(Sequence[Layer], layers)  # the type of the members, which nn.ModuleList does not have
        self.attentions = nn.ModuleList(
            GatedMixing(d, config.input_length)
            if number in config.gmlp_layers  # which excludes sharing, so attentions have the indices of layers
            else Attention(d, config.num_heads, config.head_size)
            for number in range(max(attentions) + 1)
        )
        self.mlps = nn.ModuleList(GatedMLP(d) for _ in range(max(mlps) + 1))
        self.final_norm = make_norm(config.norm, d)
        self.head = nn.Linear(d, config.text_ids + config.codebook_size)

    # ------------------------------------------------------------ captions

    def caption_encoder(
        self, tokenizer: TextTokenizer, overlong: Overlong = "truncate", dropout: float = 0.0
    ) -> PaddedCaptions:
        """Returns the encoder of captions."""
        return PaddedCaptions(self.config, tokenizer, overlong, dropout)

    def null_text(self) -> Tensor:
        """The empty caption, all padding: int64 (T,)."""
        pads = torch.arange(self.config.text_length, device=self.device) + self.config.text_vocab
        return pads if self.config.padding == "learned" else torch.full_like(pads, BOS)

    # ------------------------------------------------------------ network

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Embedding matrices of text tokens and image tokens."""
        if not self.config.tied_embeddings:
            return self.text_embedding.weight, self.image_embedding.weight
        return self.head.weight[: self.config.text_ids], self.head.weight[self.config.text_ids :]

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions, <bos> first: ids (B, T) to (B, T + 1, d)."""
        x = F.embedding(F.pad(text, (1, 0), value=BOS), self._tables()[0])
        return x + self.text_position.weight if self.config.positions == "axial" else x

    def embed_image(self, codes: Tensor, first: int = 0) -> Tensor:
        """Inputs of M image positions from ``first`` on: image tokens (…, M) to (…, M, d)."""
        x = F.embedding(codes, self._tables()[1])
        if self.config.positions == "rotary":
            return x
        cells = self.row_position.weight[:, None] + self.column_position.weight[None]
        return x + cells.flatten(0, 1)[first : first + codes.shape[-1]]

    def run_layers(self, x: Tensor, attend: Attend, shift: Shift) -> Tensor:
        """Runs all layers over some positions; ``attend`` and ``shift`` supply the other positions.

        Args:
            x: Inputs, (…, d).
            attend: Called once per layer, in order.
            shift: Called once per branch, in order.

        Returns:
            Hidden states before the final norm, (…, d).
        """
        first = second = x  # residual streams, which are the same unless reversible
        for index, layer in enumerate(self.layers):
            inputs = shift(2 * index, layer.attention.norm(second))
            first = first + layer.attention.postprocess(attend(index, inputs))
            if not self.config.reversible:
                second = first
            inputs = shift(2 * index + 1, layer.mlp.norm(first))
            second = second + layer.mlp.postprocess(self.mlps[layer.mlp_number](inputs))
            if not self.config.reversible:
                first = second
        return (first + second) / 2

    def _normed(self, x: Tensor) -> Tensor:
        """Inputs of the head: hidden states (…, d) to (…, d)."""
        if self.config.divide_by_max:  # by a constant in the backward pass, as in the original
            x = x / x.amax(-1, keepdim=True).detach()
        normed: Tensor = self.final_norm(x)
        return normed

    def _logits(self, x: Tensor, columns: slice) -> Tensor:
        """Some logits of the joint head: hidden states (…, d) to (…, columns)."""
        return F.linear(self._normed(x), self.head.weight[columns], self.head.bias[columns])

    def image_head(self, x: Tensor) -> Tensor:
        """Logits of image tokens, the last K of the joint head: (…, d) to (…, K)."""
        return self._logits(x, slice(self.config.text_ids, None))

    def text_mask(self, text: Tensor) -> Tensor | None:
        """Padding mask of <bos> and text, bool (B, T + 1), False at padding; None if padding is learned."""
        if self.config.padding == "learned":
            return None
        return F.pad(text != BOS, (1, 0), value=True)

    def attend_stream(
        self,
        index: int,
        x: Tensor,
        text_mask: Tensor | None,
        caches: list[Cache] | None = None,
        candidates: int = 1,
    ) -> Tensor:
        """Runs the attention or gMLP block of a layer over the first M positions: (B, M, d) to (B, M, d).

        Args:
            index: Index of the layer.
            x: Normalized and shifted inputs, (B, M, d).
            text_mask: Result of the method `text_mask`.
            caches: If given, a cache with these positions is appended to it.
            candidates: Candidates of each prompt, for the cache. Defaults to 1.
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
                caches.append(BlockCache(self.blocks, key, value, candidates, text_mask))
            return attention.merge(attend_blocks(query, key, value, self.blocks, text_mask))
        if caches is not None:
            caches.append(LayerCache(layer.mask, key, value, candidates, text_mask))
        if text_mask is None:
            return attention.merge(self.backend(query, key, value, layer.mask))
        return attention.merge(attend_unpadded(query, key, value, layer.mask, text_mask))

    def attend_token(self, position: int, caches: Sequence[Cache], index: int, x: Tensor) -> Tensor:
        """Runs the attention or gMLP block of a layer at one image position of every candidate; keeps (P, n, d)."""
        attention, cache = self.attentions[self.layers[index].attention_number], caches[index]
        if isinstance(cache, GateCache):
            outputs, gates = cache.block.project(x)
            return cache.block.merge(outputs, cache.mix(position, gates))
        attention = cast(Attention, attention)
        rotation = self._rotation(self.config.layout.text + position)
        # Candidates take the place of the positions of a sequence: (P, n, d) → (P, H, n, D).
        query, key, value = attention.project(x, rotation)
        return attention.merge(cache.attend(position, query, key, value))

    def _rotation(self, positions: slice | int) -> Tensor | None:
        return self.rotation[:, positions] if self.config.positions == "rotary" else None

    def shift_stream(self, branch: int, x: Tensor) -> Tensor:
        """Shifts the inputs of a branch over the first M positions; keeps the shape (B, M, d)."""
        return shift_tokens(x, self.config.layout) if self.config.shift_tokens else x

    def text_logits(self, text: Tensor) -> Tensor:
        """Logits of every text token: ids (B, T) to (B, T, V + T), the last T for padding; (B, T, V) if masked."""
        attend = partial(self.attend_stream, text_mask=self.text_mask(text))
        x = self.run_layers(self.embed_text(text), attend, self.shift_stream)
        return self._logits(x[:, :-1], slice(self.config.text_ids))

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Hidden states before the final norm at all input positions: (B, T) and (B, h, w) to (B, T + N, d)."""
        self.check(text, codes)
        x = torch.cat([self.embed_text(text), self.embed_image(codes.flatten(1)[:, :-1])], 1)
        if self.config.divide_by_max:
            x = reduce_gradient(x, EMBEDDING_GRADIENT)
        return self.run_layers(x, partial(self.attend_stream, text_mask=self.text_mask(text)), self.shift_stream)

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass: ids (B, T) and codes (B, h, w) to (B, N, K)."""
        return self.image_head(self.hidden(text, codes)[:, self.config.text_length :])

    def is_text_target(self, text: Tensor) -> Tensor:
        """All tokens and learned padding, but not masked padding, as in the original: bool (B, T)."""
        return text != BOS if self.config.padding == "masked" else super().is_text_target(text)

    def predicted(
        self, text: Tensor, codes: Tensor, targets: TextTargets | None = None
    ) -> tuple[Predicted, Predicted]:
        """Every position predicts the next one: the first T text ids, the others codes."""
        x = self._normed(self.hidden(text, codes))
        length, ids, chosen = self.config.text_length, self.config.text_ids, targets or self.text_targets(text)
        weight, bias = self.head.weight, self.head.bias
        return (
            Predicted(x[:, :length][chosen], weight[:ids], bias[:ids], text[chosen]),
            Predicted(x[:, length:].flatten(0, 1), weight[ids:], bias[ids:], codes.flatten()),
        )

    def decoding(self, text: Tensor, num_candidates: int) -> DallePytorchDecoding:
        """Prefills the captions and prepares for sampling."""
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
            prior.attend_stream, text_mask=prior.text_mask(text), caches=self.caches, candidates=num_candidates
        )
        x = prior.run_layers(prior.embed_text(text), attend, prior.shift_stream)
        self.last_text = x[:, -1:].expand(-1, num_candidates, -1)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior, x = self.prior, self.last_text
        if previous is not None:  # the input is the token before, at its own position
            position = index - 1
            x = prior.embed_image(previous[..., None], position).squeeze(-2)
            x = prior.run_layers(x, partial(prior.attend_token, position, self.caches), partial(self._shift, position))
        return prior.image_head(x)

    def _shift(self, position: int, branch: int, x: Tensor) -> Tensor:
        return self.shifts[branch].shift(position, x) if self.prior.config.shift_tokens else x
