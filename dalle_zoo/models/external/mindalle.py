"""minDALL-E's prior: a plain causal transformer over 64 text tokens and 16 x 16 codes, without start tokens.

```
position   0    1    …  T-2    T-1 │  T    T+1  …  T+N-2
input      t_0  t_1  …  t_T-2  t_T-1  i_0  i_1  …  i_N-2      each + a learned 1-D position embedding
target     t_1  t_2  …  t_T-1│ i_0    i_1  i_2  …  i_N-1
           └── text head ────┘ └──── image head ────────┘
```
Differences from the paper's prior:

- The input at a position is its own token, and the target is the next one. So the last text position predicts the
  first code, the first text token is never predicted, and the last code is never an input.
- One [PAD] token pads captions at all positions, without a padding mask.
- Position embeddings of the image are 1-D.
- The heads have no biases.

The layers are the same: pre-LN with epsilon 1e-5, biases, exact GELU.

Reference: minDALL-E on Conceptual Captions (Kim et al., 2021), https://github.com/kakaobrain/minDALL-E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dalle_zoo.masks import Mask
from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.decoding import decode_positions, prefill
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, Predicted, TextTargets
from dalle_zoo.models.prior import Layer, blocks_of
from dalle_zoo.models.residual import ResidualBlock
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong

# B batch, P prompts, n candidates of each, T text positions, h w code grid, N = h * w image positions, d width,
# V text vocabulary, K codebook size

MLP_RATIO = 4
"""Hidden width of the MLP in units of d, fixed in the original."""
PAD = "[PAD]"
"""Text of the padding token."""


@dataclass(frozen=True, kw_only=True)
class MinDALLEConfig(ImagePriorConfig):
    """Architecture of minDALL-E's prior; defaults are the published 1.3B. Released names are in brackets."""

    text_length: int = 64
    """Text positions T [ctx_len_txt]."""
    text_vocab: int = 16384
    """Text vocabulary V, including the padding token [vocab_size_txt]."""
    image_height: int = 16
    """Rows of the code grid; the original only has the product of rows and columns [ctx_len_img]."""
    image_width: int = 16
    """Columns of the code grid."""
    codebook_size: int = 16384
    """Image vocabulary K [vocab_size_img]."""
    width: int = 1536
    """Model width d [embed_dim]."""
    num_layers: int = 42
    """Layers [n_layers]."""
    num_heads: int = 24
    """Attention heads [n_heads]."""
    padding_id: int | None = None
    """Id of the padding token; None if the vocabulary was missing at conversion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers")
        self.check_heads()
        if self.padding_id is not None and not 0 <= self.padding_id < self.text_vocab:
            raise ValueError(f"padding_id must be in 0..{self.text_vocab - 1}, got {self.padding_id}")


class PaddedCaptions(CaptionEncoder):
    """Encodes captions, truncated or padded with [PAD] to T ids."""

    def __init__(self, padding_id: int, tokenizer: TextTokenizer, length: int, overlong: Overlong, dropout: float):
        super().__init__(tokenizer, length, overlong, dropout)
        self.padding_id = padding_id

    def __call__(self, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Tensor:
        """Encodes a batch: int64 (B, T)."""
        ids = super().__call__(texts, seeds)
        return ids.where(ids < self.tokenizer.vocab_size, self.padding_id)


@PRIORS.register("mindalle")
class MinDALLE(ImagePrior):
    """minDALL-E's transformer.

    The original was published without its training code for captions, so it is not known whether the weights were
    trained with empty captions, on which classifier-free guidance depends. The loss is the paper's: the original's
    logits at all positions that it predicts, except padding, with weights of 1/8 and 7/8.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`.

    Example:
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = MinDALLE(MinDALLEConfig(**shape, width=8, num_layers=1, num_heads=2, padding_id=7))
        >>> prior.null_text()
        tensor([7, 7, 7, 7])
    """

    config_class = MinDALLEConfig
    config: MinDALLEConfig

    def __init__(self, config: MinDALLEConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.text_embedding = nn.Embedding(config.text_vocab, d)
        self.text_position = nn.Embedding(config.text_length, d)
        self.image_embedding = nn.Embedding(config.codebook_size, d)
        self.image_position = nn.Embedding(config.image_length, d)
        mask = Mask.from_spec("full", config.layout)
        layers = nn.ModuleList(
            Layer(d, config.num_heads, MLP_RATIO * d, mask, backend) for _ in range(config.num_layers)
        )
        self.layers = cast(Sequence[Layer], layers)  # the type of the members, which nn.ModuleList does not have
        self.final_norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_vocab, bias=False)
        self.image_head = nn.Linear(d, config.codebook_size, bias=False)

    # ------------------------------------------------------------ captions

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises `ValueError` unless the embedding has all ids and the padding token is that of the weights."""
        if tokenizer.vocab_size > self.config.text_vocab:
            raise ValueError(
                f"the prior has {self.config.text_vocab} text tokens, the text tokenizer {tokenizer.vocab_size}: "
                "use the tokenizer that the prior was trained with"
            )
        if (came := tokenizer.encode(PAD)) != [self._padding_id()]:
            raise ValueError(
                f"{PAD} has the id {self.config.padding_id} in the prior, but {came} in the text tokenizer: "
                "use the tokenizer that the prior was trained with"
            )

    def caption_encoder(
        self, tokenizer: TextTokenizer, overlong: Overlong = "truncate", dropout: float = 0.0
    ) -> PaddedCaptions:
        """Returns the encoder of captions, which truncates or pads with [PAD] to T ids."""
        return PaddedCaptions(self._padding_id(), tokenizer, self.caption_length, overlong, dropout)

    def null_text(self) -> Tensor:
        """The empty caption, all padding: int64 (T,)."""
        return torch.full((self.config.text_length,), self._padding_id(), device=self.device)

    def _padding_id(self) -> int:
        if self.config.padding_id is None:
            raise ValueError(
                "the prior was converted without its vocabulary, so its padding token is unknown: convert it again "
                "from a folder that contains the vocabulary"
            )
        return self.config.padding_id

    # ------------------------------------------------------------ network

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: ids (B, T) to (B, T, d)."""
        out: Tensor = self.text_embedding(text) + self.text_position.weight
        return out

    def text_logits(self, text: Tensor) -> Tensor:
        """Logits of every text token but the first: ids (B, T) to (B, T - 1, V)."""
        x = self.embed_text(text)[:, :-1]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.text_head(self.final_norm(x))
        return logits

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Outputs of the last layer at all input positions: (B, T) and (B, h, w) to (B, T + N - 1, d)."""
        self.check(text, codes)
        image = self.image_embedding(codes.flatten(1)) + self.image_position.weight
        x = torch.cat([self.embed_text(text), image], 1)[:, :-1]
        for layer in self.layers:
            x = layer(x)
        return x

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass: ids (B, T) and codes (B, h, w) to (B, N, K)."""
        x = self.hidden(text, codes)[:, self.config.text_length - 1 :]
        logits: Tensor = self.image_head(self.final_norm(x))
        return logits

    def is_text_target(self, text: Tensor) -> Tensor:
        """All tokens but the first, which is never predicted, and padding: bool (B, T)."""
        is_target = text != self._padding_id()
        is_target[:, 0] = False
        return is_target

    def predicted(
        self, text: Tensor, codes: Tensor, targets: TextTargets | None = None
    ) -> tuple[Predicted, Predicted]:
        """Every position predicts the next one; the last text position predicts the first code."""
        x = self.final_norm(self.hidden(text, codes))
        split = self.config.text_length - 1
        caption, position = targets or self.text_targets(text)
        return (
            Predicted(x[:, :split][caption, position - 1], self.text_head.weight, None, text[caption, position]),
            Predicted(x[:, split:].flatten(0, 1), self.image_head.weight, None, codes.flatten()),
        )

    def residual_blocks(self) -> list[ResidualBlock]:
        """Attention and MLP of every layer, first to last."""
        return blocks_of(self.layers)

    def decoding(self, text: Tensor, num_candidates: int) -> MinDALLEDecoding:
        """Prefills the captions and prepares for sampling."""
        return MinDALLEDecoding(self, text, num_candidates)


class MinDALLEDecoding:
    """Decoding state of P prompts with n candidates each.

    Args:
        prior: The prior; its device and dtype are used.
        text: Text ids, int64 (P, T).
        num_candidates: Candidates n of each prompt.
    """

    def __init__(self, prior: MinDALLE, text: Tensor, num_candidates: int) -> None:
        self.prior = prior
        x, self.caches = prefill(prior.layers, prior.embed_text(text), num_candidates)
        self.last_text = x[:, -1:].expand(-1, num_candidates, -1)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior, x = self.prior, self.last_text
        if previous is not None:  # the input is the token before, at its own position
            x = prior.image_embedding(previous) + prior.image_position.weight[index - 1]
            x = decode_positions(prior.layers, self.caches, index - 1, x)
        logits: Tensor = prior.image_head(prior.final_norm(x))
        return logits
