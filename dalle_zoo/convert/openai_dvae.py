"""OpenAI's discrete VAE: the pickled modules of its release, and the encoder as transformers stores it for FLAVA.

The released ``encoder.pkl`` and ``decoder.pkl`` hold complete modules of the package ``dall_e``; state dicts of them
are read as well. The network is that of `dalle_zoo.models.dvae`; only names differ:

| ours | release | transformers |
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

import torch

from dalle_zoo.convert.base import FAMILIES, Conversion, Location, Source, read_tensors
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.model_folder import config_from_dict
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS
from dalle_zoo.networks import save_network

_NAME = re.compile(
    r"blocks\.(?:(?P<end>input|output\.conv)|(?P<group>group_\d+)\.(?:group\.)?(?P<block>block_\d+)\."
    r"(?:(?P<skip>id_path)|res_path\.(?:path\.)?(?P<conv>conv_\d)))\.(?P<kind>w|b|weight|bias)"
)
_PREFIXES = (
    "", "image_codebook.", "weights.vae.enc.", "weights.vae.dec.", "vae.enc.", "vae.dec.",
)  # fmt: skip
"""Of a file of this network, of FLAVA's complete model, and of DALLE-pytorch's prior, which holds both parts."""
_LICENSE = Path(__file__).with_name("openai_dvae_license.txt")


@FAMILIES.register("openai_dvae")
class OpenAIDVAE:
    """OpenAI's discrete VAE, or its encoder alone."""

    title = "OpenAI's discrete VAE"
    expects = (
        "encoder.pkl and decoder.pkl of OpenAI's release in one folder, or the encoder in the layout of transformers' "
        "FlavaImageCodebook; known by tensors blocks.input.w or blocks.input.weight"
    )
    complete = False

    def recognize(self, location: Location) -> Source | None:
        """The encoder and, if it is there, the decoder."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for tensors in (part for checkpoint in location.checkpoints for part in _parts(checkpoint)):
            # The encoder reads pixels through 7 x 7 kernels, the decoder codes through 1 x 1.
            role = "encoder" if tensors["input.weight"].shape[2:] == (7, 7) else "decoder"
            if role in parts:
                raise WeightFileError(
                    f"{location.path} has two files of the {role}: name the right one with --files or files="
                )
            parts[role] = tensors
        if not parts:
            return None
        if "encoder" not in parts:
            raise WeightFileError(
                f"{location.path} has the decoder of {self.title} without its encoder: give the folder that holds "
                f"encoder.pkl as well"
            )
        notes = {"image_size": "the paper's: the weights do not tell it"}
        return Source("openai_dvae", location.path, parts, _config(parts), notes)

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``dvae/``."""
        kind = "dvae" if "decoder" in source.parts else "dvae_encoder"
        cls = IMAGE_TOKENIZERS[kind]
        with torch.device("meta"):
            net = cls(config_from_dict(cls.config_class, dict(source.config), str(source.location)))
        tensors = {f"{role}.{name}": t for role, part in source.parts.items() for name, t in part.items()}
        net.load_state_dict(read_tensors(tensors, net.state_dict()), assign=True)
        (out / "dvae").mkdir()
        save_network(net, kind, out / "dvae")
        return Conversion(
            description=self.title + (" (encoder alone: it cannot decode)" if kind == "dvae_encoder" else ""),
            license="other",
            license_name="modified-mit",
            license_note="OpenAI's modified MIT license",
            license_text=_LICENSE.read_text(encoding="utf-8"),
            data="not published in full; see the paper, section 2.3",
            inferred={"type": kind, **source.config},
            notes=dict(source.notes),
            parameters={"dvae": sum(p.numel() for p in net.parameters())},
        )


def _parts(checkpoint: Checkpoint) -> Iterator[dict[str, StoredTensor]]:
    """Tensors of encoder and decoder in a file under our names; names that are not of the network stay."""
    for prefix in _PREFIXES:
        tensors = {_native_name(name): tensor for name, tensor in checkpoint.state_dict(prefix).items()}
        stems = [tensors[name] for name in ("input.weight", "output.weight") if name in tensors]
        if (
            len(stems) == 2
            and all(len(stem.shape) == 4 for stem in stems)
            and "groups.group_1.block_1.conv_1.weight" in tensors
        ):
            yield tensors


def _native_name(external: str) -> str:
    match = _NAME.fullmatch(external)
    if match is None:
        return external
    kind = {"w": "weight", "b": "bias"}.get(match["kind"], match["kind"])
    if match["end"]:
        return f"{match['end'].removesuffix('.conv')}.{kind}"
    return f"groups.{match['group']}.{match['block']}.{'skip' if match['skip'] else match['conv']}.{kind}"


def _config(parts: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, int]:
    """Sizes, from names and shapes."""
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
        if len(tensors) < 8 * blocks:  # four convolutions each; before a network of a made-up depth is built
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


def _count(tensors: Mapping[str, StoredTensor], what: str) -> int:
    """Different numbers after "group_" or "block_" in the names."""
    return len({number for name in tensors for number in re.findall(rf"\b{what}_(\d+)\.", name)})
