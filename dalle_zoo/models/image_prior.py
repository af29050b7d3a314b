"""What every prior offers, of whatever code base, and the registry of them; sampling and the pipeline see this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer

# P prompts, n candidates of each, B images, T text positions, h w code grid, N = h * w image tokens, K codebook size


class Decoding(Protocol):
    """State of P prompts with n candidates each while their image tokens are generated.

    One that has ``on_device = True`` takes the number of a step as int64 (1,) on the device as well, from the second
    step on, and waits for nothing from the host: a GPU then repeats the step as a graph.
    """

    def step(self, index: Any, previous: Tensor | None) -> Tensor:
        """Logits of one image token.

        Args:
            index: Which, 0 … N - 1; steps are taken in this order.
            previous: The token before it, int64 (P, n); None at 0.

        Returns:
            (P, n, K).
        """


class WindowDecoding(Protocol):
    """The same, but several image tokens are run at once, from guesses of those between."""

    def window(self, index: int, previous: Tensor) -> Tensor:
        """Logits of image tokens ``index`` … ``index + W - 1`` in one pass.

        Args:
            index: The first token; all before it were run with their final tokens.
            previous: The token before each, int64 (P, n, W); the first is not looked at where ``index`` is 0.

        Returns:
            (P, n, W, K); those of a token are right if all tokens before it are.
        """


class ImagePrior(nn.Module, ABC):
    """Samples image tokens, one after the other, from a caption."""

    config_class: ClassVar[type]
    """Frozen dataclass of the architecture; its fields are what ``config.json`` holds."""
    config: Any
    """Instance of `config_class`; says `text_length`, `text_vocab`, `image_height`, `image_width`, `image_length` and
    `codebook_size`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises `ValueError` unless the tokenizer is one that the prior can have been trained with."""
        if self.config.text_vocab != tokenizer.vocab_size:
            raise ValueError(
                f"the prior has {self.config.text_vocab} text tokens, the text tokenizer {tokenizer.vocab_size}: "
                "they were not trained together"
            )

    def encode_captions(self, tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
        """Ids as the prior takes them, special tokens and padding included: int64 (P, T) on the CPU."""
        return CaptionEncoder(tokenizer, self.config.text_length)(captions)

    def null_text(self) -> Tensor:
        """The empty caption that classifier-free guidance compares with: int64 (T,).

        Raises:
            ValueError: The prior knows none.
        """
        raise ValueError(f"{type(self).__name__} knows no empty caption to compare with: leave guidance_scale at 1")

    def check(self, text: Tensor, codes: Tensor) -> None:
        """Raises `ValueError` when text (B, T) and codes (B, h, w) do not fit the configuration."""
        c = self.config
        if text.ndim != 2 or text.shape[1] != c.text_length:
            raise ValueError(f"text must have shape (B, {c.text_length}), got {tuple(text.shape)}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (c.image_height, c.image_width):
            raise ValueError(f"codes must have shape (B, {c.image_height}, {c.image_width}), got {tuple(codes.shape)}")
        if len(text) != len(codes):
            raise ValueError(f"text and codes must have one batch size, got {len(text)} and {len(codes)}")

    @abstractmethod
    def image_logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Logits of every image token in one pass, the oracle of `decoding`: (B, T) and (B, h, w) to (B, N, K)."""

    @abstractmethod
    def decoding(self, text: Tensor, num_candidates: int) -> Decoding:
        """Reads the captions, once each, and prepares for sampling.

        Args:
            text: Ids as of `encode_captions`, int64 (P, T).
            num_candidates: Candidates n of each prompt.
        """

    def window_decoding(self, text: Tensor, num_candidates: int, window: int) -> WindowDecoding:
        """As `decoding`, but ready to run up to ``window`` image tokens at once.

        Raises:
            ValueError: The prior runs one token after the other only.
        """
        raise ValueError(f"{type(self).__name__} samples one token after the other: leave window away")


PRIORS: Registry[type[ImagePrior]] = Registry("prior", group="dalle_zoo.priors", base=ImagePrior)
