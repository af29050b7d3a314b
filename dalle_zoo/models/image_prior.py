"""The interface of all priors, native and external, and their registry; sampling and the pipeline use only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.values import check_type

# P prompts, n candidates of each, B images, T text positions, h w code grid, N = h * w image tokens, K codebook size


class Decoding(Protocol):
    """State of P prompts with n candidates each while their image tokens are sampled.

    A decoding with ``on_device = True`` also accepts the number of a step as int64 (1,) on the device, from the second
    step on, and never waits for the host, so a GPU can replay the step as a graph.
    """

    def step(self, index: Any, previous: Tensor | None) -> Tensor:
        """Logits of one image token.

        Args:
            index: Number of the token, 0 … N - 1; steps are taken in this order.
            previous: The token before it, int64 (P, n); None at 0.

        Returns:
            (P, n, K).
        """


class WindowDecoding(Protocol):
    """Like `Decoding`, but runs several image tokens at once, from guesses of the tokens between."""

    def window(self, index: int, previous: Tensor) -> Tensor:
        """Logits of image tokens ``index`` … ``index + W - 1`` in one pass.

        Args:
            index: The first token; all tokens before it have been run with their final values.
            previous: The token before each position, int64 (P, n, W); the first is ignored if ``index`` is 0.

        Returns:
            (P, n, W, K); the logits of a token are right if all tokens before it are.
        """


class ImagePrior(nn.Module, ABC):
    """Predicts the image tokens of a caption, one after the other."""

    config_class: ClassVar[type]
    """Frozen dataclass of the architecture; its fields are what ``config.json`` holds."""
    config: Any
    """Instance of `config_class`, with at least `text_length`, `text_vocab`, `image_height`, `image_width`,
    `image_length` and `codebook_size`."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def caption_length(self) -> int:
        """Number of caption tokens that fit; longer captions are truncated."""
        length: int = self.config.text_length
        return length

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises `ValueError` if the prior cannot have been trained with the tokenizer."""
        if self.config.text_vocab != tokenizer.vocab_size:
            raise ValueError(
                f"the prior has {self.config.text_vocab} text tokens, the text tokenizer {tokenizer.vocab_size}: "
                "use the tokenizer that the prior was trained with"
            )

    def encode_captions(self, tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
        """Encodes captions to ids with special tokens and padding: int64 (P, T) on the CPU."""
        return CaptionEncoder(tokenizer, self.caption_length)(captions)

    def null_text(self) -> Tensor:
        """Ids of the empty caption, for classifier-free guidance: int64 (T,).

        Raises:
            ValueError: The prior has no empty caption.
        """
        raise ValueError(f"{type(self).__name__} has no empty caption for guidance: leave guidance_scale at 1")

    def check(self, text: Tensor, codes: Tensor) -> None:
        """Raises `ValueError` if text (B, T) and codes (B, h, w) do not fit the configuration."""
        c = self.config
        check_type("text", text, Tensor, "a tensor")
        check_type("codes", codes, Tensor, "a tensor")
        if text.ndim != 2 or text.shape[1] != c.text_length:
            raise ValueError(f"text must have shape (B, {c.text_length}), got {tuple(text.shape)}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (c.image_height, c.image_width):
            raise ValueError(f"codes must have shape (B, {c.image_height}, {c.image_width}), got {tuple(codes.shape)}")
        if len(text) != len(codes):
            raise ValueError(f"text and codes must have the same batch size, got {len(text)} and {len(codes)}")

    @abstractmethod
    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass, the twin of `decoding`: (B, T) and (B, h, w) to (B, N, K)."""

    @abstractmethod
    def decoding(self, text: Tensor, num_candidates: int) -> Decoding:
        """Prefills the captions, once each, and prepares for sampling.

        Args:
            text: Ids from `encode_captions`, int64 (P, T).
            num_candidates: Candidates n of each prompt.
        """

    def window_decoding(self, text: Tensor, num_candidates: int, window: int) -> WindowDecoding:
        """Prefills the captions and prepares to run up to ``window`` image tokens per pass.

        Raises:
            ValueError: The prior can only run one token per pass.
        """
        raise ValueError(f"{type(self).__name__} can only sample one token per pass: omit window")


PRIORS: Registry[type[ImagePrior]] = Registry("prior", group="dalle_zoo.priors", base=ImagePrior)
