"""ruDALL-E's priors: Malevich, Emojich, Surrealist, Kandinsky.

A published file is a state dict whose buffers hold the masks of attention. They are rebuilt here and compared with
those of the file, which also tells the version: v3's convolutional mask ends at the borders, v2's wraps round.
Shapes tell everything else but the number of heads. The vocabulary is a text file of YouTokenToMe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
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
    image_tokenizer_in,
)
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.lazy import write_network
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.youtokentome import is_vocabulary, read_vocabulary
from dalle_zoo.masks import Mask, TextImageLayout
from dalle_zoo.models.external.rudalle import LAST_MASKS, RuDALLE, RuDALLEConfig, Version

Tensors = Mapping[str, StoredTensor]
Configs = Mapping[str, Mapping[str, Any]]

KNOWN_BY = (
    "image_row_embeddings.weight",
    "image_col_embeddings.weight",
    "text_pos_embeddings.weight",
    "to_logits.1.weight",
    "transformer.layers.0.before_first_addition_layernorm.weight",
)
NAMES = {
    "text_embeddings": "text_embedding",
    "text_pos_embeddings": "text_position",
    "image_embeddings": "image_embedding",
    "image_row_embeddings": "row_position",
    "image_col_embeddings": "column_position",
    "transformer.final_layernorm": "final_norm",
    "to_logits.0": "head_norm",
    "to_logits.1": "head",
}
"""Their modules and ours."""
LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.output",
    "before_first_addition_layernorm": "attention.output_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.hidden",
    "mlp.dense_4h_to_h": "mlp.output",
    "before_second_addition_layernorm": "mlp.output_norm",
}
"""The same within a layer."""
HEADS = {768: 12, 2048: 16, 3840: 60}
"""Attention heads of the published models, by their width."""

_LAYER = re.compile(r"transformer\.layers\.(\d{1,3})\.(.+)")
_MASK = re.compile(r"(?:transformer\.)?(row|col|conv)_mask")


@FAMILIES.register("rudalle")
class RuDALLEFamily:
    """Checkpoints of ruDALL-E's priors, of versions v2 and v3."""

    title = "ruDALL-E"
    expects = (
        "a prior of ruDALL-E (Malevich, Emojich, Surrealist, Kandinsky); known by tensors image_row_embeddings, "
        "to_logits.1 and transformer.layers.0.before_first_addition_layernorm"
    )
    complete = True

    def recognize(self, location: Location) -> Source | None:
        """The one prior at a location, with its vocabulary and its image tokenizer."""
        found = [(c, tensors) for c in location.checkpoints if (tensors := _prior(c)) is not None]
        if not found:
            return None
        vocabularies = [file for file in location.files.values() if is_vocabulary(file)]
        check_single(location, [c.path for c, _ in found], "priors of ruDALL-E")
        check_single(location, vocabularies, "vocabularies")
        checkpoint, stored = found[0]
        masks = {match[1]: tensor for name, tensor in stored.items() if (match := _MASK.fullmatch(name))}
        try:
            config, notes = _infer(stored, location.configs)
            if masks and len(masks) < 3:
                raise WeightFileError(
                    f"it has the masks {', '.join(masks)} alone, expected row, col and conv, or none"
                )
            if not masks and "version" not in config:
                raise WeightFileError(
                    "it lacks the masks (transformer.conv_mask ...) by which its versions are told apart: state the "
                    'version in a file beside it, such as config.json with {"hf_version": "v3"}'
                )
            RuDALLEConfig(**config)
        except ValueError as error:
            raise WeightFileError(f"{checkpoint.path} cannot be converted: {error}") from None
        tensors = {_native_name(name): tensor for name, tensor in stored.items() if not _MASK.fullmatch(name)}
        return Source(
            "rudalle",
            location.path,
            {"prior": tensors, "masks": masks},
            config,
            notes,
            files={"vocabulary": vocabularies[0]} if vocabularies else {},
            image_tokenizer=image_tokenizer_in(location, without=[checkpoint]),
        )

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``prior/``, and ``tokenizer/`` where the vocabulary is there."""
        config, notes = RuDALLEConfig(**source.config), dict(source.notes)
        if masks := source.parts["masks"]:
            version, notes["version"] = _version(masks, config.layout, source.config.get("version"))
            config = replace(config, version=version)
        with torch.device("meta"):
            net = RuDALLE(config)
        if "vocabulary" in source.files:
            tokenizer = read_vocabulary(source.files["vocabulary"])
            try:
                net.check_tokenizer(tokenizer)
            except ValueError as error:
                raise WeightFileError(f"{source.files['vocabulary']} is not that of the prior: {error}") from None
            tokenizer.save(out / "tokenizer")
        write_network(out / "prior", "rudalle", net, source.parts["prior"])
        return Conversion(
            description=f"ruDALL-E {config.version}: {config.num_layers} layers of width {config.width}, "
            f"{config.text_length} text tokens, {config.image_height} x {config.image_width} codes",
            license_note=LICENSE_OF_CHECKPOINT,
            inferred={"type": "rudalle", **asdict(config)},
            notes=notes,
            unused={"masks": len(masks)} if masks else {},
            parameters={"prior": sum(p.numel() for p in net.parameters())},
        )


def _prior(checkpoint: Checkpoint) -> Tensors | None:
    """Tensors of the prior in a file, prefix taken off; None if there is none."""
    for name in checkpoint.tensors:
        if name.endswith(KNOWN_BY[0]):
            tensors = checkpoint.state_dict(name.removesuffix(KNOWN_BY[0]))
            if tensors.keys() >= set(KNOWN_BY):
                return tensors
    return None


def _native_name(name: str) -> str:
    """Our name of a tensor of the original; one that is not known keeps its own, and is named as unexpected later."""
    module, _, kind = name.rpartition(".")
    if match := _LAYER.fullmatch(module):
        return f"layers.{match[1]}.{LAYER_NAMES.get(match[2], match[2])}.{kind}"
    return f"{NAMES.get(module, module)}.{kind}"


def _infer(tensors: Tensors, configs: Configs) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of `RuDALLEConfig`, without the version unless a configuration states it, and where they come from."""

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise WeightFileError(f"it has no matrix {name}")
        return tensors[name].shape[0]

    text_length = rows("text_pos_embeddings.weight") - 1  # v2 puts another token in front
    config: dict[str, Any] = {
        "text_length": text_length,
        "text_vocab": rows("text_embeddings.weight") - text_length,
        "image_height": rows("image_row_embeddings.weight"),
        "image_width": rows("image_col_embeddings.weight"),
        "codebook_size": rows("image_embeddings.weight"),
        "width": rows("transformer.layers.0.attention.dense.weight"),
        "num_layers": len({match[1] for name in tensors if (match := _LAYER.fullmatch(name))}),
    }
    notes = {}
    for field, external, kind in (("num_heads", "num_attention_heads", int), ("version", "hf_version", str)):
        for file, stated in configs.items():
            if external in stated:
                if type(stated[external]) is not kind:
                    raise WeightFileError(
                        f"{file} states {external} as {stated[external]!r}, expected {kind.__name__}"
                    )
                config[field], notes[field] = stated[external], file
    if "num_heads" not in config:
        if config["width"] not in HEADS:
            raise WeightFileError(
                f"its tensors do not tell how many attention heads it has, and no published model has its width "
                f"{config['width']}: state them in a file beside it, such as config.json with "
                '{"num_attention_heads": 16}'
            )
        config["num_heads"] = HEADS[config["width"]]
        notes["num_heads"] = "that of the published model of this width"
    return config, notes


def _version(masks: Tensors, layout: TextImageLayout, stated: str | None) -> tuple[Version, str]:
    """Which of the versions has these masks, and how that is known.

    Args:
        masks: Those of the file.
        layout: What they are masks of.
        stated: The version of a configuration, if there is one.

    Raises:
        WeightFileError: None has, or another than is stated.
    """

    def is_mask(stored: StoredTensor, spec: str) -> bool:
        if stored.shape != (layout.length, layout.length):
            return False
        return torch.equal(stored.read() != 0, Mask.from_spec(spec, layout).dense())

    for kind, spec in (("row", "row"), ("col", "column")):
        if not is_mask(masks[kind], spec):
            raise WeightFileError(f"its {kind}_mask is not that of ruDALL-E on {layout}")
    fitting = [version for version, spec in LAST_MASKS.items() if is_mask(masks["conv"], spec)]
    if not fitting:
        raise WeightFileError(f"its conv_mask is neither of those of ruDALL-E on {layout}")
    if stated is None:
        return fitting[0], "from its masks" if len(fitting) == 1 else "assumed: the grid is too small to tell by masks"
    if stated not in fitting:
        raise WeightFileError(f"it is stated to be of version {stated}, but has the masks of {fitting[0]}")
    return stated, "stated, and fits its masks"
