"""minDALL-E's prior: a plain causal transformer over 64 text tokens and 16 x 16 codes, without start tokens.

```
position   0    1    …  T-2    T-1 │  T    T+1  …  T+N-2
input      t_0  t_1  …  t_T-2  t_T-1  i_0  i_1  …  i_N-2      each + the learned position of its kind, 1-D
target     t_1  t_2  …  t_T-1│ i_0    i_1  i_2  …  i_N-1
           └── text head ────┘ └──── image head ────────┘
```
What differs from the paper's prior: a position holds its own token and predicts the next one, so the last text
position predicts the first code, the first text token is never predicted, and the last code is never an input; one
[PAD] token fills captions at all positions, and nothing masks it; positions of the image are 1-D; the heads have no
biases. The layers are the same: pre-LN with epsilon 1e-5, biases, exact GELU.

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
from dalle_zoo.models.decoding import read_text, read_token
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.models.prior import Layer
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer

# B batch, P prompts, n candidates of each, T text positions, h w code grid, N = h * w image positions, d width,
# V text vocabulary, K codebook size

MLP_RATIO = 4
"""Hidden width of the MLP in units of d; the original has no other."""
PAD = "[PAD]"
"""How the tokenizer spells the token that fills captions."""


@dataclass(frozen=True, kw_only=True)
class MinDALLEConfig(ImagePriorConfig):
    """Architecture of minDALL-E's prior; defaults are the published 1.3B. Released names stand in brackets."""

    text_length: int = 64
    """Text positions T [ctx_len_txt]."""
    text_vocab: int = 16384
    """Text vocabulary V, with the padding token [vocab_size_txt]."""
    image_height: int = 16
    """Rows of the code grid; the published code knows rows times columns alone [ctx_len_img]."""
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
    """Id of the token that fills captions; its vocabulary tells, so None where that was missing at conversion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers")
        self.check_heads()
        if self.padding_id is not None and not 0 <= self.padding_id < self.text_vocab:
            raise ValueError(f"padding_id must lie in 0..{self.text_vocab - 1}, got {self.padding_id}")


@PRIORS.register("mindalle")
class MinDALLE(ImagePrior):
    """minDALL-E's transformer, for sampling.

    The original has no training code for captions; whether it was trained with empty ones is not known, so guidance
    works, but leaves what the weights have seen.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`.
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
        self.layers = cast(Sequence[Layer], layers)  # what PyTorch's container does not say of its members
        self.final_norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_vocab, bias=False)
        self.image_head = nn.Linear(d, config.codebook_size, bias=False)

    # ------------------------------------------------------------ captions

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises `ValueError` unless the ids fit and the padding is the one of the weights."""
        if tokenizer.vocab_size > self.config.text_vocab:
            raise ValueError(
                f"the prior has {self.config.text_vocab} text tokens, the text tokenizer {tokenizer.vocab_size}: "
                "they were not trained together"
            )
        if (came := tokenizer.encode(PAD)) != [self._padding_id()]:
            raise ValueError(
                f"{PAD} has the id {self.config.padding_id} in the prior, {came} in the text tokenizer: "
                "they were not trained together"
            )

    def encode_captions(self, tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
        """Ids truncated or padded with the one padding token to T, as the original has them: int64 (P, T)."""
        ids = CaptionEncoder(tokenizer, self.config.text_length)(captions)
        return ids.where(ids < tokenizer.vocab_size, self._padding_id())

    def null_text(self) -> Tensor:
        """The empty caption, all padding: int64 (T,)."""
        return torch.full((self.config.text_length,), self._padding_id(), device=self.device)

    def _padding_id(self) -> int:
        if self.config.padding_id is None:
            raise ValueError(
                "the prior was converted without its vocabulary, so its padding token is not known: convert it again "
                "from a folder that has the vocabulary too"
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

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass: ids (B, T) and codes (B, h, w) to (B, N, K)."""
        self.check(text, codes)
        image = self.image_embedding(codes.flatten(1)) + self.image_position.weight
        x = torch.cat([self.embed_text(text), image], 1)[:, :-1]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.image_head(self.final_norm(x[:, self.config.text_length - 1 :]))
        return logits

    def decoding(self, text: Tensor, num_candidates: int) -> MinDALLEDecoding:
        """Reads the captions and prepares for sampling."""
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
        x, self.caches = read_text(prior.layers, prior.embed_text(text), num_candidates)
        self.last_text = x[:, -1:].expand(-1, num_candidates, -1)

    def step(self, index: int, previous: Tensor | None) -> Tensor:
        """Logits of image token ``index``: (P, n) tokens before it, None at 0, to (P, n, K)."""
        prior, x = self.prior, self.last_text
        if previous is not None:  # the token before stands at its own position
            x = prior.image_embedding(previous) + prior.image_position.weight[index - 1]
            x = read_token(prior.layers, self.caches, index - 1, x)
        logits: Tensor = prior.image_head(prior.final_norm(x))
        return logits
