"""DALLE-pytorch's own discrete VAE, from its ``vae.pt`` or from within a checkpoint of the prior.

The names of our tensors are those of the original. Shapes tell everything but the size of the training images, which
stands among the hyper-parameters: ``hparams`` of a file of its own, ``vae_params`` of one of the prior.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.convert.base import FAMILIES, LICENSE_OF_CHECKPOINT, Conversion, Location, Source
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.lazy import write_network
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import check_small
from dalle_zoo.models.external.dalle_pytorch_vae import (
    COLORS,
    PIXEL_MEAN,
    PIXEL_STD,
    DallePytorchVAE,
    DallePytorchVAEConfig,
)

Tensors = Mapping[str, StoredTensor]

ROOTS = {"weights.": "hparams", "weights.vae.": "vae_params", "": "hparams", "vae.": "vae_params"}
"""Where the tensors lie in a file, and the name of the hyper-parameters that belong to them."""
STEM = "encoder.0.0.weight"
"""The first convolution, of 4 x 4 kernels."""

_LAST = re.compile(r"encoder\.(\d{1,3})\.weight")
_BLOCK = re.compile(r"encoder\.\d{1,3}\.net\.0\.weight")


@FAMILIES.register("dalle_pytorch_vae")
class DallePytorchVAEFamily:
    """Checkpoints of the discrete VAE that DALLE-pytorch trains itself."""

    title = "DALLE-pytorch's discrete VAE"
    expects = (
        "vae.pt of DALLE-pytorch's train_vae.py, or a prior's file that holds it; known by tensors codebook.weight, "
        "encoder.0.0.weight and the last one of encoder"
    )
    complete = False

    def recognize(self, location: Location) -> Source | None:
        """The one image tokenizer at a location."""
        found = [(c, network) for c in location.checkpoints if (network := _network(c)) is not None]
        if len(found) > 1:
            names = ", ".join(checkpoint.path.name for checkpoint, _ in found)
            raise WeightFileError(
                f"{location.path} holds several of {self.title} ({names}): name one with --files or files="
            )
        if not found:
            return None
        checkpoint, (root, tensors) = found[0]
        stated = checkpoint.content.get(ROOTS[root])
        hparams: Mapping[str, Any] = stated if isinstance(stated, Mapping) else {}
        try:
            check_small(hparams, "it")
            config = _infer(tensors)
            _check_hparams(hparams, config)
            size = hparams.get("image_size", DallePytorchVAEConfig.image_size)
            config["image_size"] = size
            DallePytorchVAEConfig(**config)
        except (ValueError, TypeError) as error:
            raise WeightFileError(f"{checkpoint.path} cannot be converted: {error}") from None
        notes = {"image_size": ROOTS[root] if "image_size" in hparams else "assumed, as no hyper-parameters lie there"}
        return Source("dalle_pytorch_vae", location.path, {"vae": tensors}, config, notes)

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``dvae/``."""
        config = DallePytorchVAEConfig(**source.config)
        with torch.device("meta"):
            net = DallePytorchVAE(config)
        write_network(out / "dvae", "dalle_pytorch_vae", net, source.parts["vae"])
        return Conversion(
            description=f"{self.title} of {config.codebook_size} codes and factor {config.factor}",
            license_note=LICENSE_OF_CHECKPOINT,
            inferred={"type": "dalle_pytorch_vae", **asdict(config)},
            notes=dict(source.notes),
            parameters={"dvae": sum(p.numel() for p in net.parameters())},
        )


def _network(checkpoint: Checkpoint) -> tuple[str, Tensors] | None:
    """Where the tensors lie in a file, and they, prefix taken off; None if it has no such network."""
    if isinstance(checkpoint.content, Mapping):
        for root in ROOTS:
            tensors = checkpoint.state_dict(root)
            if {"codebook.weight", STEM} <= tensors.keys() and tensors[STEM].shape[2:] == (4, 4):
                return root, {n: t for n, t in tensors.items() if n.startswith(("codebook.", "encoder.", "decoder."))}
    return None


def _infer(tensors: Tensors) -> dict[str, Any]:
    """Fields of `DallePytorchVAEConfig` that names and shapes tell."""
    stem, codebook = tensors[STEM].shape, tensors["codebook.weight"].shape
    last = [int(match[1]) for name in tensors if (match := _LAST.fullmatch(name))]
    if len(last) != 1 or len(codebook) != 2:
        raise WeightFileError("its encoder must end in one convolution, and its codebook be a matrix")
    if stem[1] != COLORS:
        raise WeightFileError(f"its images have {stem[1]} channels: only color without transparency is converted")
    num_blocks = sum(_BLOCK.fullmatch(name) is not None for name in tensors)
    return {
        "num_layers": last[0] - num_blocks,
        "num_blocks": num_blocks,
        "width": stem[0],
        "codebook_size": codebook[0],
        "code_channels": codebook[1],
    }


def _check_hparams(hparams: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises `WeightFileError` where hyper-parameters say something else than the tensors."""
    names = {
        "num_tokens": "codebook_size", "codebook_dim": "code_channels", "num_layers": "num_layers",
        "num_resnet_blocks": "num_blocks", "hidden_dim": "width",
    }  # fmt: skip
    wrong = [
        f"{external} is {hparams[external]!r}, the tensors have {config[native]!r}"
        for external, native in names.items()
        if hparams.get(external, config[native]) != config[native]
    ]
    usual = ((PIXEL_MEAN,) * COLORS, (PIXEL_STD,) * COLORS)
    pixels = hparams.get("normalization", usual)
    if pixels is None or tuple(tuple(part)[:COLORS] for part in pixels) != usual:
        wrong.append(f"normalization is {pixels!r}, only {usual} is converted")
    if wrong:
        raise WeightFileError(f"its hyper-parameters do not fit: {'; '.join(wrong)}")
