"""DALLE-pytorch's own discrete VAE, from its ``vae.pt`` or from a checkpoint of the prior.

Native and external tensor names are the same. Shapes determine everything except the size of the training images,
which is one of the hyper-parameters: ``hparams`` in a file of the VAE, ``vae_params`` in a file of the prior.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_zoo.convert.family import FAMILIES, Architecture, Found, ImageTokenizerFamily
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, Tensors, check_small
from dalle_zoo.models.external.dalle_pytorch_vae import (
    COLORS,
    PIXEL_MEAN,
    PIXEL_STD,
    DallePytorchVAE,
    DallePytorchVAEConfig,
)

ROOTS = {"weights.": "hparams", "weights.vae.": "vae_params", "": "hparams", "vae.": "vae_params"}
"""Prefixes of the tensors in a file, and the name of the hyper-parameters that belong to them."""
STEM = "encoder.0.0.weight"
"""The first convolution, with 4 x 4 kernels."""

_LAST = re.compile(r"encoder\.(\d{1,3})\.weight")
_BLOCK = re.compile(r"encoder\.\d{1,3}\.net\.0\.weight")


@FAMILIES.register("dalle_pytorch_vae")
class DallePytorchVAEFamily(ImageTokenizerFamily):
    """Checkpoints of the discrete VAE that DALLE-pytorch trains itself.

    Example:
        >>> DallePytorchVAEFamily("dalle_pytorch_vae").describe(DallePytorchVAEConfig())
        "DALLE-pytorch's discrete VAE of 512 codes and factor 8"
    """

    title = "DALLE-pytorch's discrete VAE"
    expects = (
        "vae.pt of DALLE-pytorch's train_vae.py, or a prior's file that holds it; recognized by tensors "
        "codebook.weight, encoder.0.0.weight and the last one of encoder"
    )
    network = DallePytorchVAE

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields the VAE."""
        root = _root(checkpoint)
        if root is not None:
            tensors = checkpoint.state_dict(root)
            yield "dvae", {n: t for n, t in tensors.items() if n.startswith(("codebook.", "encoder.", "decoder."))}

    def infer(self, found: Found) -> Architecture:
        """Infers the architecture from shapes, and the image size from hyper-parameters if there are any."""
        checkpoint = found.checkpoints["dvae"]
        name = ROOTS[_root(checkpoint) or ""]
        stated = checkpoint.content.get(name)
        hparams: Mapping[str, Any] = stated if isinstance(stated, Mapping) else {}
        check_small(hparams, "it")
        config = _sizes(found.parts["dvae"])
        _check_hparams(hparams, config)
        size = hparams.get("image_size", DallePytorchVAEConfig.image_size)
        note = name if "image_size" in hparams else "assumed, as no hyper-parameters were found"
        return Architecture({**config, "image_size": size}, {"image_size": note})


def _root(checkpoint: Checkpoint) -> str | None:
    """Returns the prefix of the VAE's tensors in a file; None if it has no VAE."""
    if isinstance(checkpoint.content, Mapping):
        for root in ROOTS:
            tensors = checkpoint.state_dict(root)
            if {"codebook.weight", STEM} <= tensors.keys() and tensors[STEM].shape[2:] == (4, 4):
                return root
    return None


def _sizes(tensors: Tensors) -> dict[str, Any]:
    """Returns the fields of `DallePytorchVAEConfig` that follow from names and shapes."""
    stem, codebook = tensors[STEM].shape, tensors["codebook.weight"].shape
    last = [int(match[1]) for name in tensors if (match := _LAST.fullmatch(name))]
    if len(last) != 1 or len(codebook) != 2:
        raise WeightFileError("its encoder must end in one convolution, and its codebook must be a matrix")
    if stem[1] != COLORS:
        raise WeightFileError(
            f"its images have {stem[1]} channels: only color images without transparency are supported"
        )
    num_blocks = sum(_BLOCK.fullmatch(name) is not None for name in tensors)
    return {
        "num_layers": last[0] - num_blocks,
        "num_blocks": num_blocks,
        "width": stem[0],
        "codebook_size": codebook[0],
        "code_channels": codebook[1],
    }


def _check_hparams(hparams: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `WeightFileError` if hyper-parameters contradict the tensors."""
    names = {
        "num_tokens": "codebook_size", "codebook_dim": "code_channels", "num_layers": "num_layers",
        "num_resnet_blocks": "num_blocks", "hidden_dim": "width",
    }  # fmt: skip
    wrong = [
        f"{external} is {shown(hparams[external])}, the tensors have {config[native]!r}"
        for external, native in names.items()
        if hparams.get(external, config[native]) != config[native]
    ]
    usual = ((PIXEL_MEAN,) * COLORS, (PIXEL_STD,) * COLORS)
    pixels = hparams.get("normalization", usual)
    if pixels is None or tuple(tuple(part)[:COLORS] for part in pixels) != usual:
        wrong.append(f"normalization is {shown(pixels)}, only {usual} is supported")
    if wrong:
        raise WeightFileError(f"its hyper-parameters do not fit the weights: {'; '.join(wrong)}")
