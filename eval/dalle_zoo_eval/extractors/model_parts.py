"""Parts of the evaluated model as extractors: its image tokenizer and its prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.extractors.base import EXTRACTORS, check_images, exact_float32
from dalle_zoo_eval.moments import in_batches

# B images, h w code grid, T text positions, K codebook size

BATCH = 32
"""Number of images whose likelihood the prior computes at once."""


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerExtractor:
    """Images to codes, by the image tokenizer of a model."""

    pipe: DallePipeline
    record: Mapping[str, Any]
    name: str = "image_tokenizer"

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images unchanged."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to ``codes``, int64 (B, h, w), and ``codebook_size``, (B,)."""
        check_images(images)
        with exact_float32(self.pipe.device):
            codes = encode(self.pipe, images)
        return {"codes": codes, "codebook_size": torch.full((len(codes),), self.pipe.image_tokenizer.codebook_size)}


@dataclass(frozen=True, kw_only=True)
class PriorExtractor:
    """Images and captions to likelihoods, by image tokenizer and prior of a model."""

    pipe: DallePipeline
    record: Mapping[str, Any]
    name: str = "prior"

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images as they are."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Raises `TypeError`: a likelihood needs captions, see `pairs`."""
        raise TypeError("the prior needs captions: call pairs")

    def pairs(self, images: Tensor, captions: Sequence[str], others: Sequence[str]) -> dict[str, Tensor]:
        """Returns negative log-likelihoods of the codes of images.

        Args:
            images: uint8 (B, 3, H, W).
            captions: Caption of each image.
            others: Caption of another image for each.

        Returns:
            ``nll`` with the right, another and no caption, nats, float64 (B, 3), and ``num_tokens``, (B,).
        """
        check_images(images)
        with exact_float32(self.pipe.device):
            codes, right = encode(self.pipe, images), self.pipe.encode_text(captions)
            texts = (right, self.pipe.encode_text(others), self.pipe.prior.null_text().expand_as(right))
            nll = torch.stack([self._nll(text, codes) for text in texts], 1)
        return {"nll": nll, "num_tokens": torch.full((len(codes),), codes[0].numel())}

    def _nll(self, text: Tensor, codes: Tensor) -> Tensor:
        device, found = self.pipe.device, []
        for t, c in zip(in_batches(text, BATCH), in_batches(codes, BATCH), strict=True):
            logits = self.pipe.prior.image_logits(t.to(device), c.to(device)).float()
            losses = F.cross_entropy(logits.transpose(1, 2), c.to(device).flatten(1), reduction="none")
            found.append(losses.double().sum(1).cpu())
        return torch.cat(found)


def encode(pipe: DallePipeline, images: Tensor) -> Tensor:
    """Returns the codes of uint8 images (B, 3, H, W), int64 (B, h, w) on the CPU."""
    parts = [
        pipe.image_tokenizer.encode((part.float() / 255).to(pipe.device)).cpu() for part in in_batches(images, 64)
    ]
    return torch.cat(parts)


@EXTRACTORS.register("image_tokenizer", model_part=True)
def open_image_tokenizer(pipe: DallePipeline, files_sha256: Mapping[str, str]) -> ImageTokenizerExtractor:
    """Returns the image tokenizer of a model as an extractor.

    Args:
        pipe: The model.
        files_sha256: sha256 of the model's files.
    """
    return ImageTokenizerExtractor(pipe=pipe, record=_record("image_tokenizer", files_sha256, ("dvae/",)))


@EXTRACTORS.register("prior", model_part=True)
def open_prior(pipe: DallePipeline, files_sha256: Mapping[str, str]) -> PriorExtractor:
    """Returns the prior of a model as an extractor; arguments as in `open_image_tokenizer`."""
    return PriorExtractor(pipe=pipe, record=_record("prior", files_sha256, ("dvae/", "prior/", "tokenizer/")))


def _record(name: str, files_sha256: Mapping[str, str], folders: tuple[str, ...]) -> dict[str, Any]:
    files = {path: digest for path, digest in files_sha256.items() if path.startswith(folders)}
    return {"name": f"{name} of the model", "files_sha256": files}
