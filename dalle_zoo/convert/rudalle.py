"""ruDALL-E's priors: Malevich, Emojich, Surrealist, Kandinsky.

A published file is a state dict whose buffers hold the attention masks. They are rebuilt here and compared with those
of the file. They also determine the version: the convolutional mask of v3 ends at the borders, that of v2 wraps
around. Everything else except the number of heads follows from shapes. The vocabulary is a text file of YouTokenToMe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.convert.family import FAMILIES, Architecture, Conversion, Found, PriorFamily, Source
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.convert.youtokentome import is_vocabulary, read_vocabulary
from dalle_zoo.masks import Mask, TextImageLayout
from dalle_zoo.models.external.rudalle import LAST_MASKS, RuDALLE, RuDALLEConfig, Version
from dalle_zoo.tokenizers import TextTokenizer
from dalle_zoo.weights import Lazy

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
"""External and native names of modules."""
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
"""External and native names of modules in a layer."""
HEADS = {768: 12, 2048: 16, 3840: 60}
"""Attention heads of the published models, by width."""

_LAYER = re.compile(r"transformer\.layers\.(\d{1,3})\.(.+)")
_MASK = re.compile(r"(?:transformer\.)?(row|col|conv)_mask")


@FAMILIES.register("rudalle")
class RuDALLEFamily(PriorFamily):
    """Checkpoints of ruDALL-E's priors, versions v2 and v3.

    Example:
        >>> from dalle_zoo.models.external.rudalle import RuDALLEConfig
        >>> RuDALLEFamily("rudalle").describe(RuDALLEConfig())
        'ruDALL-E: 24 layers of width 2048, 128 text tokens, 32 x 32 codes, version v3'
    """

    title = "ruDALL-E"
    expects = (
        "a prior of ruDALL-E (Malevich, Emojich, Surrealist, Kandinsky); recognized by tensors image_row_embeddings, "
        "to_logits.1 and transformer.layers.0.before_first_addition_layernorm"
    )
    network = RuDALLE

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields the prior."""
        for name in checkpoint.tensors:
            if name.endswith(KNOWN_BY[0]):
                tensors = checkpoint.state_dict(name.removesuffix(KNOWN_BY[0]))
                if tensors.keys() >= set(KNOWN_BY):
                    yield "prior", tensors
                    return

    def infer(self, found: Found) -> Architecture:
        """Infers sizes from shapes, and heads and version from a configuration if there is one."""
        vocabularies = [file for file in found.location.files.values() if is_vocabulary(file)]
        found.location.check_single(vocabularies, "vocabularies")
        config, notes = _infer(found.parts["prior"], found.location.configs)
        masks = _masks(found.parts["prior"])
        if masks and len(masks) < 3:
            raise WeightFileError(f"it has only the masks {', '.join(masks)}, expected row, col and conv, or none")
        if not masks and "version" not in config:
            raise WeightFileError(
                "it lacks the masks (transformer.conv_mask ...) that determine the version: state the version in a "
                'file next to it, such as config.json with {"hf_version": "v3"}'
            )
        return Architecture(config, notes, {"vocabulary": vocabularies[0]} if vocabularies else {})

    def translate(self, source: Source, config: RuDALLEConfig) -> Mapping[str, Lazy]:
        """Renames the tensors, without the masks."""
        stored = source.parts["prior"]
        return {_native_name(name): tensor for name, tensor in stored.items() if not _MASK.fullmatch(name)}

    def unused(self, source: Source) -> dict[str, int]:
        """Counts the masks, which are rebuilt."""
        masks = _masks(source.parts["prior"])
        return {"masks": len(masks)} if masks else {}

    def text_tokenizer(self, source: Source) -> TextTokenizer | None:
        """Reads the vocabulary."""
        return read_vocabulary(source.files["vocabulary"]) if "vocabulary" in source.files else None

    def convert(self, source: Source, out: Path) -> Conversion:
        """Converts the prior after its masks have been read, which determine the version."""
        if masks := _masks(source.parts["prior"]):
            stated = source.config["version"] if "version" in source.notes else None
            version, note = _version(masks, RuDALLEConfig(**source.config).layout, stated)
            config, notes = {**source.config, "version": version}, {**source.notes, "version": note}
            source = replace(source, config=config, notes=notes)
        return super().convert(source, out)

    def describe(self, config: RuDALLEConfig) -> str:
        """Returns the sizes and the version."""
        return f"{super().describe(config)}, version {config.version}"


def _masks(tensors: Tensors) -> dict[str, StoredTensor]:
    """Returns the attention masks in a file by kind: "row", "col" and "conv"."""
    return {match[1]: tensor for name, tensor in tensors.items() if (match := _MASK.fullmatch(name))}


def _native_name(name: str) -> str:
    """Returns the native name of a tensor. An unknown name stays as it is and is later reported as unexpected."""
    module, _, kind = name.rpartition(".")
    if match := _LAYER.fullmatch(module):
        return f"layers.{match[1]}.{LAYER_NAMES.get(match[2], match[2])}.{kind}"
    return f"{NAMES.get(module, module)}.{kind}"


def _infer(tensors: Tensors, configs: Configs) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the fields of `RuDALLEConfig` and their origin; the version only if a configuration states it."""

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise WeightFileError(f"it has no matrix {name}")
        return tensors[name].shape[0]

    text_length = rows("text_pos_embeddings.weight") - 1  # v2 has one more start token
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
                        f"{file} states {external} as {shown(stated[external])}, expected {kind.__name__}"
                    )
                config[field], notes[field] = stated[external], file
    _check_stated(config, configs)
    if "num_heads" not in config:
        if config["width"] not in HEADS:
            raise WeightFileError(
                f"the number of attention heads does not follow from tensors, and no published model has its width "
                f"{config['width']}: state it in a file next to the weights, such as config.json with "
                '{"num_attention_heads": 16}'
            )
        config["num_heads"] = HEADS[config["width"]]
        notes["num_heads"] = "that of the published model of this width"
    return config, notes


def _check_stated(config: Mapping[str, Any], configs: Configs) -> None:
    """Raises `WeightFileError` if a configuration of ruDALL-E states other sizes than the tensors have."""
    sizes = {
        "num_layers": "num_layers", "hidden_size": "width", "text_seq_length": "text_length",
        "image_tokens_per_dim": "image_height", "image_vocab_size": "codebook_size",
    }  # fmt: skip
    for file, stated in configs.items():
        if "image_tokens_per_dim" not in stated:  # of another network
            continue
        wrong = [
            f"{external} is {shown(stated[external])}, the tensors have {config[field]}"
            for external, field in sizes.items()
            if stated.get(external, config[field]) != config[field]
        ]
        if wrong:
            raise WeightFileError(f"{file} does not describe this network: {'; '.join(wrong)}")


def _version(masks: Tensors, layout: TextImageLayout, stated: str | None) -> tuple[Version, str]:
    """Returns the version that has these masks, and its origin.

    Args:
        masks: Masks in the file.
        layout: Positions of text and image.
        stated: Version in a configuration; None if there is none.

    Raises:
        WeightFileError: No version has these masks, or another one than the stated.
    """

    def is_mask(stored: StoredTensor, spec: str) -> bool:
        if stored.shape != (layout.length, layout.length):
            return False
        return torch.equal(stored.read() != 0, Mask.from_spec(spec, layout).dense())

    for kind, spec in (("row", "row"), ("col", "column")):
        if not is_mask(masks[kind], spec):
            raise WeightFileError(f"its {kind}_mask differs from that of ruDALL-E on {layout}")
    fitting = [version for version, spec in LAST_MASKS.items() if is_mask(masks["conv"], spec)]
    if not fitting:
        raise WeightFileError(f"its conv_mask is neither that of v2 nor that of v3 of ruDALL-E on {layout}")
    if stated is None:
        return fitting[0], "from its masks" if len(
            fitting
        ) == 1 else "assumed: on a grid this small both versions have the same masks"
    if stated not in fitting:
        raise WeightFileError(f"a configuration states version {stated}, but it has the masks of {fitting[0]}")
    return stated, "stated in a configuration, and in agreement with its masks"
