"""DALL-E mini and mega: an encoder for the caption and an autoregressive decoder for the image tokens.

```
                 ┌────────── encoder ──────────┐
bos t_0 … eos pads ─► embedding + position, norm ─► layers: attention to all tokens but pads ─► norm ─► states (T, d)
                 ┌────────── decoder ──────────┐                                                     │
START i_0 … i_N-2 ─► embedding + position, norm ─► layers: causal self-attention, cross-attention ◄─┘ ─► norm ─► head
```
Unlike in the paper, image and text do not share a softmax: a decoder layer has one attention block for the image
tokens and another one for the caption.

Reference: the code that the published weights were trained with, <https://github.com/borisdayma/dalle-mini>; BART
(Lewis et al., arXiv 1910.13461), NormFormer (Shleifer et al., arXiv 2110.09456), GLU variants (Shazeer, arXiv
2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, Predicted, TextTargets
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong

# P prompts, n candidates of each, B batch, T text positions, h w code grid, N = h * w image tokens, d width, H heads,
# D head size, K codebook size


@dataclass(frozen=True, kw_only=True)
class DalleMiniConfig(ImagePriorConfig):
    """Architecture; defaults are DALL-E mini's."""

    text_length: int = 64
    """Text positions T, including the tokens that begin and end a caption."""
    text_vocab: int = 50264
    """Rows of the text embedding: the vocabulary and unused rows."""
    begin_token: int = 0
    """Id of the token that begins a caption."""
    pad_token: int = 1
    """Id of the padding after a caption; no position attends to it."""
    end_token: int = 2
    """Id of the token that ends a caption."""
    image_height: int = 16
    """Rows of the code grid."""
    image_width: int = 16
    """Columns of the code grid."""
    codebook_size: int = 16384
    """Image vocabulary K; the logits of all other rows of the head are dropped."""
    image_rows: int = 16385
    """Rows of the image embedding and of the image head: codes, start token and unused rows."""
    start_token: int = 16384
    """Id of the start token, the input at the first image position."""
    width: int = 1024
    """Model width d."""
    encoder_layers: int = 12
    """Layers of the encoder."""
    encoder_heads: int = 16
    """Attention heads of the encoder."""
    encoder_hidden: int = 2730
    """Hidden width of the encoder's gated units."""
    decoder_layers: int = 12
    """Layers of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder, in both of its attention blocks."""
    decoder_hidden: int = 2730
    """Hidden width of the decoder's gated units."""

    def __post_init__(self) -> None:
        if self.text_length < 3:
            raise ValueError(f"text_length must be at least 3 (begin, one token, end), got {self.text_length}")
        super().__post_init__()
        self.check_positive("image_rows", "encoder_layers", "encoder_hidden", "decoder_layers", "decoder_hidden")
        for heads in ("encoder_heads", "decoder_heads"):
            self.check_heads(heads)
        if not self.codebook_size <= self.start_token < self.image_rows:
            raise ValueError(
                f"start_token must follow the codes and be in {self.codebook_size}..{self.image_rows - 1} "
                f"(codebook_size to image_rows - 1), got {self.start_token}"
            )
        special = {self.begin_token, self.pad_token, self.end_token}
        if len(special) != 3 or min(special) < 0 or max(special) >= self.text_vocab:
            raise ValueError(
                f"begin_token, pad_token and end_token must be three ids in 0..{self.text_vocab - 1}, got "
                f"{self.begin_token}, {self.pad_token} and {self.end_token}"
            )


class Attention(nn.Module):
    """Multi-head attention without biases, for self-attention and cross-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Splits into heads: (B, L, d) to (B, H, L, D)."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence: (B, L, d) to twice (B, H, L, D)."""
        return self.heads(self.key(x)), self.heads(self.value(x))

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attends to keys and values.

        Args:
            x: Inputs of the queries, (B, L, d).
            key: Keys, (B, H, M, D).
            value: Values, (B, H, M, D).
            mask: Whether a query attends to a key, bool, broadcast to (B, H, L, M). Defaults to all keys.
            causal: Whether query i attends to keys 0 … i only. Defaults to False.

        Returns:
            (B, L, d).
        """
        mixed = F.scaled_dot_product_attention(self.heads(self.query(x)), key, value, mask, is_causal=causal)
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out


class GatedUnit(nn.Module):
    """GEGLU feed-forward block with a LayerNorm before each matrix product, as in NormFormer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.hidden = nn.Linear(width, hidden, bias=False)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        x = self.norm(x)
        out: Tensor = self.output(self.hidden_norm(F.gelu(self.gate(x)) * self.hidden(x)))
        return out


class EncoderLayer(nn.Module):
    """Self-attention between two norms, then the feed-forward block; each has a residual connection."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mixed_norm = nn.LayerNorm(width)
        self.gated_unit = GatedUnit(width, hidden)

    def forward(self, x: Tensor, text_mask: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d); ``text_mask`` is False at padding, bool (B, 1, 1, T)."""
        normed = self.norm(x)
        x = x + self.mixed_norm(self.attention(normed, *self.attention.keys_values(normed), text_mask))
        out: Tensor = x + self.gated_unit(x)
        return out


class DecoderLayer(nn.Module):
    """Self-attention and cross-attention, each between two norms, then the feed-forward block."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.image_norm = nn.LayerNorm(width)
        self.image_attention = Attention(width, num_heads)
        self.image_mixed_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.text_attention = Attention(width, num_heads)
        self.text_mixed_norm = nn.LayerNorm(width)
        self.gated_unit = GatedUnit(width, hidden)

    def forward(self, x: Tensor, attend_image: Callable[[Tensor], Tensor], text: Sequence[Tensor]) -> Tensor:
        """Runs all positions of an image, (B, N, d), or one position of every candidate, (P, n, d); keeps the shape.

        Args:
            x: Inputs.
            attend_image: Applies the layer's `image_attention` to its inputs, of the shape of ``x``.
            text: Keys and values of the caption, (B, H, T, D), and its mask, bool (B, 1, 1, T), False at padding.
        """
        x = x + self.image_mixed_norm(attend_image(self.image_norm(x)))
        x = x + self.text_mixed_norm(self.text_attention(self.text_norm(x), *text))
        out: Tensor = x + self.gated_unit(x)
        return out


class Stack(nn.Module):
    """Encoder or decoder: token and position embeddings, a norm, layers, a norm."""

    def __init__(self, tokens: int, positions: int, width: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Embedding(positions, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.LayerNorm(width)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Inputs of the first layer: ids (B, L) and position embeddings, (L, d) or (d,), to (B, L, d)."""
        out: Tensor = self.embedding_norm(self.embedding(tokens) + positions)
        return out


class FramedCaptions(CaptionEncoder):
    """Encodes captions to begin, ids, end, padding. A truncated caption keeps its end."""

    def __init__(
        self, config: DalleMiniConfig, tokenizer: TextTokenizer, length: int, overlong: Overlong, dropout: float
    ) -> None:
        super().__init__(tokenizer, length, overlong, dropout)
        self.config = config

    def __call__(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch: int64 (B, T)."""
        c = self.config
        rows = super().__call__(texts, seeds)
        is_token = rows < self.tokenizer.vocab_size
        text = torch.full((len(rows), c.text_length), c.pad_token)
        text[:, 0] = c.begin_token
        text[:, 1:-1] = rows.where(is_token, c.pad_token)
        return text.scatter(1, is_token.sum(1, keepdim=True) + 1, c.end_token)


@PRIORS.register("dalle_mini")
class DalleMini(ImagePrior):
    """DALL-E mini's transformer.

    All norms have a gain; in the original, those before a matrix product have none, which equals a gain of 1. The
    logits are those of the K codes; the other rows of the head, which the original never samples, are dropped. As in
    the original, the loss is that of the image tokens alone, over all rows of the head.

    Args:
        config: Architecture.

    Example:
        >>> prior = DalleMini(DalleMiniConfig(
        ...     text_length=5, text_vocab=11, image_height=2, image_width=3, codebook_size=7, image_rows=9,
        ...     start_token=8, width=16, encoder_layers=1, encoder_heads=2, encoder_hidden=24, decoder_layers=2,
        ...     decoder_heads=2, decoder_hidden=24))
        >>> text, codes = torch.tensor([[0, 5, 7, 2, 1]]), torch.tensor([[[0, 1, 2], [3, 4, 5]]])
        >>> prior.image_logits(text, codes).shape
        torch.Size([1, 6, 7])
    """

    config_class = DalleMiniConfig
    config: DalleMiniConfig

    def __init__(self, config: DalleMiniConfig) -> None:
        super().__init__()
        self.config = c = config
        encoder = [EncoderLayer(c.width, c.encoder_heads, c.encoder_hidden) for _ in range(c.encoder_layers)]
        decoder = [DecoderLayer(c.width, c.decoder_heads, c.decoder_hidden) for _ in range(c.decoder_layers)]
        self.encoder = Stack(c.text_vocab, c.text_length, c.width, encoder)
        self.decoder = Stack(c.image_rows, c.image_length, c.width, decoder)
        self.image_head = nn.Linear(c.width, c.image_rows, bias=False)

    @property
    def decoder_layers(self) -> Sequence[DecoderLayer]:
        """Layers of the decoder."""
        return cast(Sequence[DecoderLayer], self.decoder.layers)

    # ------------------------------------------------------------ captions

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises `ValueError` if the tokenizer has more ids than the embedding has rows; unused rows are allowed."""
        if tokenizer.vocab_size > self.config.text_vocab:
            raise ValueError(
                f"the text tokenizer has {tokenizer.vocab_size} tokens, but the text embedding of the prior has only "
                f"{self.config.text_vocab} rows: use the tokenizer that the prior was trained with"
            )

    @property
    def caption_length(self) -> int:
        """Number of caption tokens that fit between begin and end."""
        return self.config.text_length - 2

    def caption_encoder(
        self, tokenizer: TextTokenizer, overlong: Overlong = "truncate", dropout: float = 0.0
    ) -> FramedCaptions:
        """Returns the encoder of captions to begin, ids, end, padding."""
        return FramedCaptions(self.config, tokenizer, self.caption_length, overlong, dropout)

    def null_text(self) -> Tensor:
        """The empty caption: begin, end, padding; int64 (T,)."""
        c = self.config
        special = torch.tensor([c.begin_token, c.end_token], device=self.device)
        return F.pad(special, (0, c.text_length - 2), value=c.pad_token)

    # ------------------------------------------------------------ image tokens

    def encode_text(self, text: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Runs the encoder: (B, T) to keys and values (B, H, T, D) of each decoder layer and the mask (B, 1, 1, T)."""
        text_mask = (text != self.config.pad_token)[:, None, None]
        x = self.encoder.embed(text, self.encoder.position.weight)
        for layer in self.encoder.layers:
            x = layer(x, text_mask)
        states = self.encoder.final_norm(x)
        return [(*layer.text_attention.keys_values(states), text_mask) for layer in self.decoder_layers]

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the codes: states of the last layer (…, d) to (…, K)."""
        return F.linear(self.decoder.final_norm(x), self.image_head.weight[: self.config.codebook_size])

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Outputs of the last layer of the decoder: (B, T) and (B, h, w) to (B, N, d)."""
        self.check(text, codes)
        tokens = F.pad(codes.flatten(1)[:, :-1], (1, 0), value=self.config.start_token)
        x = self.decoder.embed(tokens, self.decoder.position.weight)
        for layer, caption in zip(self.decoder_layers, self.encode_text(text), strict=True):
            attend = layer.image_attention
            x = layer(x, lambda normed, a=attend: a(normed, *a.keys_values(normed), causal=True), caption)
        return x

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token: (B, T) and (B, h, w) to (B, N, K)."""
        return self.logits(self.hidden(text, codes))

    def is_text_target(self, text: Tensor) -> Tensor:
        """No text token is predicted: bool (B, T)."""
        return torch.zeros_like(text, dtype=torch.bool)

    def predicted(self, text: Tensor, codes: Tensor, targets: TextTargets | None = None) -> tuple[None, Predicted]:
        """Every image token, by all rows of the head."""
        x = self.decoder.final_norm(self.hidden(text, codes))
        return None, Predicted(x.flatten(0, 1), self.image_head.weight, None, codes.flatten())

    def word_embeddings(self) -> list[str]:
        """The token embedding of the encoder."""
        return ["encoder.embedding.weight"]

    def decoding(self, text: Tensor, num_candidates: int) -> DalleMiniDecoding:
        """Runs the encoder, once per prompt, and prepares for sampling."""
        return DalleMiniDecoding(self, text, num_candidates)


class KeyValueCache:
    """Key-value cache of the image tokens in one decoder layer, in static buffers.

    Args:
        attention: `image_attention` of the layer.
        like: Tensor whose dtype and device the buffers get.
        candidates: Number of images P * n.
        length: Number of image tokens N.
    """

    def __init__(self, attention: Attention, like: Tensor, candidates: int, length: int) -> None:
        self.attention = attention
        size = attention.query.out_features // attention.num_heads
        self.key, self.value = like.new_zeros(2, candidates, attention.num_heads, length, size).unbind(0)

    def attend(self, index: int, x: Tensor) -> Tensor:
        """Caches image position ``index`` of every candidate and attends to 0 … ``index``; keeps (P, n, d)."""
        token = x.flatten(0, 1).unsqueeze(1)  # every candidate is a sequence of one position
        key, value = self.attention.keys_values(token)
        self.key[:, :, index], self.value[:, :, index] = key[:, :, 0], value[:, :, 0]
        mixed: Tensor = self.attention(token, self.key[:, :, : index + 1], self.value[:, :, : index + 1])
        return mixed.view_as(x)


class DalleMiniDecoding:
    """Decoding state of P prompts with n candidates each, which share the keys and values of their caption.

    Args:
        prior: The prior; its device and dtype are used.
        text: Ids from `DalleMini.encode_captions`, int64 (P, T).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, prior: DalleMini, text: Tensor, num_candidates: int) -> None:
        self.prior = prior
        self.captions = prior.encode_text(text)
        like, count, length = self.captions[0][0], len(text) * num_candidates, prior.config.image_length
        self.images = [KeyValueCache(layer.image_attention, like, count, length) for layer in prior.decoder_layers]
        self.start = text.new_full((len(text), num_candidates), prior.config.start_token)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        decoder = self.prior.decoder
        x = decoder.embed(self.start if previous is None else previous, decoder.position.weight[index])
        for layer, image, caption in zip(self.prior.decoder_layers, self.images, self.captions, strict=True):
            # Candidates take the place of positions, so that they share the keys of the caption.
            x = layer(x, lambda normed, keys=image: keys.attend(index, normed), caption)
        return self.prior.logits(x)
