"""DALL-E mini and mega: min-dalle's files for PyTorch or the Flax checkpoint, and their vocabulary.

| file | becomes | recognized by |
|---|---|---|
| ``encoder.pt`` or ``encoder_mini.pt`` | ``prior/`` | ``embed_tokens``, ``layers.0.glu.fc0`` |
| ``decoder.pt`` or ``decoder_mini.pt`` | ``prior/`` | the same and ``lm_head`` |
| ``flax_model.msgpack``, instead of both | ``prior/`` | ``model.encoder.embed_tokens.embedding``, ``lm_head.kernel`` |
| ``vocab.json`` and ``merges.txt`` | ``tokenizer/`` | ids of ``<s>``, ``<pad>``, ``</s>``; a line ``#version`` |
| ``config.json`` | start token, heads, caption processing | ``"model_type": "dallebart"`` |
| ``detoker.pt`` | ``dvae/``, by `dalle_zoo.convert.vqgan` | as any VQGAN |

The published repository holds the files of both sizes; select those of one. In these files the norms before matrix
products have no gain; it is filled in as 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_zoo.convert.dalle_mini_text import SPECIAL, special_tokens, text_tokenizer, vocabularies
from dalle_zoo.convert.family import FAMILIES, Architecture, Conversion, Found, PriorFamily, Source
from dalle_zoo.convert.lazy import filled
from dalle_zoo.convert.location import Location, read_config
from dalle_zoo.convert.pickles import WeightFileError, shown
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.models.external.dalle_mini import DalleMini, DalleMiniConfig
from dalle_zoo.tokenizers import TextTokenizer
from dalle_zoo.weights import Lazy

HEAD_SIZE = 64
"""Width of a head if no configuration states the number of heads; that of the published models."""
MAX_LAYERS = 1000

_OUTSIDE = {
    "embed_tokens": "embedding", "embed_positions": "position", "layernorm_embedding": "embedding_norm",
    "final_ln": "final_norm",
}  # fmt: skip
_GATED = {"ln0": "norm", "fc0": "gate", "fc1": "hidden", "ln1": "hidden_norm", "fc2": "output"}
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_LAYER = {
    "encoder": {
        "pre_self_attn_layer_norm": "norm", "self_attn": "attention", "self_attn_layer_norm": "mixed_norm",
        "glu": "gated_unit",
    },
    "decoder": {
        "pre_self_attn_layer_norm": "image_norm", "self_attn": "image_attention",
        "self_attn_layer_norm": "image_mixed_norm", "pre_encoder_attn_layer_norm": "text_norm",
        "encoder_attn": "text_attention", "encoder_attn_layer_norm": "text_mixed_norm", "glu": "gated_unit",
    },
}  # fmt: skip
"""Modules of a layer: names of min-dalle and native names."""
_FLAX = {
    "encoder": {
        "LayerNorm_0": "pre_self_attn_layer_norm", "FlaxBartAttention_0": "self_attn",
        "LayerNorm_1": "self_attn_layer_norm", "GLU_0": "glu",
    },
    "decoder": {
        "LayerNorm_0": "pre_self_attn_layer_norm", "FlaxBartAttention_0": "self_attn",
        "LayerNorm_1": "self_attn_layer_norm", "LayerNorm_2": "pre_encoder_attn_layer_norm",
        "FlaxBartAttention_1": "encoder_attn", "LayerNorm_3": "encoder_attn_layer_norm", "GLU_0": "glu",
    },
}  # fmt: skip
"""Modules of a layer: names of Flax, in calling order, and names of min-dalle."""
_FLAX_GATED = {"LayerNorm_0": "ln0", "Dense_0": "fc0", "Dense_1": "fc1", "LayerNorm_1": "ln1", "Dense_2": "fc2"}

VARIANT: dict[str, Any] = {
    "activation_function": "gelu", "ln_positions": "normformer", "ln_type": "layernorm", "scale_embedding": False,
    "sinkhorn_iters": 1, "tie_word_embeddings": False, "use_absolute_position_embeddings": True, "use_alibi": False,
    "use_bias": False, "use_cosine_attention": False, "use_deepnet_scaling": False, "use_final_ln_decoder": True,
    "use_final_ln_encoder": True, "use_glu": True, "use_head_scale": False, "use_swin_position_embeddings": False,
}  # fmt: skip
"""Values that a configuration may state for the kind of network; other kinds are not supported."""


@FAMILIES.register("dalle_mini")
class DalleMiniFamily(PriorFamily):
    """Checkpoints of DALL-E mini and mega.

    Example:
        >>> from dalle_zoo.models.external.dalle_mini import DalleMiniConfig
        >>> DalleMiniFamily("dalle_mini").describe(DalleMiniConfig())
        "DALL-E mini's transformer: 12 and 12 layers of width 1024"
    """

    title = "DALL-E mini"
    expects = (
        "encoder.pt and decoder.pt of min-dalle, or flax_model.msgpack of DALL-E mini or mega; recognized by tensors "
        "embed_tokens, layers.0.glu.fc0 and lm_head"
    )
    network = DalleMini
    required = ("encoder", "decoder")

    def parts(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensors]]:
        """Yields encoder and decoder under native names; unknown names are left as they are."""
        tensors = checkpoint.tensors
        if {"embed_tokens.weight", "layers.0.glu.fc0.weight"} <= tensors.keys():
            role = "decoder" if "lm_head.weight" in tensors else "encoder"
            yield role, {_native_name(role, name): tensor for name, tensor in tensors.items()}
        if {"model.encoder.embed_tokens.embedding", "lm_head.kernel"} <= tensors.keys():
            for role in ("encoder", "decoder"):
                yield role, {_native_name(role, name): tensor for name, tensor in _flax_part(role, tensors)}

    def infer(self, found: Found) -> Architecture:
        """Infers sizes from shapes, and the rest from the configuration and the vocabulary if they were found."""
        files = {**_configuration(found.location), **vocabularies(found.location)}
        codes = found.image_tokenizer
        config, notes = _config(_joined(found.parts), files, None if codes is None else codes.config["codebook_size"])
        return Architecture(config, notes, files)

    def translate(self, source: Source, config: DalleMiniConfig) -> Mapping[str, Lazy]:
        """Joins encoder and decoder, and fills in gains that the files lack."""
        tensors = _joined(source.parts)
        return {**tensors, **_missing_gains(tensors)}

    def text_tokenizer(self, source: Source) -> TextTokenizer | None:
        """Reads vocabulary and merges."""
        if "vocabulary" not in source.files:
            return None
        simplified = _simplifies(_described(source.files))
        return text_tokenizer(source.files, source.config["text_vocab"], simplified=simplified)

    def convert(self, source: Source, out: Path) -> Conversion:
        """Converts the prior; the record also says how captions are processed and how many gains were filled in."""
        record = super().convert(source, out)
        inferred = {
            **record.inferred,
            "captions": "simplified" if _simplifies(_described(source.files)) else "as they are",
        }
        if gains := _missing_gains(_joined(source.parts)):
            inferred["gains"] = f"{len(gains)} that the files lack are 1"
        return replace(record, inferred=inferred)

    def describe(self, config: DalleMiniConfig) -> str:
        """Returns the sizes of encoder and decoder."""
        layers = f"{config.encoder_layers} and {config.decoder_layers} layers of width {config.width}"
        return f"DALL-E mini's transformer: {layers}"


# ---------------------------------------------------------------- tensors


def _joined(parts: Mapping[str, Tensors]) -> Tensors:
    """Returns the tensors of encoder and decoder."""
    return {name: tensor for part in parts.values() for name, tensor in part.items()}


def _native_name(role: str, external: str) -> str:
    """Returns the native name of a tensor of min-dalle's encoder or decoder."""
    *modules, kind = external.split(".")
    if modules == ["lm_head"]:
        return f"image_head.{kind}"
    if len(modules) == 1 and modules[0] in _OUTSIDE:
        return f"{role}.{_OUTSIDE[modules[0]]}.{kind}"
    if len(modules) in (3, 4) and modules[0] == "layers" and modules[2] in _LAYER[role]:
        inner = {**_GATED, **_PROJECTIONS}
        rest = [inner.get(module, module) for module in modules[3:]]
        return ".".join([role, "layers", modules[1], _LAYER[role][modules[2]], *rest, kind])
    return f"{role}.{external}"


def _flax_part(role: str, tensors: Tensors) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the encoder or decoder of a Flax checkpoint under min-dalle's names and in its layout."""
    kinds = {"scale": "weight", "embedding": "weight", "kernel": "weight"}
    stacked = re.compile(rf"layers\.FlaxBart{role.title()}Layers?(?:_(\d+))?\.(.+)")
    prefix = f"model.{role}."
    for name, tensor in tensors.items():
        if role == "decoder" and name == "lm_head.kernel":
            yield "lm_head.weight", _transposed(tensor)
        if not name.startswith(prefix):
            continue
        *modules, kind = name.removeprefix(prefix).split(".")
        match = stacked.fullmatch(".".join(modules))
        if match is None:
            yield ".".join([*modules, kinds.get(kind, kind)]), tensor
            continue
        number, path = match.groups()
        first, *rest = path.split(".")
        first = _FLAX[role].get(first, first)
        inner = ".".join([first, *(_FLAX_GATED.get(module, module) for module in rest), kinds.get(kind, kind)])
        layers = [(int(number), tensor)] if number else enumerate(_layers(tensor))
        for layer, part in layers:
            yield f"layers.{layer}.{inner}", _transposed(part) if kind == "kernel" else part


def _layers(tensor: StoredTensor) -> list[StoredTensor]:
    """Returns one tensor per layer; Flax stacks them in one."""
    if not tensor.shape or tensor.shape[0] > MAX_LAYERS:
        raise WeightFileError(f"a tensor of shape {tensor.shape} must stack 1 to {MAX_LAYERS} layers")
    shape, stride = tensor.shape[1:], tensor.stride[1:]
    starts = [tensor.start + layer * tensor.stride[0] for layer in range(tensor.shape[0])]
    return [replace(tensor, shape=shape, stride=stride, start=start) for start in starts]


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[::-1], stride=tensor.stride[::-1])


def _missing_gains(tensors: Tensors) -> dict[str, Lazy]:
    """Returns gains of 1 for norms that have only a bias, in the dtype of the bias. Only norms have biases here."""
    gains = {name.removesuffix("bias") + "weight": tensor for name, tensor in tensors.items() if name.endswith("bias")}
    return {name: filled(bias.shape, 1.0, bias.dtype) for name, bias in gains.items() if name not in tensors}


# ---------------------------------------------------------------- configuration


def _configuration(location: Location) -> dict[str, Path]:
    """Returns the training code's configuration as "configuration", recognized by content; empty if there is none."""
    names = [name for name, values in location.configs.items() if values.get("model_type") == "dallebart"]
    if len(names) > 1:
        raise WeightFileError(
            f"{location.path} holds several configurations ({', '.join(names)}): name one with --files or files="
        )
    return {"configuration": location.files[names[0]]} if names else {}


def _config(
    tensors: Tensors, files: Mapping[str, Path], codebook_size: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the fields of `DalleMiniConfig`, and the origin of those that do not follow from the tensors.

    Args:
        tensors: Weights under native names.
        files: Vocabulary and configuration, if they were found.
        codebook_size: Codebook size of the image tokenizer; None if it was not found.
    """
    sizes = _sizes(tensors)
    described = _described(files)
    name = files["configuration"].name if described else ""
    _check_described(name, described, sizes)
    rows, side = sizes["image_vocab_size"] + 1, math.isqrt(sizes["image_length"])
    heads = max(sizes["d_model"] // HEAD_SIZE, 1)
    special, where = special_tokens(files)
    config = dict(
        text_length=sizes["max_text_length"],
        text_vocab=sizes["encoder_vocab_size"],
        image_height=side,
        image_width=side,
        codebook_size=1 << (rows - 1).bit_length() - 1 if codebook_size is None else codebook_size,
        image_rows=rows,
        start_token=described.get("decoder_start_token_id", rows - 1),
        width=sizes["d_model"],
        encoder_layers=sizes["encoder_layers"],
        encoder_heads=described.get("encoder_attention_heads", heads),
        encoder_hidden=sizes["encoder_ffn_dim"],
        decoder_layers=sizes["decoder_layers"],
        decoder_heads=described.get("decoder_attention_heads", heads),
        decoder_hidden=sizes["decoder_ffn_dim"],
        **special,
    )
    unknown = f"{name} does not state it" if described else "no configuration was found"

    def option(field: str, otherwise: str) -> str:
        return name if field in described else f"{otherwise}, as {unknown}"

    power = f"the largest power of 2 below the {rows} rows of the table, as no image tokenizer was found"
    notes = {
        "codebook_size": power if codebook_size is None else "that of the image tokenizer",
        "start_token": option(
            "decoder_start_token_id",
            f"the last {'row' if rows == config['codebook_size'] + 1 else 'of several rows'} after the codes",
        ),
        "encoder_heads": option("encoder_attention_heads", f"width / {HEAD_SIZE}"),
        "decoder_heads": option("decoder_attention_heads", f"width / {HEAD_SIZE}"),
        **dict.fromkeys(SPECIAL, where),
        "captions": name or "as in all configurations of the training code",
    }
    return config, notes


def _described(files: Mapping[str, Path]) -> dict[str, Any]:
    """Returns the content of the training code's configuration; empty if there is none."""
    return read_config(files["configuration"]) if "configuration" in files else {}


def _sizes(tensors: Tensors) -> dict[str, int]:
    """Returns the sizes that follow from the tensors, under the names of the configuration."""

    def axis(name: str, number: int) -> int:
        if name not in tensors or len(tensors[name].shape) <= number:
            raise ValueError(f"it has no {name} with {number + 1} dimensions")
        return tensors[name].shape[number]

    sizes = {
        "d_model": axis("decoder.embedding.weight", 1),
        "image_vocab_size": axis("decoder.embedding.weight", 0) - 1,
        "image_length": axis("decoder.position.weight", 0),
        "encoder_vocab_size": axis("encoder.embedding.weight", 0),
        "max_text_length": axis("encoder.position.weight", 0),
    }
    for role in ("encoder", "decoder"):
        sizes[f"{role}_layers"] = _num_layers(role, tensors)
        sizes[f"{role}_ffn_dim"] = axis(f"{role}.layers.0.gated_unit.gate.weight", 0)
    if math.isqrt(sizes["image_length"]) ** 2 != sizes["image_length"]:
        raise ValueError(f"it has {sizes['image_length']} image positions, expected a square number")
    return sizes


def _check_described(name: str, described: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` if the configuration contradicts the tensors or describes an unsupported network."""
    differences = [
        f"{field} is {shown(described[field])}, expected {value!r}"
        for field, value in {**sizes, **VARIANT}.items()
        if described.get(field, value) != value
    ]
    for field in ("decoder_start_token_id", "encoder_attention_heads", "decoder_attention_heads"):
        if type(described.get(field, 0)) is not int:
            differences.append(f"{field} is {shown(described[field])}, expected an integer")
    if differences:
        raise ValueError(
            f"{name} does not describe these weights, or they are of an unsupported kind: "
            f"{'; '.join(differences)}; give the configuration that belongs to the weights, or none"
        )


def _num_layers(role: str, tensors: Tensors) -> int:
    numbers = {int(m[1]) for name in tensors if (m := re.match(rf"{role}\.layers\.(\d{{1,4}})\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"its {role} must have consecutive layers layers.0, layers.1, ..., got {sorted(numbers)[:5]}")
    return len(numbers)


def _simplifies(described: Mapping[str, Any]) -> bool:
    """Returns whether captions were simplified for training. True without a configuration: all known ones say so."""
    return bool(described.get("normalize_text", not described))
