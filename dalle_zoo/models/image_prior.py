"""The interface of all priors, native and external, and their registry; sampling and the pipeline use only this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dalle_zoo.models.attention.backends import BACKENDS
from dalle_zoo.models.losses import head_loss
from dalle_zoo.models.residual import ResidualBlock
from dalle_zoo.registry import Registry
from dalle_zoo.tokenizers import CaptionEncoder, TextTokenizer
from dalle_zoo.tokenizers.captions import Overlong
from dalle_zoo.values import check_type

# P prompts, n candidates of each, B images, T text positions, h w code grid, N = h * w image tokens, K codebook size,
# M predicted tokens, d width, V rows of a head


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


class PriorLoss(NamedTuple):
    """The loss and its components, nats per token."""

    total: Tensor
    """Weighted sum that is minimized."""
    text: Tensor
    """Mean over the text tokens of the batch that are predicted; 0 if a prior predicts none."""
    image: Tensor
    """Mean over the image tokens of the batch."""


TextTargets = tuple[Tensor, Tensor]
"""Numbers of the captions and of the positions of M text tokens, int64 (M,) each."""
FEWEST = 1e-6
"""Smallest divisor of the text loss."""


class Predicted(NamedTuple):
    """Tokens of one kind, and the head that predicts them."""

    hidden: Tensor
    """Inputs of the head, (M, d)."""
    weight: Tensor
    """Matrix of the head, (V, d)."""
    bias: Tensor | None
    """Bias of the head, (V,), if it has one."""
    tokens: Tensor
    """The tokens, int64 (M,)."""

    def loss(self) -> Tensor:
        """Cross-entropy in nats, summed over the tokens."""
        return head_loss(*self)


class ImagePrior(nn.Module, ABC):
    """Predicts the image tokens of a caption, one after the other.

    A subclass states in `predicted` which tokens its heads predict from which hidden states; the loss, and with it
    training, follows.

    Example:
        >>> from dalle_zoo.models.prior import Prior, PriorConfig
        >>> shape = dict(text_length=4, text_vocab=8, image_height=2, image_width=2, codebook_size=16)
        >>> prior = Prior(PriorConfig(**shape, width=8, num_layers=1, num_heads=1, masks="row"))
        >>> text, codes = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 2, 2, dtype=torch.long)
        >>> loss = prior.loss(text, codes)
        >>> torch.allclose(loss.total, loss.text / 8 + 7 / 8 * loss.image)
        True
    """

    config_class: ClassVar[type]
    """Frozen dataclass of the architecture; its fields are what ``config.json`` holds."""
    config: Any
    """Instance of `config_class`, with at least `text_length`, `text_vocab`, `image_height`, `image_width`,
    `image_length` and `codebook_size`."""

    seed: int = 0
    """Seed of the initial weights."""

    def reset_parameters(self, seed: int | None = None) -> None:
        """Samples initial weights. Defaults to leaving them, as external priors start from trained weights."""
        del seed

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

    def caption_encoder(
        self, tokenizer: TextTokenizer, overlong: Overlong = "truncate", dropout: float = 0.0
    ) -> CaptionEncoder:
        """Returns the encoder of captions to ids with special tokens and padding; it can be sent to other processes.

        Args:
            tokenizer: The text tokenizer that the prior is trained with.
            overlong: As for `CaptionEncoder`.
            dropout: BPE dropout. Defaults to 0.
        """
        return CaptionEncoder(tokenizer, self.caption_length, overlong, dropout)

    def encode_captions(self, tokenizer: TextTokenizer, captions: Sequence[str]) -> Tensor:
        """Encodes captions to ids with special tokens and padding: int64 (P, T) on the CPU."""
        return self.caption_encoder(tokenizer)(captions)

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

    # ------------------------------------------------------------ training

    @property
    def text_loss_weight(self) -> float:
        """Weight of the text loss; the image loss gets the rest. Defaults to the paper's 1/8 (section 2.2)."""
        return 0.125

    def is_text_target(self, text: Tensor) -> Tensor:
        """Which text tokens the text loss counts: ids (B, T) to bool (B, T). Defaults to all."""
        return torch.ones_like(text, dtype=torch.bool)

    def text_targets(self, text: Tensor) -> TextTargets:
        """Numbers of the captions and of the positions that the text loss counts, of `is_text_target`."""
        caption, position = self.is_text_target(text).nonzero(as_tuple=True)
        return caption, position

    @abstractmethod
    def predicted(
        self, text: Tensor, codes: Tensor, targets: TextTargets | None = None
    ) -> tuple[Predicted | None, Predicted]:
        """Runs the network and returns the text tokens and the image tokens that it is trained to predict.

        Args:
            text: Text ids, int64 (B, T).
            codes: Image tokens, int64 (B, h, w).
            targets: `text_targets` of the text. Defaults to computing them, for which the host waits for a GPU.

        Returns:
            The text tokens of `is_text_target`, None for a prior that predicts none; and the image tokens.
        """

    def loss(
        self,
        text: Tensor,
        codes: Tensor,
        text_tokens: Tensor | None = None,
        targets: TextTargets | None = None,
    ) -> PriorLoss:
        """Weighted cross-entropy of text and image tokens, each a mean over its tokens in the batch (2.2).

        Only the required logits are computed, of the tokens in `predicted`.

        Args:
            text: Text ids, int64 (B, T).
            codes: Image tokens, int64 (B, h, w).
            text_tokens: Divisor of the text loss. Defaults to the number of predicted text tokens in the batch.
                Processes that share a batch pass the mean of that number over processes, so that the mean of their
                losses is the loss of the complete batch.
            targets: `text_targets` of the text, as for `predicted`.
        """
        of_text, of_image = self.predicted(text, codes, targets)
        image = of_image.loss() / len(of_image.tokens)
        if of_text is None:
            return PriorLoss(image, torch.zeros_like(image), image)
        # A batch of empty captions may have no text target; the sum of nothing is 0 and stays differentiable.
        count = max(len(of_text.tokens), FEWEST) if text_tokens is None else text_tokens.clamp(min=FEWEST)
        text_loss = of_text.loss() / count
        weight = self.text_loss_weight
        return PriorLoss(weight * text_loss + (1 - weight) * image, text_loss, image)

    def use_attention(self, backend: str) -> None:
        """Sets the attention back-end of all layers that have a choice, a name in `BACKENDS`."""
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = BACKENDS[backend]  # type: ignore[assignment]

    def residual_blocks(self) -> list[ResidualBlock]:
        """Residual blocks, first to last. Defaults to none: the prior can neither be recomputed nor be sharded."""
        return []

    def word_embeddings(self) -> list[str]:
        """Names of the parameters that embed text tokens and nothing else."""
        return [name for name, _ in self.named_parameters() if name.endswith("text_embedding.weight")]

    # ------------------------------------------------------------ sampling

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
