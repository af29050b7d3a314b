"""OpenAI's discrete VAE: the pickled modules of its release, and the encoder as transformers stores it for FLAVA.

The released ``encoder.pkl`` and ``decoder.pkl`` hold complete modules of the package ``dall_e``; state dicts of them
are read as well. The network is that of `dalle_zoo.models.dvae`; only names differ:

| native | release | transformers |
|---|---|---|
| input.weight | blocks.input.w | blocks.input.weight |
| groups.G.B.conv_2.bias | blocks.G.B.res_path.conv_2.b | blocks.G.group.B.res_path.path.conv_2.bias |
| groups.G.B.skip.weight | blocks.G.B.id_path.w | blocks.G.group.B.id_path.weight |
| output.weight | blocks.output.conv.w | blocks.output.conv.weight |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_zoo.convert.family import FAMILIES, Architecture, Found, ImageTokenizerFamily, Source
from dalle_zoo.convert.lazy import in_float32
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import Checkpoint, Tensors
from dalle_zoo.models.dvae import DVAE, DVAEEncoder
from dalle_zoo.weights import Lazy

_NAME = re.compile(
    r"blocks\.(?:(?P<end>input|output\.conv)|(?P<group>group_\d+)\.(?:group\.)?(?P<block>block_\d+)\."
    r"(?:(?P<skip>id_path)|res_path\.(?:path\.)?(?P<conv>conv_\d)))\.(?P<kind>w|b|weight|bias)"
)
_PREFIXES = (
    "", "image_codebook.", "weights.vae.enc.", "weights.vae.dec.", "vae.enc.", "vae.dec.",
)  # fmt: skip
"""Prefixes in a file of this network, of FLAVA's complete model, and of DALLE-pytorch's prior with both parts."""


@FAMILIES.register("openai_dvae")
class OpenAIDVAEFamily(ImageTokenizerFamily):
    """OpenAI's discrete VAE, or only its encoder.

    Example:
        >>> from dalle_zoo.models.dvae_networks import DVAEConfig, DVAEEncoderConfig
        >>> [OpenAIDVAEFamily("openai_dvae").describe(config()) for config in (DVAEConfig, DVAEEncoderConfig)]
        ["OpenAI's discrete VAE", "OpenAI's discrete VAE (encoder only: it cannot decode)"]
    """

    title = "OpenAI's discrete VAE"
    expects = (
        "encoder.pkl and decoder.pkl of OpenAI's release in one folder, or the encoder in the layout of transformers' "
        "FlavaImageCodebook; recognized by tensors blocks.input.w or blocks.input.weight"
    )
    network = DVAE
    required = ("encoder",)
    license = "other"
    license_name = "modified-mit"
    license_note = "OpenAI's modified MIT license"
    license_text = Path(__file__).with_name("openai_dvae_license.txt").read_text(encoding="utf-8")
    data = "not published in full; see the paper, section 2.3"

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields encoder and decoder under native names; unknown names are left as they are."""
        for prefix in _PREFIXES:
            tensors = {_native_name(name): tensor for name, tensor in checkpoint.state_dict(prefix).items()}
            stems = [tensors[name] for name in ("input.weight", "output.weight") if name in tensors]
            if (
                len(stems) == 2
                and all(len(stem.shape) == 4 for stem in stems)
                and "groups.group_1.block_1.conv_1.weight" in tensors
            ):
                # The encoder applies 7 x 7 kernels to pixels, the decoder 1 x 1 kernels to codes.
                yield "encoder" if tensors["input.weight"].shape[2:] == (7, 7) else "decoder", tensors

    def infer(self, found: Found) -> Architecture:
        """Infers sizes from names and shapes."""
        return Architecture(_sizes(found.parts), {"image_size": "the paper's: it does not follow from the weights"})

    def network_class(self, source: Source) -> type[Any]:
        """Returns the class of the complete network, or of the encoder."""
        return DVAE if "decoder" in source.parts else DVAEEncoder

    def translate(self, source: Source, config: Any) -> Mapping[str, Lazy]:
        """Joins encoder and decoder, in float32."""
        return {f"{part}.{n}": in_float32(t) for part, tensors in source.parts.items() for n, t in tensors.items()}

    def describe(self, config: Any) -> str:
        """Returns the title without sizes, because all published weights have the same."""
        return (
            self.title if isinstance(config, DVAE.config_class) else f"{self.title} (encoder only: it cannot decode)"
        )


def _native_name(external: str) -> str:
    match = _NAME.fullmatch(external)
    if match is None:
        return external
    kind = {"w": "weight", "b": "bias"}.get(match["kind"], match["kind"])
    if match["end"]:
        return f"{match['end'].removesuffix('.conv')}.{kind}"
    return f"groups.{match['group']}.{match['block']}.{'skip' if match['skip'] else match['conv']}.{kind}"


def _sizes(parts: Mapping[str, Tensors]) -> dict[str, int]:
    """Returns the fields of `DVAEConfig` that follow from names and shapes, and the paper's image size."""
    encoder, decoder = parts["encoder"], parts.get("decoder")
    config = {
        "image_size": 256,
        "channels": encoder["input.weight"].shape[1],
        "width": encoder["input.weight"].shape[0],
        "num_groups": _count(encoder, "group"),
        "blocks_per_group": _count(encoder, "block"),
        "codebook_size": encoder["output.weight"].shape[0],
    }
    for role, tensors in parts.items():
        blocks = _count(tensors, "group") * _count(tensors, "block")
        if len(tensors) < 8 * blocks:  # four convolutions each; checked before a network of any depth is built
            raise WeightFileError(f"the {role} has {len(tensors)} tensors, too few for its {blocks} blocks")
    if decoder is not None:
        config["decoder_stem"] = decoder["input.weight"].shape[0]
        external = {
            "channels": decoder["output.weight"].shape[0] // 2,
            "width": decoder["output.weight"].shape[1],
            "num_groups": _count(decoder, "group"),
            "blocks_per_group": _count(decoder, "block"),
            "codebook_size": decoder["input.weight"].shape[1],
        }
        differ = [f"{name} {config[name]} and {value}" for name, value in external.items() if config[name] != value]
        if differ:
            raise WeightFileError(f"encoder and decoder do not belong together: they have {', '.join(differ)}")
    return config


def _count(tensors: Tensors, what: str) -> int:
    """Returns how many different numbers follow "group_" or "block_" in the names."""
    return len({number for name in tensors for number in re.findall(rf"\b{what}_(\d+)\.", name)})
