"""Extractors: networks and other functions that map images, and sometimes captions, to features.

| name | features | file |
|---|---|---|
| `inception-2015` | TensorFlow's Inception, 2048; also 1008 logits | ``weights-inception-2015-12-05-6726825d.pth`` |
| `dmgan` | torchvision's Inception with the input of the DM-GAN code, 2048 | ``inception_v3_google-1a9a5a14.pth`` |
| `clip` | a CLIP model of transformers; also captions | its folder |
| `clip-l14-336` | the CLIP of CMMD, images scaled to 336 x 336 | its folder |
| `pickscore` | the CLIP of PickScore; also captions | its folder |
| `dinov2` | DINOv2 ViT-L/14, 1024 | its folder, or ``dinov2_vitl14_pretrain.pth`` |
| `ranker` | the ranker of a dalle-zoo model; also captions | folder of the model, or of the ranker |
| `mobilenet` | MobileNet v1, 256 | ``mobilenet_v1_025_224.safetensors`` |
| `sprites` | things, ground, layout and hue of composed images, by pixels | none: bundled |
| `sprites-mobilenet` | as `sprites`, things compared by the network | that of `mobilenet` |
| `sprites-clip` | as `sprites`, things compared by the network | that of `clip` |
| `sprites-ranker` | as `sprites`, things compared by the network | that of `ranker` |
| `pixels` | the image at 8 x 8 pixels, 192 | none |
| `image_tokenizer`, `prior` | codes, likelihoods | none: parts of the evaluated model |

A Fréchet distance in the features of the first two is called FID; the two have separate columns. All files are
local, and only tensors are unpickled.

A new extractor is one file with ``@EXTRACTORS.register(...)`` above a function that opens it, and one import line
here. The fields of `ExtractorSpec` state its file, its origin and the accepted weights, which determine messages,
``--help`` and default locations. Other distributions use the entry-point group ``dalle_zoo.extractors``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dalle_zoo_eval.extractors import (  # noqa: F401 (they register themselves)
    clip,
    dinov2,
    inception,
    mobilenet,
    model_parts,
    pixels,
    sprites,
)
from dalle_zoo_eval.extractors.base import (
    EXTRACTORS,
    Extractor,
    ExtractorFileError,
    ExtractorSpec,
    PairExtractor,
    TextExtractor,
)

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "ExtractorFileError",
    "ExtractorSpec",
    "PairExtractor",
    "TextExtractor",
    "load_extractor",
]


def load_extractor(
    name: str, location: str | Path, device: torch.device | str = "cpu", *, expected_sha256: str | None = None
) -> Extractor:
    """Opens an extractor by name.

    Args:
        name: One of `EXTRACTORS`.
        location: Its file or folder, as in the table above; for a single file also the folder that holds it.
        device: Device of the network.
        expected_sha256: sha256 that the weights must have. Defaults to the published files of its `ExtractorSpec`, if
            there are any, or else to any weights.

    Raises:
        ExtractorFileError: The file is missing or is the wrong one; the message states which file to download, and
            where to.
        UnknownNameError: There is no such extractor.
        ImportError: A package of the ``eval`` extra is missing.

    Example:
        >>> pixels = load_extractor("pixels", "")  # needs no file
        >>> pixels(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))["features"].shape
        torch.Size([2, 192])
    """
    if EXTRACTORS.spec(name).model_part:
        raise ExtractorFileError(f"{name} is a part of the evaluated model, which --model gives: it has no file")
    return EXTRACTORS[name](Path(location), torch.device(device), expected_sha256)
