"""Architecture of DALLE-pytorch's prior; names of the original are in brackets.

Reference: https://github.com/lucidrains/DALLE-pytorch, versions 0.1 to 1.6.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dalle_zoo.masks import TextImageLayout, layer_masks
from dalle_zoo.models.config import ImagePriorConfig
from dalle_zoo.models.external.dalle_pytorch_sparse import BLOCK

BOS = 0
"""Id of <bos>, which precedes every caption, and of padding in the ids from the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DallePytorchConfig(ImagePriorConfig):
    """Architecture; defaults are those of the original, sizes those of its training script."""

    text_length: int = 256
    """Text tokens T [text_seq_len]."""
    text_vocab: int = 49408
    """Text vocabulary V, without padding tokens [num_text_tokens]."""
    image_height: int = 32
    """Rows of the code grid; in the original the grid is square."""
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
    """Indices of the layers with block-sparse attention; their mask must be full [attn_types sparse]."""
    gmlp_layers: tuple[int, ...] = ()
    """Indices of the layers with a gMLP block instead of attention; their mask must be full [attn_types mlp]."""
    positions: Literal["rotary", "axial"] = "rotary"
    """Rotary embeddings in every attention, or learned embeddings of text positions, rows and columns [rotary_emb]."""
    padding: Literal["learned", "masked"] = "learned"
    """One learned padding token per position, or, before version 0.9, a padding mask."""
    padding_id: int = BOS
    """Id that pads captions: 0 in the original, which means the padding token of its position; 1 in
    learning-at-home/dalle."""
    shift_tokens: bool = True
    """Whether every branch takes some of its input channels from earlier positions [shift_tokens]."""
    layer_scale: bool = True
    """Whether every branch has a learned scale (LayerScale); since version 0.8."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm as in versions 0.5 and 0.6."""
    sandwich_norm: bool = False
    """Whether the output of every branch is normalized too [sandwich_norm]."""
    divide_by_max: bool = False
    """Whether the last hidden state is divided by its maximum [stable]."""
    reversible: bool = False
    """Whether the network is reversible: attention and MLP add to separate residual streams [reversible]."""
    tied_embeddings: bool = False
    """Whether the weights of head and token embeddings are tied [share_input_output_emb]."""
    shared_attention: tuple[int, ...] = ()
    """Index of each layer's attention if layers share weights; empty if each has its own [shared_attn_ids]."""
    shared_mlp: tuple[int, ...] = ()
    """Index of each layer's MLP, likewise [shared_ff_ids]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("num_layers", "num_heads", "head_size")
        for name, known in (
            ("positions", ("rotary", "axial")), ("padding", ("learned", "masked")), ("norm", ("layer", "rms")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 <= self.padding_id < self.text_vocab:
            raise ValueError(f"padding_id must be in 0..{self.text_vocab - 1}, got {self.padding_id}")
        for name in ("shared_attention", "shared_mlp"):
            numbers = tuple(getattr(self, name))  # a list in a JSON file
            object.__setattr__(self, name, numbers)
            if numbers and (len(numbers) != self.num_layers or {*numbers} != {*range(max(numbers) + 1)}):
                raise ValueError(
                    f"{name} must have {self.num_layers} indices, one per layer, which use 0, 1, ... without gaps, "
                    f"got {numbers}"
                )
        if self.shift_tokens and self.width < 2:
            raise ValueError(f"shift_tokens needs a width of at least 2, got {self.width}")
        self._check_special_layers(layer_masks(self.masks, self.num_layers))  # rejects a typo, with a suggestion

    def _check_special_layers(self, masks: Sequence[str]) -> None:
        """Raises `ValueError` if block-sparse or gMLP layers contradict each other or another option."""
        for name in ("sparse_layers", "gmlp_layers"):
            numbers = tuple(getattr(self, name))
            object.__setattr__(self, name, numbers)
            if any(number not in range(self.num_layers) or masks[number] != "full" for number in numbers):
                raise ValueError(f"{name} must be indices of layers whose mask is full, got {numbers}")
        if {*self.sparse_layers} & {*self.gmlp_layers}:
            raise ValueError(
                f"sparse_layers and gmlp_layers must not overlap, got {self.sparse_layers} and {self.gmlp_layers}"
            )
        if self.gmlp_layers and self.shared_attention:
            raise ValueError(f"gmlp_layers cannot be combined with shared_attention, got {self.gmlp_layers}")
        if self.sparse_layers and self.input_length % BLOCK:
            raise ValueError(
                f"block-sparse attention needs an input length (text_length + image_height * image_width) that is a "
                f"multiple of {BLOCK}, got {self.input_length}"
            )

    @property
    def layout(self) -> TextImageLayout:
        """Positions of the stream, including <bos>; the last one is never an input."""
        return TextImageLayout(self.text_length + 1, self.image_height, self.image_width)

    @property
    def input_length(self) -> int:
        """Number of input positions: all but the last one."""
        return self.layout.length - 1

    @property
    def text_ids(self) -> int:
        """Rows of the text embedding, and text logits of the head."""
        return self.text_vocab + (self.text_length if self.padding == "learned" else 0)
