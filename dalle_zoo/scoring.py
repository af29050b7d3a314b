"""Scores images against texts: by the ranker, and by the prior's own likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.call import BATCH_SIZE, as_texts, check_ids, check_images
from dalle_zoo.codec import CodecModel
from dalle_zoo.regions import following, ranks_by_likelihood
from dalle_zoo.sampling import token_log_likelihood

# P prompts, N candidates of a prompt, K of them kept, B images, T text positions, h w code grid


@dataclass(frozen=True)
class Selection:
    """The best K candidates of every prompt, best first."""

    best: Tensor
    """Numbers of the candidates, int64 (P, K)."""
    scores: Tensor
    """Their scores, (P, K)."""
    images: Tensor | None
    """Their pixels in [0, 1], (P, K, 3, H, W); None if they were ranked without being decoded."""


class ScoringModel(CodecModel):
    """A model that scores images; the constructor is that of `PretrainedModel`."""

    def score(self, images: Sequence[Image.Image] | Tensor, texts: Sequence[str]) -> Tensor:
        """The ranker's score of images against texts.

        Args:
            images: B images, or pixels in [0, 1], (B, 3, H, W).
            texts: One text per image.

        Returns:
            Scores on the CPU, (B,): the larger, the better the text describes the image.

        Raises:
            TypeError: An image or a text is of another type.
            ValueError: The model has no ranker, an image does not fit the model, or the numbers of images and texts
                differ.
        """
        if self.ranker is None:
            raise ValueError("this model has no ranker: log_likelihood scores images by the prior")
        texts, pixels = _texts_of(images, texts), self._pixels(images)
        with torch.inference_mode():
            return self.ranker.scores(pixels.to(self.device), texts).cpu()

    def log_likelihood(self, images: Sequence[Image.Image] | Tensor, texts: Sequence[str]) -> Tensor:
        """The prior's own log-likelihood of images given texts.

        Args:
            images: B images, or pixels in [0, 1], (B, 3, H, W).
            texts: One text per image.

        Returns:
            Sums over the image tokens, natural logarithm, (B,) on the CPU.

        Raises:
            TypeError: An image or a text is of another type.
            ValueError: An image does not fit the model, or the numbers of images and texts differ.
        """
        texts, codes = _texts_of(images, texts), self._encode(self._pixels(images))
        return token_log_likelihood(self.prior, self.encode_text(texts), codes).flatten(1).sum(1)

    def rank_captions(self, image: Image.Image | Tensor, captions: Sequence[str]) -> list[tuple[str, float]]:
        """Captions an image by choosing among candidates: those under which the prior finds it most likely first.

        Args:
            image: A PIL image, or pixels in [0, 1], (3, H, W).
            captions: Candidates, at least one.

        Returns:
            Captions with the log-likelihood of the image, best first.

        Raises:
            TypeError: The captions are not strings, or there is none.
            ValueError: The image does not fit the model.
        """
        captions = as_texts("captions", captions)
        codes = self.encode_image(image).expand(len(captions), -1, -1)
        values = token_log_likelihood(self.prior, self.encode_text(captions), codes).flatten(1).sum(1)
        best = values.argsort(descending=True, stable=True).tolist()
        return [(captions[index], float(values[index])) for index in best]

    def select(
        self,
        prompts: Sequence[str],
        text: Tensor,
        codes: Tensor,
        keep: int,
        given: Tensor | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Selection:
        """Selects the best candidates: by the ranker, or by how likely the kept cells are that follow sampled ones.

        Args:
            prompts: P prompts.
            text: Their text ids, int64 (P, T).
            codes: Complete codes, int64 (P, N, h, w).
            keep: Number K of candidates to keep per prompt.
            given: Kept codes, int64 (h, w), with `SAMPLE` elsewhere. If any of them follows a sampled cell in raster
                order, candidates are ranked by `following_log_likelihood`. Defaults to none.
            batch_size: Number of images decoded at once. Defaults to 64.
        """
        for name, ids in {"text": text, "codes": codes}.items():
            check_ids(name, ids)
        if codes.ndim != 4 or not len(prompts) == len(text) == len(codes):
            raise ValueError(
                f"codes must have shape (P, N, h, w) with one row per prompt, got {tuple(codes.shape)} for "
                f"{len(prompts)} prompts and {len(text)} rows of text"
            )
        if given is not None and ranks_by_likelihood(given):
            scores, best = self.following_log_likelihood(text, codes, given).sort(descending=True, stable=True)
            return Selection(best[:, :keep], scores[:, :keep], None)
        parts = []
        for prompt, candidates in zip(prompts, codes, strict=True):
            images = self.decode(candidates, batch_size)
            scores, best = self.score(images, [prompt] * len(images)).sort(descending=True, stable=True)
            parts.append((best[:keep], scores[:keep], images[best[:keep]]))
        return Selection(*map(torch.stack, zip(*parts, strict=True)))

    def following_log_likelihood(self, text: Tensor, codes: Tensor, given: Tensor) -> Tensor:
        """Log-likelihood of the kept cells that follow a sampled cell, at temperature 1 and without guidance.

        Args:
            text: Text ids, int64 (P, T).
            codes: Complete codes, int64 (P, N, h, w).
            given: Kept codes, int64 (h, w), with `SAMPLE` elsewhere.

        Returns:
            Sums over the cells, natural logarithm, (P, N).
        """
        values = token_log_likelihood(self.prior, text.cpu().repeat_interleave(codes.shape[1], 0), codes.flatten(0, 1))
        return (values * following(given)).sum((1, 2)).view(codes.shape[:2])


def _texts_of(images: Sequence[Image.Image] | Tensor, texts: Sequence[str]) -> list[str]:
    """Returns the texts of images, one per image."""
    check_images(images)
    texts = as_texts("texts", texts)
    if len(images) != len(texts):
        raise ValueError(f"expected one text per image, got {len(images)} images and {len(texts)} texts")
    return texts
