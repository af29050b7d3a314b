"""VQGANs of taming-transformers and of the code that is derived from it: minDALL-E, ruDALL-E, min-dalle.

Native and external tensor names are mostly the same, so conversion mainly selects and checks tensors:

| layout | recognized by | differences |
|---|---|---|
| taming-transformers, minDALL-E, ruDALL-E | ``quantize.embedding``, or ``quantize.embed`` if Gumbel | none |
| ruDALL-E of twice the size | ``decoder.decoder.*`` | its own ``post_quant_conv``; the filters of a Haar wavelet |
| min-dalle's detokenizer | ``embedding`` | no encoder; pixels in [0, 1], as in dalle-mini's VQGAN |

The tensors determine the architecture except the size of the training images. That is stated in the configuration,
which must otherwise agree with the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dalle_zoo.convert.family import FAMILIES, Architecture, Found, ImageTokenizerFamily, Source
from dalle_zoo.convert.lazy import in_float32
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.weights import Lazy

ROOTS = (
    "state_dict.", "state_dict.model.", "state_dict.stage1.", "", "model.", "stage1.",
    "weights.vae.model.", "vae.model.",
)  # fmt: skip
"""Prefixes of the tensors in a file: a Lightning checkpoint, one with ruDALL-E's wrapper or with both stages of
minDALL-E, and bare state dicts of these; a prior of DALLE-pytorch, and its bare state dict."""
TRAINING: tuple[str, ...] = ("loss.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Tensors that only training needs: discriminator and perceptual network, running means of a codebook."""
REPLACED = ("post_quant_conv.", "decoder.idwt.")
"""Tensors that ruDALL-E's network of twice the size does not use, and the filters of its wavelet, which are fixed."""
ASSUMED_SIZE = 256
"""Side of the training images if no configuration states it; that of all published models."""

_BLOCK = re.compile(r"decoder\.up\.(?P<level>\d{1,3})\.block\.\d{1,3}\.conv1\.weight")


@FAMILIES.register("vqgan")
class VQGANFamily(ImageTokenizerFamily):
    """Checkpoints of VQGANs whose code is derived from taming-transformers.

    Example:
        >>> from dalle_zoo.models.external.vqgan import VQGANConfig
        >>> VQGANFamily("vqgan").describe(VQGANConfig())
        'VQGAN of 16384 codes and factor 16'
    """

    title = "VQGAN"
    expects = (
        "a checkpoint of taming-transformers, minDALL-E's first stage, ruDALL-E's VAE or min-dalle's detokenizer; "
        "recognized by tensors post_quant_conv, decoder.mid and quantize.embedding, quantize.embed or embedding"
    )
    network = VQGAN

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields the VQGAN with everything that belongs to its training."""
        for root in ROOTS:
            tensors = checkpoint.state_dict(root)
            decoder = "decoder.decoder" if _is_wavelet(tensors) else "decoder"
            needed = {f"{decoder}.conv_in.weight", f"{decoder}.mid.block_1.norm1.weight", "post_quant_conv.weight"}
            codebooks = {"quantize.embedding.weight", "quantize.embed.weight", "embedding.weight"}
            if needed <= tensors.keys() and codebooks & tensors.keys():
                yield "dvae", tensors
                return

    def infer(self, found: Found) -> Architecture:
        """Infers the architecture from shapes, and the image size from a configuration if there is one."""
        stored = found.parts["dvae"]
        config = _infer(_sort(stored)[0], wavelet=_is_wavelet(stored), detokenizer="embedding.weight" in stored)
        described = _described(config, found.location.configs)
        note, size = described or ("assumed, as no configuration was found", ASSUMED_SIZE)
        config["attention_sizes"] = tuple(size >> level for level in config.pop("attention"))
        config["image_size"] = 2 * size if config["wavelet"] else size
        return Architecture(config, {"image_size": note})

    def translate(self, source: Source, config: VQGANConfig) -> Mapping[str, Lazy]:
        """Selects the tensors of the network, in float32."""
        return {name: in_float32(tensor) for name, tensor in _sort(source.parts["dvae"])[0].items()}

    def unused(self, source: Source) -> dict[str, int]:
        """Counts the tensors of discriminators, perceptual losses and replaced modules."""
        names = _sort(source.parts["dvae"])[1]
        counts = {what.rstrip("."): sum(name.startswith(what) for name in names) for what in (*TRAINING, *REPLACED)}
        return {what: count for what, count in counts.items() if count}

    def describe(self, config: VQGANConfig) -> str:
        """Returns the size of the codebook, the downsampling factor, and whether the encoder is missing."""
        return super().describe(config) + (" (decoder only: it cannot encode)" if config.decoder_only else "")


def _is_wavelet(tensors: Tensors) -> bool:
    """Returns whether it is ruDALL-E's network of twice the size, which wraps the decoder and adds a wavelet."""
    return "decoder.decoder.conv_in.weight" in tensors


def _sort(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Returns the tensors of the network under native names, and the names of tensors that it does not need.

    Raises:
        WeightFileError: The wavelet is not a Haar wavelet.
    """
    unused, renamed = TRAINING, {"embedding.": "quantize.embedding."}
    if _is_wavelet(tensors):
        filters = [t for name, t in tensors.items() if name.startswith("decoder.idwt.")]
        if len(filters) != 4 or any(t.num_elements != 2 for t in filters):  # only Haar's have two taps
            raise WeightFileError("its decoder must end in a Haar wavelet, four filters of two numbers each")
        unused = (*TRAINING, *REPLACED)
        renamed |= {"decoder.post_quant_conv.": "post_quant_conv.", "decoder.decoder.": "decoder."}
    native: dict[str, StoredTensor] = {}
    left: list[str] = []
    for name, tensor in tensors.items():
        if name.startswith(unused):
            left.append(name)
            continue
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        native[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return native, left


def _infer(tensors: Tensors, *, wavelet: bool, detokenizer: bool) -> dict[str, Any]:
    """Returns the fields of `VQGANConfig` that follow from shapes, with levels instead of ``attention_sizes``."""
    blocks: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match["level"]), []).append(_axis(tensor, name, 0))
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise WeightFileError("its decoder must have the levels decoder.up.0, decoder.up.1, ...")
    widths = [blocks[level][0] for level in range(len(blocks))]
    encoder = "encoder.conv_in.weight" in tensors
    gumbel = "quantize.embed.weight" in tensors

    def axis(name: str, number: int) -> int:
        if name not in tensors:
            raise WeightFileError(f"it has no {name}")
        return _axis(tensors[name], name, number)

    width = axis("encoder.conv_in.weight", 0) if encoder else math.gcd(*widths)
    if width < 1 or any(w % width for w in widths):
        raise WeightFileError(f"its levels have {widths} channels, which must be multiples of the first {width}")
    codebook = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    return {
        "channels": axis("decoder.conv_out.weight", 0) // (4 if wavelet else 1),
        "width": width,
        "multipliers": tuple(w // width for w in widths),
        "blocks_per_level": len(blocks[0]) - 1,
        "attention": [level for level in range(len(widths)) if f"decoder.up.{level}.attn.0.q.weight" in tensors],
        "latent_channels": axis("post_quant_conv.weight", 0),
        "code_channels": axis("post_quant_conv.weight", 1),
        "codebook_size": axis(codebook, 0),
        "quantizer": "gumbel" if gumbel else "nearest",
        "signed_pixels": not detokenizer,
        "wavelet": wavelet,
        "decoder_only": not encoder,
    }


def _axis(tensor: StoredTensor, name: str, number: int) -> int:
    if len(tensor.shape) <= number:
        raise WeightFileError(f"{name} has shape {tensor.shape}, expected more dimensions")
    return tensor.shape[number]


def _described(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> tuple[str, int] | None:
    """Returns the name of the configuration and the size of the training images; None without a configuration.

    Raises:
        WeightFileError: The configurations describe other networks, or disagree.
    """
    stated = [(name, found) for name, values in files.items() for found in _networks(values)]
    fitting = {found["resolution"]: name for name, found in stated if not _differences(config, found)}
    if len(fitting) > 1:
        raise WeightFileError(f"configurations disagree on the resolution ({fitting}): keep only the right one")
    if stated and not fitting:
        name, found = stated[0]
        raise WeightFileError(
            f"{name} does not describe this network: {'; '.join(_differences(config, found))}; give the configuration "
            f"that belongs to the weights, or none"
        )
    return next(((name, size) for size, name in fitting.items()), None)


def _networks(values: Any, depth: int = 8) -> Iterator[Mapping[str, Any]]:
    """Yields descriptions of networks anywhere in a configuration: mappings with ``ch_mult`` and ``resolution``."""
    if not isinstance(values, Mapping) or not depth:
        return
    if "ch_mult" in values and type(values.get("resolution")) is int and values["resolution"] > 0:
        yield values
    for value in values.values():
        yield from _networks(value, depth - 1)


def _differences(config: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    """Returns the contradictions between a description and the tensors."""
    levels = range(len(config["multipliers"]))
    attention = [described["resolution"] >> level for level in levels if level in config["attention"]]
    sizes = {described["resolution"] >> level for level in levels}
    stated = described.get("attn_resolutions", attention)
    tensors = {
        "ch": config["width"],
        "ch_mult": list(config["multipliers"]),
        "num_res_blocks": config["blocks_per_level"],
        "z_channels": config["latent_channels"],
        "in_channels": config["channels"],
        "double_z": False,
    }
    found = [
        f"{name} is {shown(described[name])}, the tensors have {value!r}"
        for name, value in tensors.items()
        if described.get(name, value) != value
    ]
    if not isinstance(stated, list) or sizes.intersection(stated) != set(attention):
        found.append(f"attn_resolutions is {shown(stated)}, the tensors have {attention!r}")
    return found
