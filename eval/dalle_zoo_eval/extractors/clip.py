"""Networks of images and captions: CLIP, and the rankers of dalle-zoo, which have the same format on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_zoo import ranker_folder
from dalle_zoo.files import sha256_file
from dalle_zoo.model_folder import WEIGHTS
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.weights import index_path, read_headers
from dalle_zoo_eval.extractors.base import EXTRACTORS, ExtractorFileError, check_images, exact_float32

# B images or captions, H W pixels, d features

TEXTS = (".json", ".txt", ".model")
"""Suffixes of the files that determine how images are scaled and captions are tokenized."""
CAPTIONS = 256
"""Number of captions encoded at once."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveExtractor:
    """A CLIP folder of transformers, ready to use."""

    name: str
    record: Mapping[str, Any]
    ranker: Ranker

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images unchanged: they are scaled on the device."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to ``features``, unit vectors (B, d)."""
        check_images(images)
        with exact_float32(self.ranker.device):
            return {"features": self.ranker.image_features(images.to(self.ranker.device).float() / 255).cpu()}

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors of B captions, (B, d); equal captions have equal vectors."""
        unique = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        with exact_float32(self.ranker.device):
            texts = list(unique)
            parts = [self.ranker.text_features(texts[i : i + CAPTIONS]).cpu() for i in range(0, len(texts), CAPTIONS)]
            return torch.cat(parts)[[unique[caption] for caption in captions]]


@EXTRACTORS.register(
    "clip", obtain="clip, a CLIP folder as transformers writes it, such as openai/clip-vit-base-patch32"
)
def load_clip(location: Path, device: torch.device, expected_sha256: str | None = None) -> ContrastiveExtractor:
    """Opens a CLIP folder as transformers writes it; nothing is downloaded, and no pickled weights are read.

    Args:
        location: Folder with the files of `dalle_zoo.ranker_folder`.
        device: Device of the network.
        expected_sha256: Digest that the weights must have, as in the record of an earlier evaluation. Defaults to any.
    """
    return open_contrastive("clip", location, device, expected_sha256)


@EXTRACTORS.register("ranker", obtain="ranker, the folder of a dalle-zoo model", model_folder="ranker")
def load_ranker(location: Path, device: torch.device, expected_sha256: str | None = None) -> ContrastiveExtractor:
    """Opens the ranker of a dalle-zoo model.

    If candidates were reranked, the ranker has selected the images that it evaluates: trust another network more.

    Args:
        location: Folder of a model, whose ``ranker`` is taken, or of a ranker.
        device: Device of the network.
        expected_sha256: Digest that its weights must have. Defaults to any.
    """
    inner = location / "ranker"
    return open_contrastive("ranker", inner if inner.is_dir() else location, device, expected_sha256)


@EXTRACTORS.register(
    "clip-l14-336", obtain="clip-l14-336, the folder openai/clip-vit-large-patch14-336 as transformers writes it"
)
def load_clip_336(location: Path, device: torch.device, expected_sha256: str | None = None) -> ContrastiveExtractor:
    """Opens the CLIP of CMMD: patches of 14 pixels, and images squeezed to 336 x 336 without a crop, as in its code.

    Arguments and errors are those of `load_clip`; a network with other patches or images also raises an error.
    """
    opened = open_contrastive("clip-l14-336", location, device, expected_sha256)
    vision = opened.ranker.model.config.vision_config
    if (vision.image_size, vision.patch_size) != (336, 14):
        raise ExtractorFileError(
            f"{location} takes images of {vision.image_size} pixels in patches of {vision.patch_size}, expected 336 "
            "and 14: CMMD is defined with openai/clip-vit-large-patch14-336"
        )
    opened.ranker.preprocessing = replace(opened.ranker.preprocessing, resize=(336, 336), crop=None)
    record = {**opened.record, "resize": f"{opened.ranker.preprocessing.mode} with antialias, aspect not kept"}
    return replace(opened, record=record)


@EXTRACTORS.register(
    "pickscore", obtain="pickscore, the folder yuvalkirstain/PickScore_v1 with the tokenizer of its CLIP"
)
def load_pickscore(location: Path, device: torch.device, expected_sha256: str | None = None) -> ContrastiveExtractor:
    """Opens the CLIP of PickScore; arguments and errors as in `load_clip`."""
    return open_contrastive("pickscore", location, device, expected_sha256)


def open_contrastive(
    name: str, folder: Path, device: torch.device, expected_sha256: str | None
) -> ContrastiveExtractor:
    """Opens a CLIP folder under a name; arguments and errors as in `load_clip`."""
    weights = folder / WEIGHTS
    if not weights.is_file() and not index_path(weights).is_file():
        raise ExtractorFileError(
            f"{weights} is missing: expected a CLIP folder as transformers writes it, with config.json, {WEIGHTS} and "
            "tokenizer.json; copy it there, for example openai/clip-vit-base-patch32 saved with save_pretrained"
        )
    try:
        digest = digest_of_weights(weights)
        if expected_sha256 and digest != expected_sha256:
            raise ValueError(f"{weights.name} has sha256 {digest}, expected {expected_sha256}: copy the right folder")
        ranker = ranker_folder.load_ranker(folder).to(device).requires_grad_(False)
    except (FileNotFoundError, ValueError) as error:
        raise ExtractorFileError(f"{folder} cannot be opened as a CLIP folder: {error}") from None
    side, crop = ranker.preprocessing.size, ranker.preprocessing.crop
    record = {
        "name": name,
        "sha256": digest,
        "pixels": side,
        "resize": f"{ranker.preprocessing.mode} with antialias, {f'center crop {side}x{side}' if crop else 'no crop'}",
        "files_sha256": {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.suffix in TEXTS},
    }
    return ContrastiveExtractor(name=name, record=record, ranker=ranker)


def digest_of_weights(weights: Path) -> str:
    """Returns the sha256 of the weights; for shards, the sha256 of their digests in the order of their names."""
    digests = [sha256_file(file) for file in sorted({header.file for header in read_headers(weights).values()})]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
