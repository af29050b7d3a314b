"""The prior: one autoregressive transformer over text tokens and image tokens as a single stream.

```
position   0    1    …  T-1  │  T    T+1  …  T+N-1
input      SOT  t_0  …  t_T-2│  SOI  i_0  …  i_N-2      each + its position embedding(s)
target     t_0  t_1  …  t_T-1│  i_0  i_1  …  i_N-1
           └── text head ────┘  └── image head ───┘
```
Exactly T + N positions, 1,280 in the paper (section 2.2, figure 10). The row and column embedding of an image
position are those of the token that is predicted there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.masks import Mask, layer_masks
from dalle_zoo.models.attention import Attention
from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.decoding import PriorDecoding
from dalle_zoo.models.image_prior import PRIORS, ImagePrior, Predicted, TextTargets
from dalle_zoo.models.initial import fill, fresh_seed
from dalle_zoo.models.residual import Residual, ResidualBlock
from dalle_zoo.values import differences

# B batch, T text positions, h w code grid, N = h * w image positions, L = T + N, d width, V text vocabulary,
# K codebook size


@dataclass(frozen=True, kw_only=True)
class PriorConfig(ImagePriorConfig):
    """Architecture of the prior; defaults are the paper's 12-billion model (section 2.2, table 1)."""

    text_length: int = 256
    """Text positions T."""
    text_vocab: int = 16384
    """Text vocabulary V, without the padding tokens."""
    image_height: int = 32
    """Rows of the code grid."""
    image_width: int = 32
    """Columns of the code grid."""
    codebook_size: int = 8192
    """Image vocabulary K."""
    width: int = 3968
    """Model width d."""
    num_layers: int = 64
    """Layers; each is an attention block and an MLP block."""
    num_heads: int = 62
    """Attention heads; width / num_heads is the head size, 64 in the paper."""
    mlp_ratio: int = 4
    """Hidden width of the MLP in units of d."""
    masks: str = "paper"
    """Layer schedule of attention masks: "paper", or a comma-separated cycle of mask names."""
    text_loss_weight: float = 0.125
    """Weight of the text loss; the image loss gets the rest (1/8 and 7/8, section 2.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers", "num_heads", "mlp_ratio")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}: the paper uses width / 64 heads"
            )
        if not 0 <= self.text_loss_weight < 1:
            raise ValueError(f"text_loss_weight must be in [0, 1), got {self.text_loss_weight}")
        layer_masks(self.masks, self.num_layers)  # rejects a typo, with a suggestion

    def count_parameters(self) -> dict[str, int]:
        """Number of parameters, term by term.

        Example:
            >>> PriorConfig().count_parameters()["matrices"]  # 12 d^2 per layer
            12092178432
        """
        d, t = self.width, self.text_length
        mlp = self.mlp_ratio * d
        return {
            "matrices": self.num_layers * (4 * d * d + 2 * d * mlp),
            "biases of the matrices": self.num_layers * (3 * d + d + mlp + d),
            "layer norms": (2 * self.num_layers + 1) * 2 * d,
            "text tokens": self.text_vocab * d,
            "padding tokens": t * d,
            "text positions": t * d,
            "image tokens": self.codebook_size * d,
            "rows and columns": (self.image_height + self.image_width) * d,
            "start of text, start of image": 2 * d,
            "text head": self.text_vocab * (d + 1),
            "image head": self.codebook_size * (d + 1),
        }


class MLP(nn.Module):
    """Two matrices with a GELU between them (the paper does not state the activation; GPT-2's is used)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        out: Tensor = self.output(F.gelu(self.hidden(x)))
        return out


class Layer(nn.Module):
    """Pre-LN attention block and MLP block on an identity path (figure 4)."""

    def __init__(self, width: int, num_heads: int, hidden: int, mask: Mask, backend: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, mask, backend)
        self.attention_residual = Residual()
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden)
        self.mlp_residual = Residual()

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d) to (B, L, d)."""
        x = self.attention_residual(x, self.attention_norm, self.attention)
        out: Tensor = self.mlp_residual(x, self.mlp_norm, self.mlp)
        return out


def blocks_of(layers: Sequence[Layer]) -> list[ResidualBlock]:
    """Attention and MLP of every layer, first to last."""
    blocks = []
    for index, layer in enumerate(layers):
        for kind in ("attention", "mlp"):
            norm, residual = getattr(layer, f"{kind}_norm"), getattr(layer, f"{kind}_residual")
            blocks.append(ResidualBlock(f"layers.{index}.{kind}", norm, getattr(layer, kind), residual))
    return blocks


class Logits(NamedTuple):
    """Predictions at every position."""

    text: Tensor
    """(B, T, V)."""
    image: Tensor
    """(B, N, K)."""


@PRIORS.register("prior")
class Prior(ImagePrior):
    """Sparse autoregressive transformer over text and image tokens.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.2 and appendix B.

    Choices that the paper does not state: exact GELU; LayerNorm eps 1e-5 and one final LayerNorm; biases in
    all layers; matrices N(0, 0.02^2) with residual outputs scaled by 1 / sqrt(2 layers); untied heads that start
    at zero, so that a fresh model predicts uniformly; padding tokens are inputs but not targets, because text is
    always given when sampling.

    Args:
        config: Architecture.
        backend: Attention back-end, a name in `models.attention.BACKENDS`. Defaults to "auto".

    Example:
        >>> prior = Prior(PriorConfig(text_length=4, text_vocab=10, image_height=2, image_width=3,
        ...                           codebook_size=7, width=16, num_layers=2, num_heads=2))
        >>> text, codes = torch.tensor([[1, 2, 12, 13]]), torch.tensor([[[0, 1, 2], [3, 4, 5]]])
        >>> logits = prior(text, codes)
        >>> logits.text.shape, logits.image.shape
        (torch.Size([1, 4, 10]), torch.Size([1, 6, 7]))
    """

    config_class = PriorConfig
    config: PriorConfig

    def __init__(self, config: PriorConfig, backend: str = "auto") -> None:
        super().__init__()
        self.seed = fresh_seed()  # before PyTorch samples its own weights, which it does only if there is storage
        self.config = config
        d = config.width
        self.text_embedding = nn.Embedding(config.text_vocab + config.text_length, d)
        self.text_position = nn.Embedding(config.text_length, d)
        self.image_embedding = nn.Embedding(config.codebook_size, d)
        self.row_position = nn.Embedding(config.image_height, d)
        self.column_position = nn.Embedding(config.image_width, d)
        self.start_of_text = nn.Parameter(torch.empty(d))
        self.start_of_image = nn.Parameter(torch.empty(d))
        specs = layer_masks(config.masks, config.num_layers)
        masks = {spec: Mask.from_spec(spec, config.layout) for spec in dict.fromkeys(specs)}
        hidden = config.mlp_ratio * d
        layers = nn.ModuleList(Layer(d, config.num_heads, hidden, masks[spec], backend) for spec in specs)
        self.layers = cast(Sequence[Layer], layers)  # the type of the members, which nn.ModuleList does not have
        self.final_norm = nn.LayerNorm(d)
        self.text_head = nn.Linear(d, config.text_vocab)
        self.image_head = nn.Linear(d, config.codebook_size)
        if not self.start_of_text.is_meta:
            self.reset_parameters()

    def reset_parameters(self, seed: int | None = None) -> None:
        """Samples initial weights.

        Each parameter is a function of the seed and of its name, so that processes with shards of the network sample
        the same network.

        Args:
            seed: Seed of the weights. Defaults to the seed that was sampled from the global generator at construction.
        """
        seed = self.seed if seed is None else seed
        for name, parameter in self.named_parameters():
            fill(parameter, *self.initial(name), seed, name)

    def initial(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of an initial parameter."""
        kind = name.rpartition(".")[2]
        if "norm" in name:
            return float(kind == "weight"), 0.0
        if kind == "bias" or name.startswith(("text_head", "image_head")):
            return 0.0, 0.0
        if name.endswith("output.weight"):
            return 0.0, 0.02 / math.sqrt(2 * self.config.num_layers)
        return 0.0, 0.02

    def grow_from(self, small: Prior) -> None:
        """Initializes the weights from a prior with a smaller grid.

        Pretraining on images of half the size costs a quarter of the time. The embedding of each row and column of the
        smaller grid is repeated for the rows and columns that replace it; all other weights are copied.

        Args:
            small: Prior whose config differs only in ``image_height`` and ``image_width``.

        Raises:
            ValueError: Another option differs, or this grid is not a multiple of the smaller one.
        """
        repeats = {}
        for name in ("image_height", "image_width"):
            large, little = getattr(self.config, name), getattr(small.config, name)
            if large % little:
                raise ValueError(f"{name} {large} is not a multiple of {little}, the {name} of the prior to grow from")
            repeats[name] = large // little
        if other := differences(self.config, small.config, besides=repeats):
            raise ValueError(
                f"a prior can only grow from one that differs in {' and '.join(repeats)} alone, expected "
                f"and got: {other}"
            )
        state = small.state_dict()
        for name, times in (("row_position", "image_height"), ("column_position", "image_width")):
            state[f"{name}.weight"] = state[f"{name}.weight"].repeat_interleave(repeats[times], 0)
        self.load_state_dict(state)

    def residual_blocks(self) -> list[ResidualBlock]:
        """Attention and MLP of every layer, first to last: 128 blocks in the paper."""
        return blocks_of(self.layers)

    @cached_property
    def masks(self) -> list[Mask]:
        """Mask of every layer."""
        return [layer.attention.mask for layer in self.layers]

    def null_text(self) -> Tensor:
        """The empty caption, all padding: int64 (T,)."""
        pads = torch.arange(self.config.text_length, device=self.start_of_text.device)
        return pads + self.config.text_vocab

    def embed_text(self, text: Tensor) -> Tensor:
        """Inputs of the text positions: ids with padding ids (B, T) to (B, T, d)."""
        tokens = self.text_embedding(text[:, :-1])
        start = self.start_of_text.expand(len(text), 1, -1)
        out: Tensor = torch.cat([start, tokens], 1) + self.text_position.weight
        return out

    def image_positions(self) -> Tensor:
        """Sum of row and column embedding of every cell in raster order, (N, d)."""
        grid = self.row_position.weight[:, None] + self.column_position.weight[None]
        return grid.flatten(0, 1)

    def embed_image(self, codes: Tensor) -> Tensor:
        """Inputs of the image positions: codes (B, h, w) to (B, N, d)."""
        tokens = self.image_embedding(codes.flatten(1)[:, :-1])
        start = self.start_of_image.expand(len(codes), 1, -1)
        return torch.cat([start, tokens], 1) + self.image_positions()

    def hidden(self, text: Tensor, codes: Tensor) -> Tensor:
        """Final hidden states of the complete stream, (B, L, d)."""
        self.check(text, codes)
        x = torch.cat([self.embed_text(text), self.embed_image(codes)], 1)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.final_norm(x)
        return out

    def forward(self, text: Tensor, codes: Tensor) -> Logits:
        """Predicts every token from those before it.

        Args:
            text: Text ids, padding at position p as V + p, int64 (B, T).
            codes: Image tokens, int64 (B, h, w).

        Returns:
            Text logits (B, T, V) and image logits (B, N, K), each from its own head.
        """
        x = self.hidden(text, codes)
        split = self.config.text_length
        return Logits(self.text_head(x[:, :split]), self.image_head(x[:, split:]))

    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Image logits without text logits, (B, N, K)."""
        logits: Tensor = self.image_head(self.hidden(text, codes)[:, self.config.text_length :])
        return logits

    def decoding(self, text: Tensor, num_candidates: int) -> PriorDecoding:
        """Prefills the captions and prepares for sampling."""
        return PriorDecoding(self, text, num_candidates)

    def window_decoding(self, text: Tensor, num_candidates: int, window: int) -> PriorDecoding:
        """Prefills the captions and prepares to sample up to ``window`` tokens per pass."""
        return PriorDecoding(self, text, num_candidates, window)

    @property
    def text_loss_weight(self) -> float:
        """Weight of the text loss, of the config."""
        return self.config.text_loss_weight

    def is_text_target(self, text: Tensor) -> Tensor:
        """Whether a position has a text token, not padding: bool (B, T)."""
        return text < self.config.text_vocab

    def predicted(
        self, text: Tensor, codes: Tensor, targets: TextTargets | None = None
    ) -> tuple[Predicted, Predicted]:
        """Text tokens at the positions of the text, without padding, and image tokens at those of the image."""
        x = self.hidden(text, codes)
        split = self.config.text_length
        chosen = targets or self.text_targets(text)
        heads = self.text_head, self.image_head
        of_text, of_image = ((head.weight, head.bias) for head in heads)
        return (
            Predicted(x[:, :split][chosen], *of_text, text[chosen]),
            Predicted(x[:, split:].flatten(0, 1), *of_image, codes.flatten()),
        )
