"""DALL-E mini and mega: min-dalle's files for PyTorch, or the checkpoint of Flax, with the vocabulary beside it.

| file | becomes | known by |
|---|---|---|
| ``encoder.pt`` or ``encoder_mini.pt`` | ``prior/`` | ``embed_tokens``, ``layers.0.glu.fc0`` |
| ``decoder.pt`` or ``decoder_mini.pt`` | ``prior/`` | the same and ``lm_head`` |
| ``flax_model.msgpack``, instead of both | ``prior/`` | ``model.encoder.embed_tokens.embedding``, ``lm_head.kernel`` |
| ``vocab.json`` and ``merges.txt`` | ``tokenizer/`` | ids of ``<s>``, ``<pad>`` and ``</s>``; ``#version`` at first |
| ``config.json`` | start token, heads, how captions are read | ``"model_type": "dallebart"`` |
| ``detoker.pt`` | ``dvae/``, by `dalle_zoo.convert.vqgan` | as any VQGAN |

Files of both sizes lie in one repository; those of one must be named. Norms in front of matrices have no gain in these
files. It is filled in as 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
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
    image_tokenizer_in,
    read_config,
)
from dalle_zoo.convert.checkpoints import Checkpoint, StoredTensor
from dalle_zoo.convert.dalle_mini_text import SPECIAL, special_tokens, text_tokenizer, vocabularies
from dalle_zoo.convert.lazy import filled, write_network
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.models.external.dalle_mini import DalleMini, DalleMiniConfig
from dalle_zoo.weights import Lazy

Tensors = Mapping[str, StoredTensor]

HEAD_SIZE = 64
"""Width of a head where no configuration tells the number of heads; the published models have it."""
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
"""min-dalle's names in a layer, and ours."""
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
"""Flax's names in a layer, in the order of the calls, and min-dalle's."""
_FLAX_GATED = {"LayerNorm_0": "ln0", "Dense_0": "fc0", "Dense_1": "fc1", "LayerNorm_1": "ln1", "Dense_2": "fc2"}

VARIANT: dict[str, Any] = {
    "activation_function": "gelu", "ln_positions": "normformer", "ln_type": "layernorm", "scale_embedding": False,
    "sinkhorn_iters": 1, "tie_word_embeddings": False, "use_absolute_position_embeddings": True, "use_alibi": False,
    "use_bias": False, "use_cosine_attention": False, "use_deepnet_scaling": False, "use_final_ln_decoder": True,
    "use_final_ln_encoder": True, "use_glu": True, "use_head_scale": False, "use_swin_position_embeddings": False,
}  # fmt: skip
"""What a configuration must say of the kind of network, where it says it: the published models are of this one."""


@FAMILIES.register("dalle_mini")
class DalleMiniFamily:
    """Checkpoints of DALL-E mini and mega."""

    title = "DALL-E mini"
    expects = (
        "encoder.pt and decoder.pt of min-dalle, or flax_model.msgpack of DALL-E mini or mega; known by tensors "
        "embed_tokens, layers.0.glu.fc0 and lm_head"
    )
    complete = True

    def recognize(self, location: Location) -> Source | None:
        """The one prior at a location, with what lies beside it."""
        found = [(c, role, tensors) for c in location.checkpoints for role, tensors in _parts(c)]
        if not found:
            return None
        places = {role: [c.path.name for c, r, _ in found if r == role] for role in ("encoder", "decoder")}
        for role, names in places.items():
            if len(names) > 1:
                raise WeightFileError(
                    f"{location.path} holds the {role}s of several models of {self.title} ({', '.join(names)}): name "
                    "the files of one, with --files '*_mini.*' detoker.pt or files=['*_mini.*', 'detoker.pt']"
                )
        missing = [role for role, names in places.items() if not names]
        if missing:
            raise WeightFileError(
                f"{location.path} has {self.title}'s {found[0][1]} ({found[0][0].path.name}) without the "
                f"{missing[0]}: give both files, or the folder of both"
            )
        tensors = {name: tensor for _, _, part in found for name, tensor in part.items()}
        checkpoints = [checkpoint for checkpoint, _, _ in found]
        codes = image_tokenizer_in(location, without=checkpoints)
        files = {**_configuration(location), **vocabularies(location)}
        try:
            config, notes = _config(tensors, files, None if codes is None else codes.config["codebook_size"])
        except ValueError as error:
            raise WeightFileError(
                f"{' and '.join(dict.fromkeys(c.path.name for c in checkpoints))}: {error}"
            ) from None
        return Source(
            "dalle_mini", location.path, {"prior": tensors}, asdict(config), notes, files, image_tokenizer=codes
        )

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``prior/``, and ``tokenizer/`` where the vocabulary is there."""
        config = DalleMiniConfig(**source.config)
        with torch.device("meta"):
            net = DalleMini(config)
        stored = source.parts["prior"]
        gains = _missing_gains(stored)
        write_network(out / "prior", "dalle_mini", net, {**stored, **gains})
        simplified = _simplifies(_described(source.files))
        if "vocabulary" in source.files:
            text_tokenizer(source.files, config.text_vocab, simplified=simplified).save(out / "tokenizer")
        inferred = {"type": "dalle_mini", **asdict(config), "captions": "simplified" if simplified else "as they are"}
        if gains:
            inferred["gains"] = f"{len(gains)} that the files lack are 1"
        return Conversion(
            description=f"DALL-E mini's transformer: {config.encoder_layers} and {config.decoder_layers} layers of "
            f"width {config.width}",
            license_note=LICENSE_OF_CHECKPOINT,
            inferred=inferred,
            notes=dict(source.notes),
            parameters={"prior": sum(p.numel() for p in net.parameters())},
        )


# ---------------------------------------------------------------- tensors


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Roles and tensors, under our names, of what a file holds of this family; unknown names are left as they are."""
    tensors = checkpoint.tensors
    if {"embed_tokens.weight", "layers.0.glu.fc0.weight"} <= tensors.keys():
        role = "decoder" if "lm_head.weight" in tensors else "encoder"
        yield role, {_native_name(role, name): tensor for name, tensor in tensors.items()}
    if {"model.encoder.embed_tokens.embedding", "lm_head.kernel"} <= tensors.keys():
        for role in ("encoder", "decoder"):
            yield role, {_native_name(role, name): tensor for name, tensor in _flax_part(role, tensors)}


def _native_name(role: str, external: str) -> str:
    """Our name of a tensor of min-dalle's encoder or decoder."""
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
    """Tensors of the encoder or decoder in a checkpoint of Flax as min-dalle would have them."""
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
    """The tensors of all layers, which Flax keeps in one."""
    if not tensor.shape or tensor.shape[0] > MAX_LAYERS:
        raise WeightFileError(f"a tensor of shape {tensor.shape} should hold those of 1 to {MAX_LAYERS} layers")
    shape, stride = tensor.shape[1:], tensor.stride[1:]
    starts = [tensor.start + layer * tensor.stride[0] for layer in range(tensor.shape[0])]
    return [replace(tensor, shape=shape, stride=stride, start=start) for start in starts]


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[::-1], stride=tensor.stride[::-1])


def _missing_gains(tensors: Tensors) -> dict[str, Lazy]:
    """Gains of the norms that have a bias alone: 1, in the bias's precision. Nothing but norms has a bias."""
    gains = {name.removesuffix("bias") + "weight": tensor for name, tensor in tensors.items() if name.endswith("bias")}
    return {name: filled(bias.shape, 1.0, bias.dtype) for name, bias in gains.items() if name not in tensors}


# ---------------------------------------------------------------- configuration


def _configuration(location: Location) -> dict[str, Path]:
    """The training code's configuration at a location, known by content, under "configuration"; empty if none is."""
    names = [name for name, values in location.configs.items() if values.get("model_type") == "dallebart"]
    if len(names) > 1:
        raise WeightFileError(
            f"{location.path} has several configurations ({', '.join(names)}): name one with --files or files="
        )
    return {"configuration": location.files[names[0]]} if names else {}


def _config(
    tensors: Tensors, files: Mapping[str, Path], codebook_size: int | None
) -> tuple[DalleMiniConfig, dict[str, str]]:
    """The network's configuration, and where the fields come from that the tensors do not tell.

    Args:
        tensors: Under our names.
        files: Vocabulary and configuration, where they are there.
        codebook_size: That of the image tokenizer, where it is there.
    """
    sizes = _sizes(tensors)
    described = _described(files)
    name = files["configuration"].name if described else ""
    _check_described(name, described, sizes)
    rows, side = sizes["image_vocab_size"] + 1, math.isqrt(sizes["image_length"])
    heads = max(sizes["d_model"] // HEAD_SIZE, 1)
    special, where = special_tokens(files)
    config = DalleMiniConfig(
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
    unknown = f"{name} does not tell it" if described else "no configuration lies there"

    def option(field: str, otherwise: str) -> str:
        return name if field in described else f"{otherwise}, as {unknown}"

    power = f"the largest power of 2 below the {rows} rows of the table, as no image tokenizer lies there"
    notes = {
        "codebook_size": power if codebook_size is None else "that of the image tokenizer",
        "start_token": option(
            "decoder_start_token_id",
            f"the last {'row' if rows == config.codebook_size + 1 else 'of several rows'} behind the codes",
        ),
        "encoder_heads": option("encoder_attention_heads", f"width / {HEAD_SIZE}"),
        "decoder_heads": option("decoder_attention_heads", f"width / {HEAD_SIZE}"),
        **dict.fromkeys(SPECIAL, where),
        "captions": name or "as all configurations of the training code say",
    }
    return config, notes


def _described(files: Mapping[str, Path]) -> dict[str, Any]:
    """The training code's configuration; empty if there is none."""
    return read_config(files["configuration"]) if "configuration" in files else {}


def _sizes(tensors: Tensors) -> dict[str, int]:
    """Sizes that the tensors tell, by the names of a configuration."""

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
        raise ValueError(f"it has {sizes['image_length']} positions of image tokens, expected those of a square")
    return sizes


def _check_described(name: str, described: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` where a configuration says something else than the tensors, or another kind of network."""
    differences = [
        f"{field} is {described[field]!r}, expected {value!r}"
        for field, value in {**sizes, **VARIANT}.items()
        if described.get(field, value) != value
    ]
    for field in ("decoder_start_token_id", "encoder_attention_heads", "decoder_attention_heads"):
        if type(described.get(field, 0)) is not int:
            differences.append(f"{field} is {described[field]!r}, expected an integer")
    if differences:
        raise ValueError(
            f"{name} does not describe these weights, or they are of a kind that is not converted: "
            f"{'; '.join(differences)}; give the configuration that belongs to the weights, or none"
        )


def _num_layers(role: str, tensors: Tensors) -> int:
    numbers = {int(m[1]) for name in tensors if (m := re.match(rf"{role}\.layers\.(\d{{1,4}})\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"its {role} must have layers.0, layers.1 and so on, got {sorted(numbers)[:5]}")
    return len(numbers)


def _simplifies(described: Mapping[str, Any]) -> bool:
    """Whether captions were simplified for training; so say all configurations that the training code has."""
    return bool(described.get("normalize_text", not described))
