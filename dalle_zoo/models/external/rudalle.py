"""ruDALL-E's prior (Malevich, Emojich, Surrealist, Kandinsky): row, column and convolutional masks, in two versions.

```
v3  position   0    1    …  T-2    T-1 │ T    T+1  …  T+N-2
    input      t_0  t_1  …  t_T-2  t_T-1│ i_0  i_1  …  i_N-2
    predicts                       i_0 │ i_1  i_2  …  i_N-1

v2  position   0    1    …  T-2    T-1 │ T      T+1  T+2  …  T+N-1
    input      BOS  t_0  …  t_T-3  t_T-2│ t_T-1  i_0  i_1  …  i_N-2
    predicts                           │ i_0    i_1  i_2  …  i_N-1
               └── text of the masks ──┘ └── image of the masks ──┘
```
The text t itself begins with BOS. In v2 it is preceded by another BOS, so for the masks the last text token is in the
first cell of the grid and every code is in the cell after its own. Row and column embeddings are not shifted.

Differences from the paper's prior:

- There is no start-of-image token: the input at a position is its own token, and the target is the next one.
- The output of each block is normalized too (sandwich LayerNorm), and the output of the last layer twice.
- The activation is tanh-GELU.
- Text and image share one head.
- The convolutional mask differs.

Reference: https://github.com/ai-forever/ru-dalle; sandwich LayerNorm as in CogView (Ding et al., 2021), section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask
from dalle_zoo.models.attention import Attention
from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.decoding import decode_positions, prefill
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, Predicted, TextTargets
from dalle_zoo.models.losses import reduce_gradient
from dalle_zoo.models.prior import MLP, Layer, blocks_of
from dalle_zoo.models.residual import ResidualBlock
from dalle_zoo.registry import suggest
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong

# B batch, P prompts, n candidates of each, T text positions, h w code grid, N = h * w image tokens, S positions of the
# stream, d width, V text vocabulary, K codebook size

Version = Literal["v2", "v3"]
LAST_MASKS: dict[Version, str] = {"v3": "conv_clamped(kernel=11)", "v2": "conv_torus(kernel=11)"}
"""Mask of the last layer."""
BOS, EOS = 2, 3
"""Ids of the start and the end of a caption, in every published vocabulary."""
MLP_RATIO = 4
"""Hidden width of the MLP in units of d, fixed in the original."""
FLOAT16_MAX = 65504.0
EMBEDDING_GRADIENT = 0.1
"""Share of their gradient that embeddings are trained with."""


@dataclass(frozen=True, kw_only=True)
class RuDALLEConfig(ImagePriorConfig):
    """Architecture of ruDALL-E's prior; defaults are Malevich's 1.3 billion. Released names are in brackets."""

    version: Version = "v3"
    """Layout of the stream and borders of the convolutional mask [hf_version]."""
    text_length: int = 128
    """Text positions T, including the start and the end of the caption [text_seq_length]."""
    text_vocab: int = 16384
    """Text vocabulary V, without the padding tokens [vocab_size - text_seq_length]."""
    image_height: int = 32
    """Rows of the code grid [image_tokens_per_dim]."""
    image_width: int = 32
    """Columns of the code grid [image_tokens_per_dim]."""
    codebook_size: int = 8192
    """Image vocabulary K [image_vocab_size]."""
    width: int = 2048
    """Model width d [hidden_size]."""
    num_layers: int = 24
    """Layers [num_layers]."""
    num_heads: int = 16
    """Attention heads [num_attention_heads]."""

    def __post_init__(self) -> None:
        if self.version not in LAST_MASKS:
            raise ValueError(suggest("version", self.version, get_args(Version)))
        if self.text_length < 2:
            raise ValueError(f"text_length must be at least 2, for start and end, got {self.text_length}")
        super().__post_init__()
        self.check_positive("num_layers")
        self.check_heads()

    @property
    def text_cells(self) -> int:
        """Number of cells of the masks' grid that are taken by text tokens."""
        return 1 if self.version == "v2" else 0

    @property
    def masks(self) -> list[str]:
        """Mask of every layer. That of the last layer is convolutional unless the pattern makes it a column mask."""
        last = self.num_layers - 1
        others = [LAST_MASKS[self.version] if index == last else "row" for index in range(self.num_layers)]
        return ["column" if (index - 1) % 4 == 0 else other for index, other in enumerate(others)]


class SandwichAttention(Attention):
    """Attention whose output is normalized.

    The original also scales scores down before the softmax and subtracts their maximum (PB-relax of CogView). Both
    leave the result unchanged in exact arithmetic and are omitted.
    """

    def __init__(self, width: int, num_heads: int, mask: Mask, backend: str = "auto") -> None:
        super().__init__(width, num_heads, mask, backend)
        self.output_norm = nn.LayerNorm(width)

    def merge(self, mixed: Tensor) -> Tensor:
        """Joins the heads, applies the output matrix and normalizes: (B, H, S, D) to (B, S, d)."""
        # As in the original: values that overflow in float16 stay finite.
        output = super().merge(mixed).clamp(-FLOAT16_MAX, FLOAT16_MAX)
        out: Tensor = self.output_norm(output)
        return out


class SandwichMLP(MLP):
    """MLP with a tanh-GELU, whose output is normalized."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        out: Tensor = self.output_norm(self.output(F.gelu(self.hidden(x), approximate="tanh")))
        return out


class SandwichLayer(Layer):
    """Attention block and MLP block with sandwich LayerNorm: input and output of both are normalized."""

    def __init__(self, width: int, num_heads: int, mask: Mask, backend: str) -> None:
        super().__init__(width, num_heads, MLP_RATIO * width, mask, backend)
        self.attention = SandwichAttention(width, num_heads, mask, backend)
        self.mlp = SandwichMLP(width, MLP_RATIO * width)


class FramedCaptions(CaptionEncoder):
    """Encodes captions in lower case to start, ids, end and one padding id per position.

    A truncated caption has no end token.
    """

    def __call__(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch: int64 (B, T)."""
        for caption in texts:
            self.tokenizer.check(caption)
        vocab = self.tokenizer.vocab_size
        ids = super().__call__([caption.lower().strip() for caption in texts], seeds)
        end = 1 + (ids < vocab).sum(1, keepdim=True)
        ids = F.pad(ids, (1, 0), value=BOS)
        positions = torch.arange(ids.shape[1])
        return ids.where(positions < end, vocab + positions).where(positions != end, EOS)


@PRIORS.register("rudalle")
class RuDALLE(ImagePrior):
    """ruDALL-E's transformer.

    In v3 the target at position T - 1 is the first code as a text id, in training as in the original. So the image
    logits of the first code, with which sampling begins, are never trained. Classifier-free guidance works, but it is
    not known whether the weights were trained with empty captions.

    Embeddings get a tenth of their gradient, and padding is predicted like other text tokens, both as in the original.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`.

    Example:
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = RuDALLE(RuDALLEConfig(**shape, width=8, num_layers=1, num_heads=2))
        >>> prior.null_text()  # start, end, padding
        tensor([ 2,  3, 10, 11])
    """

    config_class = RuDALLEConfig
    config: RuDALLEConfig

    def __init__(self, config: RuDALLEConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        d, num_text_ids = config.width, config.text_vocab + config.text_length
        self.text_embedding = nn.Embedding(num_text_ids, d)
        self.text_position = nn.Embedding(config.text_length + 1, d)  # v3 does not use the last one
        self.image_embedding = nn.Embedding(config.codebook_size, d)
        self.row_position = nn.Embedding(config.image_height, d)
        self.column_position = nn.Embedding(config.image_width, d)
        masks = {spec: Mask.from_spec(spec, config.layout) for spec in dict.fromkeys(config.masks)}
        layers = nn.ModuleList(SandwichLayer(d, config.num_heads, masks[spec], backend) for spec in config.masks)
        self.layers = cast(Sequence[Layer], layers)  # the type of the members, which nn.ModuleList does not have
        self.final_norm = nn.LayerNorm(d)
        self.head_norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, num_text_ids + config.codebook_size)

    # ------------------------------------------------------------ captions

    @property
    def caption_length(self) -> int:
        """Number of caption tokens that fit after the start token."""
        return self.config.text_length - 1

    def caption_encoder(
        self, tokenizer: TextTokenizer, overlong: Overlong = "truncate", dropout: float = 0.0
    ) -> FramedCaptions:
        """Returns the encoder of captions to start, ids, end and padding."""
        return FramedCaptions(tokenizer, self.caption_length, overlong, dropout)

    def null_text(self) -> Tensor:
        """The empty caption: start, end, padding; int64 (T,)."""
        text = self.config.text_vocab + torch.arange(self.config.text_length, device=self.device)
        text[0], text[1] = BOS, EOS
        return text

    # ------------------------------------------------------------ network

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: ids (B, T) to (B, T, d), in v2 (B, T + 1, d)."""
        text = F.pad(text, (self.config.text_cells, 0), value=BOS)
        out: Tensor = self.text_embedding(text) + self.text_position.weight[: text.shape[1]]
        return out

    def image_positions(self) -> Tensor:
        """Sum of row and column embedding of every cell in raster order, (N, d)."""
        grid = self.row_position.weight[:, None] + self.column_position.weight[None]
        return grid.flatten(0, 1)

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Outputs of the last layer at all S positions of the stream: (B, T) and (B, h, w) to (B, S, d)."""
        self.check(text, codes)
        image = self.image_embedding(codes.flatten(1)) + self.image_positions()
        x = reduce_gradient(torch.cat([self.embed_text(text), image], 1)[:, :-1], EMBEDDING_GRADIENT)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of text and image ids at every position, as in the original.

        Args:
            text: Ids from `encode_captions`, int64 (B, T).
            codes: Image tokens, int64 (B, h, w).

        Returns:
            (B, S, V + T + K) with S = T + N - 1, in v2 T + N.
        """
        out: Tensor = self.head(self.head_norm(self.final_norm(self.hidden(text, codes))))
        return out

    def image_head(self, x: Tensor) -> Tensor:
        """Logits of the codes, the last K outputs of the head: (…, d) to (…, K)."""
        size = self.config.codebook_size
        return F.linear(self.head_norm(self.final_norm(x)), self.head.weight[-size:], self.head.bias[-size:])

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass: ids (B, T) and codes (B, h, w) to (B, N, K)."""
        return self.image_head(self.hidden(text, codes)[:, -self.config.image_length :])

    def predicted(
        self, text: Tensor, codes: Tensor, targets: TextTargets | None = None
    ) -> tuple[Predicted, Predicted]:
        """T positions predict text ids and the others codes; in v3 the last of the T predicts a code as a text id."""
        x = self.head_norm(self.final_norm(self.hidden(text, codes)))
        length, size = self.config.text_length, self.config.codebook_size
        tokens = F.pad(torch.cat([text, codes.flatten(1)], 1), (self.config.text_cells, 0))[:, 1:]
        weight, bias = self.head.weight, self.head.bias
        return (
            Predicted(x[:, :length].flatten(0, 1), weight[:-size], bias[:-size], tokens[:, :length].flatten()),
            Predicted(x[:, length:].flatten(0, 1), weight[-size:], bias[-size:], tokens[:, length:].flatten()),
        )

    def residual_blocks(self) -> list[ResidualBlock]:
        """Attention and MLP of every layer, first to last."""
        return blocks_of(self.layers)

    def decoding(self, text: Tensor, num_candidates: int) -> RuDALLEDecoding:
        """Prefills the captions and prepares for sampling."""
        return RuDALLEDecoding(self, text, num_candidates)


class RuDALLEDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, prior: RuDALLE, text: Tensor, num_candidates: int) -> None:
        self.prior = prior
        self.positions = prior.image_positions()
        length = prior.config.text_length
        x = prior.embed_text(text)
        outputs, self.caches = prefill(prior.layers, x[:, :length], num_candidates)
        start = x[:, length:] if prior.config.text_cells else outputs[:, -1:]
        self.start = start.expand(-1, num_candidates, -1)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior, x = self.prior, self.start
        if previous is not None:  # the input is the token before, at its own position
            x = prior.image_embedding(previous) + self.positions[index - 1]
        cell = index - 1 + prior.config.text_cells
        if cell >= 0:  # in v3 the prefill already includes the last text token
            x = decode_positions(prior.layers, self.caches, cell, x)
        return prior.image_head(x)
