"""The ranker: a contrastive network (CLIP) that scores how well an image fits a caption.

The native ranker and external CLIP models have the same format, see `dalle_zoo.ranker_folder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.tokenizers.library import TOKENIZER_FILE, LibraryTokenizer
from dalle_zoo.values import check_integers

if TYPE_CHECKING:
    from transformers import CLIPModel

# B pairs, C channels, H W image, S text positions, d features

START, END = "<|startoftext|>", "<|endoftext|>"
LEGACY_END_ID = 2
"""End id in CLIP configs from before transformers 4.31, regardless of the real one, which is the highest id."""
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Architecture of a native ranker, small enough to train on a CPU."""

    image_size: int = 64
    """Side of the square images, pixels."""
    patch_size: int = 8
    """Side of a patch, pixels."""
    vision_width: int = 128
    """Width of the image tower."""
    vision_layers: int = 6
    """Layers of the image tower."""
    vision_heads: int = 4
    """Attention heads of the image tower."""
    text_width: int = 128
    """Width of the caption tower."""
    text_layers: int = 4
    """Layers of the caption tower."""
    text_heads: int = 4
    """Attention heads of the caption tower."""
    embed_dim: int = 128
    """Number of features d of both towers."""
    text_length: int = 32
    """Text positions S, including the start and end tokens."""
    text_vocab: int = 16384
    """Vocabulary of the text tokenizer; the ids of the start and end tokens follow it."""

    def __post_init__(self) -> None:
        check_integers(self, *vars(self))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is not a multiple of {tower}_heads {heads}")
        if self.text_length < 3:
            raise ValueError(f"text_length must be at least 3 (start, a token, end), got {self.text_length}")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of images: resize, center crop, rescale, normalize, as a CLIP folder of transformers states it."""

    size: int
    """Side of the network's square images, pixels."""
    resize: int | tuple[int, int] | None
    """Length of the shorter side, or height and width; None if images are not resized."""
    crop: tuple[int, int] | None
    """Height and width of the center crop, which pads smaller images with black; None without a crop."""
    scale: float = 1.0
    """Factor of pixels in [0, 1]; 255 if the network takes bytes."""
    mean: tuple[float, ...] = _HALF
    """Mean that is subtracted from scaled pixels, one number per channel."""
    std: tuple[float, ...] = _HALF
    """Standard deviation that they are divided by afterwards, one number per channel."""
    mode: str = "bicubic"
    """Interpolation, "bicubic" or "bilinear"."""

    def __call__(self, images: Tensor) -> Tensor:
        """Converts pixels in [0, 1], (B, 3, H, W), to network input, (B, 3, size, size).

        Raises:
            ValueError: The images do not have the size of the network, and are neither resized nor cropped to it.
        """
        images = self._resized(images)
        if self.crop is not None:
            images = _center_crop(images, *self.crop)
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            raise ValueError(
                f"images have {height}x{width} pixels after the preprocessing of the CLIP folder, but its network "
                f"takes {self.size}x{self.size}: pass square images, or set do_resize and do_center_crop in its "
                "preprocessor_config.json"
            )
        channels = torch.tensor([self.mean, self.std], dtype=images.dtype)[..., None, None]
        mean, std = channels.to(images.device, non_blocking=True).unbind(0)
        return (images * self.scale - mean) / std

    def _resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if isinstance(self.resize, int):
            short = min(height, width)
            # Rounded down, as in transformers.
            size = (self.resize * height // short, self.resize * width // short)
        else:
            size = self.resize or (height, width)
        if size == (height, width):
            return images
        pixels = (images.clamp(0, 1) * 255).round()
        # On the CPU images are resized in bytes, in the fixed-point arithmetic of PIL and transformers.
        if pixels.device.type == "cpu":
            pixels = pixels.byte()
        resized = F.interpolate(pixels, size, mode=self.mode, antialias=True, align_corners=False)
        return resized.to(images.dtype).round().clamp(0, 255) / 255


def _center_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Crops images, (B, C, H, W) to (B, C, height, width); smaller ones are padded with black first."""
    missing = (max(0, width - images.shape[-1]), max(0, height - images.shape[-2]))
    if any(missing):
        images = F.pad(images, [side for n in missing for side in (n // 2, n - n // 2)])
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


class Ranker(nn.Module):
    """Scores images against captions; wraps transformers' ``CLIPModel``.

    Reference: Learning Transferable Visual Models From Natural Language Supervision (Radford et
    al., 2021); used for ranking in section 2.6 of Zero-Shot Text-to-Image Generation (Ramesh et
    al., 2021). The constructor takes the components; `create` and `dalle_zoo.ranker_folder.load_ranker` build them.

    Args:
        model: The two towers.
        tokenizer: Library tokenizer that adds start and end tokens to a caption.
        preprocessing: Preprocessing of images.
    """

    def __init__(self, model: CLIPModel, tokenizer: Tokenizer, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model: Any = model
        self.preprocessing = preprocessing
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.text_length)
        # A caption that spells "<|endoftext|>" must not end there.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self._end_id = _check_end(tokenizer, model.config.text_config)

    @classmethod
    def create(cls, config: RankerConfig, tokenizer: LibraryTokenizer) -> Self:
        """Creates a ranker with random weights from the global generator.

        Args:
            config: Architecture.
            tokenizer: Text tokenizer; its ids are unchanged, and the ids of start and end follow them.

        Raises:
            ValueError: The vocabulary size differs from that of the config.
        """
        from transformers.models.clip.configuration_clip import CLIPConfig
        from transformers.models.clip.modeling_clip import CLIPModel

        if tokenizer.vocab_size != config.text_vocab:
            raise ValueError(
                f"text_vocab is {config.text_vocab}, but the tokenizer has {tokenizer.vocab_size} "
                f"ids: set text_vocab to {tokenizer.vocab_size}"
            )
        start, end = config.text_vocab, config.text_vocab + 1
        text = {
            "vocab_size": config.text_vocab + 2,
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.text_length,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        vision = {
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        }
        common = {"projection_dim": config.embed_dim, "hidden_act": "gelu"}
        model = CLIPModel(
            CLIPConfig(
                text_config=text | common,
                vision_config=vision | common,
                projection_dim=config.embed_dim,
            )
        )
        side = config.image_size
        preprocessing = Preprocessing(size=side, resize=side, crop=(side, side))
        return cls(model, _with_ends(tokenizer, start, end), preprocessing)

    @property
    def text_length(self) -> int:
        """Text positions S, including start and end."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, a scalar."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions to ids, int64 (B, S') with S' at most S; longer captions are truncated.

        Padding consists of end tokens: attention is causal and the features are read at the first end token, so
        padding has no effect.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions must be a sequence of strings, got a string: pass [{captions!r}]")
        rows = [self.tokenizer.encode(caption).ids for caption in captions]
        length = max(map(len, rows), default=0)
        padded = [row + [self._end_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).to(self.device, non_blocking=True)

    def image_features(self, images: Tensor) -> Tensor:
        """Computes the features of images.

        Args:
            images: Pixels in [0, 1], (B, 3, H, W), of any size; they are resized and cropped for the network.

        Returns:
            Unit vectors, (B, d).
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floats of shape (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        out = self.model.get_image_features(pixel_values=self.preprocessing(images.to(self.device, torch.float32)))
        return F.normalize(out.pooler_output.float(), dim=-1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Computes the features of B captions: unit vectors, (B, d)."""
        out = self.model.get_text_features(input_ids=self.encode_text(captions))
        return F.normalize(out.pooler_output.float(), dim=-1)

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores how well each image fits its caption.

        Args:
            images: Pixels in [0, 1], (B, 3, H, W).
            captions: Caption of each image, B of them; repeated captions are encoded once.

        Returns:
            Cosine similarity times the inverse temperature, (B,).

        Raises:
            ValueError: Images and captions do not pair up, or a score is not finite.
        """
        if len(images) != len(captions):
            raise ValueError(f"captions must be one per image, got {len(captions)} for {len(images)} images")
        unique = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        rows = torch.tensor([unique[c] for c in captions], dtype=torch.int64).to(self.device, non_blocking=True)
        text = self.text_features(list(unique))[rows]
        scores = self.scale * (self.image_features(images) * text).sum(-1)
        if not bool(scores.isfinite().all()):
            raise ValueError(
                "the scores of the ranker are not finite, so images cannot be ranked: its weights are unusable"
            )
        return scores

    def rank(self, images: Tensor, caption: str) -> Tensor:
        """Sorts images (B, 3, H, W) by their score against one caption: indices, int64 (B,), best first."""
        scores = self.scores(images, [caption] * len(images))
        return scores.argsort(descending=True, stable=True)


def retrieval_accuracy(image_features: Tensor, text_features: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Share of features whose partner is among the k most similar features of the other kind, in both directions.

    Rows i are partners. A tie with the partner counts against it.

    Args:
        image_features: Unit vectors, (B, d).
        text_features: Unit vectors, (B, d).
        ks: Values of k. Defaults to 1 and 5.

    Returns:
        Shares, ``image_to_text_top1`` and so on.
    """
    similarity = image_features @ text_features.t()
    found = {}
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.t())):
        better = (matrix >= matrix.diagonal()[:, None]).sum(1) - 1
        for k in ks:
            found[f"{name}_top{k}"] = float((better < k).float().mean())
    return found


def _with_ends(tokenizer: LibraryTokenizer, start: int, end: int) -> Tokenizer:
    """Copies a library tokenizer and makes it add start and end to every caption."""
    own = Tokenizer.from_str(tokenizer.files()[TOKENIZER_FILE])
    own.add_special_tokens([START, END])
    if (own.token_to_id(START), own.token_to_id(END)) != (start, end):
        raise ValueError(f"the tokenizer has {START} or {END} already: open its model with load_ranker")
    own.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)])
    return own


def _check_end(tokenizer: Tokenizer, config: Any) -> int:
    """Returns the id that ends every caption; raises `ValueError` unless the network reads its features there."""
    ids = tokenizer.encode("").ids
    legacy = config.eos_token_id == LEGACY_END_ID
    highest = max(tokenizer.get_vocab().values())
    expected = highest if legacy else config.eos_token_id
    if not ids or ids[-1] != expected:
        raise ValueError(
            f"the network reads a caption's features at id {expected}, but {TOKENIZER_FILE} ends an "
            f"empty caption with {ids[-1:] or 'nothing'}: the files do not belong together"
        )
    if highest >= config.vocab_size:
        raise ValueError(
            f"{TOKENIZER_FILE} has ids up to {highest}, the network a vocabulary of "
            f"{config.vocab_size}: the files do not belong together"
        )
    end: int = ids[-1]
    return end
