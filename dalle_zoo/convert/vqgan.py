"""VQGANs of taming-transformers and of what was built on it: minDALL-E, ruDALL-E, min-dalle.

The names of our tensors are those of the original, so conversion chooses, checks and counts more than it renames:

| layout | known by | what differs |
|---|---|---|
| taming-transformers, minDALL-E, ruDALL-E | ``quantize.embedding``, or ``quantize.embed`` if Gumbel | nothing |
| ruDALL-E of twice the size | ``decoder.decoder.*`` | its own ``post_quant_conv``; the filters of a Haar wavelet |
| min-dalle's detokenizer | ``embedding`` | no encoder; pixels in [0, 1], as dalle-mini's VQGAN has them |

The tensors tell the architecture, all but the size of the training images; that stands in the configuration, which
must otherwise agree with the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.convert.base import (
    FAMILIES,
    LICENSE_OF_CHECKPOINT,
    Conversion,
    Location,
    Source,
    check_single,
    read_tensors,
)
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.networks import save_network

Tensors = Mapping[str, StoredTensor]

ROOTS = (
    "state_dict.", "state_dict.model.", "state_dict.stage1.", "", "model.", "stage1.",
    "weights.vae.model.", "vae.model.",
)  # fmt: skip
"""Where the tensors lie in a file: a checkpoint of Lightning, the same with ruDALL-E's wrapper or of both stages of
minDALL-E, and bare ones; one of DALLE-pytorch's prior, and a bare one."""
TRAINING: tuple[str, ...] = ("loss.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""What only training needs: discriminator and perceptual network, running means of a codebook."""
REPLACED = ("post_quant_conv.", "decoder.idwt.")
"""What ruDALL-E's network of twice the size does not use, and the filters of its wavelet, which are fixed."""
ASSUMED_SIZE = 256
"""Side of the training images where no configuration tells it; all published models have it."""

_BLOCK = re.compile(r"decoder\.up\.(?P<level>\d{1,3})\.block\.\d{1,3}\.conv1\.weight")


@FAMILIES.register("vqgan")
class VQGANFamily:
    """Checkpoints of VQGANs whose code descends from taming-transformers."""

    title = "VQGAN"
    expects = (
        "a checkpoint of taming-transformers, minDALL-E's first stage, ruDALL-E's VAE or min-dalle's detokenizer; "
        "known by tensors post_quant_conv, decoder.mid and quantize.embedding, quantize.embed or embedding"
    )
    complete = False

    def recognize(self, location: Location) -> Source | None:
        """The one VQGAN at a location."""
        found = [(c, tensors) for c in location.checkpoints if (tensors := _autoencoder(c)) is not None]
        check_single(location, [c.path for c, _ in found], "VQGANs")
        if not found:
            return None
        checkpoint, stored = found[0]
        try:
            tensors, unused = _sort(stored)
            config = _infer(tensors, wavelet=_is_wavelet(stored), detokenizer="embedding.weight" in stored)
            described = _described(config, location.configs)
            note, size = described or ("assumed, as no configuration lies there", ASSUMED_SIZE)
            config["attention_sizes"] = tuple(size >> level for level in config.pop("attention"))
            config["image_size"] = 2 * size if config["wavelet"] else size
            VQGANConfig(**config)
        except ValueError as error:
            raise WeightFileError(f"{checkpoint.path} cannot be converted: {error}") from None
        parts = {"vqgan": tensors, "unused": unused}
        return Source("vqgan", location.path, parts, config, notes={"image_size": note})

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``dvae/``."""
        config = VQGANConfig(**source.config)
        with torch.device("meta"):
            net = VQGAN(config)
        net.load_state_dict(read_tensors(source.parts["vqgan"], net.state_dict()), assign=True)
        (out / "dvae").mkdir()
        save_network(net, "vqgan", out / "dvae")
        alone = " (decoder alone: it cannot encode)" if config.decoder_only else ""
        return Conversion(
            description=f"{self.title} of {config.codebook_size} codes and factor {config.factor}{alone}",
            license_note=LICENSE_OF_CHECKPOINT,
            inferred={"type": "vqgan", **asdict(config)},
            notes=dict(source.notes),
            unused=_counts(source.parts["unused"]),
            parameters={"dvae": sum(p.numel() for p in net.parameters())},
        )


def _autoencoder(checkpoint: Checkpoint) -> Tensors | None:
    """Tensors of the VQGAN in a file, prefix taken off; None if there is none."""
    for root in ROOTS:
        tensors = checkpoint.state_dict(root)
        decoder = "decoder.decoder" if _is_wavelet(tensors) else "decoder"
        needed = {f"{decoder}.conv_in.weight", f"{decoder}.mid.block_1.norm1.weight", "post_quant_conv.weight"}
        codebooks = {"quantize.embedding.weight", "quantize.embed.weight", "embedding.weight"}
        if needed <= tensors.keys() and codebooks & tensors.keys():
            return tensors
    return None


def _is_wavelet(tensors: Tensors) -> bool:
    """Whether it is ruDALL-E's network of twice the size, whose decoder lies in another one with the wavelet."""
    return "decoder.decoder.conv_in.weight" in tensors


def _sort(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Tensors of the network under our names, and those that only training or the original's code needs."""
    unused, renamed = TRAINING, {"embedding.": "quantize.embedding."}
    if _is_wavelet(tensors):
        filters = [t for name, t in tensors.items() if name.startswith("decoder.idwt.")]
        if len(filters) != 4 or any(t.num_elements != 2 for t in filters):  # only Haar's have two taps
            raise WeightFileError("its decoder must end in a Haar wavelet, four filters of two numbers each")
        unused = (*TRAINING, *REPLACED)
        renamed |= {"decoder.post_quant_conv.": "post_quant_conv.", "decoder.decoder.": "decoder."}
    native: dict[str, StoredTensor] = {}
    left: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(unused):
            left[name] = tensor
            continue
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        native[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return native, left


def _counts(unused: Tensors) -> dict[str, int]:
    """How many tensors were left out of what."""
    counts = {what.rstrip("."): sum(name.startswith(what) for name in unused) for what in (*TRAINING, *REPLACED)}
    return {what: count for what, count in counts.items() if count}


def _infer(tensors: Tensors, *, wavelet: bool, detokenizer: bool) -> dict[str, Any]:
    """Fields of `VQGANConfig` that shapes tell, and in place of ``attention_sizes`` the numbers of these levels."""
    blocks: dict[int, list[int]] = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match["level"]), []).append(_axis(tensor, name, 0))
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise WeightFileError("its decoder must have levels decoder.up.0, decoder.up.1 and so on")
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
    """Name of the configuration of the network, and the size of its training images; None if there is none.

    Raises:
        WeightFileError: Those that lie there describe other networks, or disagree.
    """
    there = [(name, found) for name, values in files.items() for found in _networks(values)]
    fitting = {found["resolution"]: name for name, found in there if not _differences(config, found)}
    if len(fitting) > 1:
        raise WeightFileError(f"configurations disagree on the resolution ({fitting}): leave the right one there")
    if there and not fitting:
        name, found = there[0]
        raise WeightFileError(
            f"{name} does not describe this network: {'; '.join(_differences(config, found))}; give the configuration "
            f"that belongs to the weights, or none"
        )
    return next(((name, size) for size, name in fitting.items()), None)


def _networks(values: Any, depth: int = 8) -> Iterator[Mapping[str, Any]]:
    """Descriptions of networks anywhere in a configuration: mappings with ``ch_mult`` and ``resolution``."""
    if not isinstance(values, Mapping) or not depth:
        return
    if "ch_mult" in values and type(values.get("resolution")) is int and values["resolution"] > 0:
        yield values
    for value in values.values():
        yield from _networks(value, depth - 1)


def _differences(config: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    """Where a description says something else than the tensors."""
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
        f"{name} is {described[name]!r}, the tensors have {value!r}"
        for name, value in tensors.items()
        if described.get(name, value) != value
    ]
    if not isinstance(stated, list) or sizes.intersection(stated) != set(attention):
        found.append(f"attn_resolutions is {stated!r}, the tensors have {attention!r}")
    return found
