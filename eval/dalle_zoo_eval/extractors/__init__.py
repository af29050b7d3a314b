"""Extractors: images, perhaps with captions, to features.

| name | features | file |
|---|---|---|
| `inception-2015` | TensorFlow's Inception, 2048; 1008 logits | ``weights-inception-2015-12-05-6726825d.pth`` |
| `dmgan` | torchvision's Inception as DM-GAN's code feeds it, 2048 | ``inception_v3_google-1a9a5a14.pth`` |
| `clip` | a CLIP of transformers; captions too | its folder |
| `ranker` | the ranker of a dalle-zoo model; captions too | the model's folder, or the ranker's |
| `mobilenet` | MobileNet v1, 256 | ``mobilenet_v1_025_224.safetensors`` |
| `image_tokenizer`, `prior` | codes, likelihoods | the measured model itself, see `model_parts` |

A distance between features of the first two is called FID, each in a column of its own. All files are local, and
nothing is unpickled beyond tensors. Other distributions use the entry-point group ``dalle_zoo.extractors``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dalle_zoo_eval.extractors import clip, inception, mobilenet  # noqa: F401 (they register themselves)
from dalle_zoo_eval.extractors.base import EXTRACTORS, Extractor, ExtractorFileError, PairExtractor, TextExtractor

__all__ = ["EXTRACTORS", "Extractor", "ExtractorFileError", "PairExtractor", "TextExtractor", "load_extractor"]


def load_extractor(
    name: str, location: str | Path, device: torch.device | str = "cpu", *, expected_sha256: str | None = None
) -> Extractor:
    """Opens an extractor by name.

    Args:
        name: One of `EXTRACTORS`.
        location: Its file or folder, as in the table above; for a single file also the folder that holds it.
        device: Where it computes.
        expected_sha256: sha256 that its weights file must have; if missing, that of the published file where only one
            such file makes the numbers what they are called (`inception-2015`, `dmgan`), else any.

    Raises:
        ExtractorFileError: The file is missing or another one; the message says which to fetch and where to put it.
        UnknownNameError: There is no such network.
        ImportError: A package of the ``eval`` extra is missing.
    """
    return EXTRACTORS[name](Path(location), torch.device(device), expected_sha256)
