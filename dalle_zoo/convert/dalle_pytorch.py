"""DALLE-pytorch's priors, versions 0.1 to 1.6.6, with the image tokenizer in the same file and a vocabulary beside it.

A file holds ``hparams`` (arguments of the original's class), ``vae_params``, ``weights`` and, since the end of 2021,
``version``. How modules are nested, hence their names, changed with the versions and with the options:

| versions | attention of layer i, below ``transformer.layers.layers.i.0`` | its MLP, below ``….i.1`` |
|---|---|---|
| 0.1 to 0.7 | ``fn.to_qkv`` | ``fn.net.0`` |
| 0.8 to 0.14 | ``fn.fn.to_qkv`` | ``fn.fn.net.0`` |
| 1.0 to 1.2, shifted tokens | ``fn.fn.fn.to_qkv`` | ``fn.fn.fn.net.0`` |
| from 1.4 | ``fn.fn.fn.to_qkv`` | ``fn.fn.net.0`` |
| from 1.4, shifted tokens | ``fn.fn.fn.fn.fn.to_qkv`` | ``fn.fn.fn.fn.net.0`` |

(reversible: ``transformer.layers.blocks.i.f.net`` and ``….g.net``). A gMLP block has ``proj_in.0`` where attention has
``to_qkv``; block-sparse attention has a layout beside this, ``attn_fn.master_layout``. So names are known by how they
end, and the number of wrappers tells two options. What tensors tell is taken from them and must agree with
``hparams``; these tell the rest, and what they leave out has the original's default. The record says where each field
comes from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from dalle_zoo.convert.dalle_pytorch_hparams import (
    HyperParameters,
    attention_masks,
    hyper_parameters,
    layers_of_kind,
    stated_version,
)
from dalle_zoo.convert.dalle_pytorch_text import about_vocabulary, find_vocabulary, read_vocabulary
from dalle_zoo.convert.lazy import DerivedTensor, write_network
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.models.external.dalle_pytorch import DallePytorch, DallePytorchConfig
from dalle_zoo.models.external.dalle_pytorch_layers import rotated_size, turns
from dalle_zoo.models.external.dalle_pytorch_sparse import BLOCK, random_blocks, sure_blocks
from dalle_zoo.weights import Lazy

Tensors = Mapping[str, StoredTensor]

HEAD = "to_logits.1.weight"
ANGLES = "transformer.pos_emb"
LAYOUT = "attn_fn.master_layout"
_BRANCH = re.compile(
    r"transformer\.layers\.(?:layers\.(?P<layer>\d{1,4})\.(?P<half>[01])|blocks\.(?P<block>\d{1,4})\.(?P<side>[fg])\.net)"
    r"\.(?P<wrappers>(?:fn\.)*)(?P<part>.+)"
)
_PARTS = {
    "scale": "scale", "norm.weight": "norm.weight", "norm.bias": "norm.bias", "norm.g": "norm.weight",
    "norm_out.weight": "norm_behind.weight", "norm_out.bias": "norm_behind.bias",
}  # fmt: skip
"""What a branch has of its own, by their name and ours."""
_MATRICES = {
    "to_qkv.weight": "qkv.weight", "to_out.0.weight": "output.weight", "to_out.0.bias": "output.bias",
    "net.0.weight": "hidden.weight", "net.0.bias": "hidden.bias",
    "net.3.weight": "output.weight", "net.3.bias": "output.bias",
}  # fmt: skip
"""What it may share with those of other layers."""
_GMLP = {
    "proj_in.0.weight": "hidden.weight", "proj_in.0.bias": "hidden.bias", "sgu.norm.weight": "norm.weight",
    "sgu.norm.bias": "norm.bias", "sgu.weight": "weight", "sgu.bias": "bias", "proj_out.weight": "output.weight",
    "proj_out.bias": "output.bias",
}  # fmt: skip
"""What a gMLP block has, by its last names and ours."""
_GMLP_BEFORE = {
    "0.weight": "proj_in.0.weight", "0.bias": "proj_in.0.bias", "2.norm.weight": "sgu.norm.weight",
    "2.norm.bias": "sgu.norm.bias", "2.proj.weight": "sgu.proj.weight", "2.proj.bias": "sgu.proj.bias",
    "3.weight": "proj_out.weight", "3.bias": "proj_out.bias",
}  # fmt: skip
"""Its names in g-mlp-pytorch up to 0.0.15, and those after. The matrix over positions left ``sgu.proj`` for ``sgu``
with 0.1.0; the old one stayed, unused, until 0.1.2."""


@FAMILIES.register("dalle_pytorch")
class DallePytorchFamily:
    """Checkpoints of priors that DALLE-pytorch's train_dalle.py writes."""

    title = "DALLE-pytorch"
    expects = (
        "dalle.pt of DALLE-pytorch's train_dalle.py, of any version; known by tensors to_logits.1, "
        "transformer.layers….to_qkv and ….net.3"
    )
    complete = True

    def recognize(self, location: Location) -> Source | None:
        """The one prior at a location, with its image tokenizer and its vocabulary."""
        found = [(c, tensors) for c in location.checkpoints if (tensors := _transformer(c)) is not None]
        check_single(location, [c.path for c, _ in found], f"priors of {self.title}")
        if not found:
            _refuse_deepspeed(location)
            return None
        checkpoint, stored = found[0]
        try:
            network = sort_tensors(stored)
            hparams = hyper_parameters(location, checkpoint)
            config, notes = _infer(network, hparams, stated_version(location, checkpoint))
            vocabulary = find_vocabulary(location, config.text_vocab)
        except ValueError as error:
            raise WeightFileError(f"{checkpoint.path} cannot be converted: {error}") from None
        inside = image_tokenizer_in(replace(location, checkpoints=(checkpoint,)))
        return Source(
            "dalle_pytorch",
            location.path,
            {"prior": stored},
            asdict(config),
            notes | {"vocabulary": about_vocabulary(vocabulary, config.text_vocab)},
            files={"vocabulary": vocabulary} if vocabulary is not None else {},
            image_tokenizer=inside or image_tokenizer_in(location, without=[checkpoint]),
        )

    def convert(self, source: Source, out: Path) -> Conversion:
        """Writes ``prior/``, and ``tokenizer/`` where a vocabulary is there."""
        config = DallePytorchConfig(**source.config)
        with torch.device("meta"):
            net = DallePytorch(config)
        stored = source.parts["prior"]
        write_network(out / "prior", "dalle_pytorch", net, translated(sort_tensors(stored), config))
        if "vocabulary" in source.files:
            read_vocabulary(source.files["vocabulary"]).save(out / "tokenizer")
        return Conversion(
            description=f"{self.title}: {config.num_layers} layers of width {config.width}, {config.text_length} "
            f"text tokens, {config.image_height} x {config.image_width} codes",
            license_note=LICENSE_OF_CHECKPOINT,
            inferred={"type": "dalle_pytorch", **asdict(config)},
            notes=dict(source.notes),
            unused=_unused(stored),
            parameters={"prior": sum(p.numel() for p in net.parameters())},
        )


# ------------------------------------------------------------ tensors


@dataclass(frozen=True)
class Network:
    """Stored tensors of a prior, sorted."""

    outside: Tensors
    """Those outside the layers, under their names."""
    layers: Sequence[tuple[Tensors, Tensors]]
    """Those of attention and MLP of every layer, by how their names end."""
    wrappers: tuple[int, int]
    """Modules round attention and MLP."""
    reversible: bool

    @property
    def shifts(self) -> bool:
        """Whether tokens are shifted: a wrapper more than normalization and scale need."""
        return self.wrappers[1] > 1 + ("scale" in self.layers[0][1])

    @property
    def caches(self) -> bool:
        """Whether it has the wrapper of attention that keeps keys and values, which came with version 1.4."""
        return self.wrappers[0] > self.wrappers[1]

    def matrix(self, name: str) -> StoredTensor:
        """A tensor outside the layers that must have two dimensions."""
        tensor = self.outside.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise WeightFileError(f"it has no matrix {name}")
        return tensor


def _transformer(checkpoint: Checkpoint) -> Tensors | None:
    """Tensors of the prior in a file, prefix taken off, without its image tokenizer's; None if there is none."""
    for name in checkpoint.tensors:
        if name.endswith(HEAD):
            tensors = checkpoint.state_dict(name.removesuffix(HEAD))
            branches = [match["part"] for other in tensors if (match := _BRANCH.fullmatch(other))]
            if "net.3.weight" in branches:
                return {name: tensor for name, tensor in tensors.items() if not name.startswith("vae.")}
    return None


def sort_tensors(stored: Tensors) -> Network:
    """Sorts tensors by layer and branch.

    Raises:
        WeightFileError: There are layers missing, or such as are not converted.
    """
    outside: dict[str, StoredTensor] = {}
    layers: dict[int, tuple[dict[str, StoredTensor], dict[str, StoredTensor]]] = {}
    wrappers: dict[str, int] = {}
    reversible = False
    for name, tensor in stored.items():
        match = _BRANCH.fullmatch(name)
        if match is None:
            outside[name] = tensor
            continue
        part = match["part"]
        part = _GMLP_BEFORE.get(part, part)
        number, half = int(match["layer"] or match["block"]), match["half"] or "fg".index(match["side"])
        layers.setdefault(number, ({}, {}))[int(half)][part] = tensor
        wrappers[part] = match["wrappers"].count("fn.")
        reversible |= match["block"] is not None
    for attention, _ in layers.values():
        for kind in ("weight", "bias"):
            if (before := attention.pop(f"sgu.proj.{kind}", None)) is not None:
                attention.setdefault(f"sgu.{kind}", before)
    inputs = [_input(attention) for attention, _ in layers.values()]
    complete = None not in inputs and all("net.0.weight" in mlp for _, mlp in layers.values())
    if sorted(layers) != list(range(len(layers))) or not complete:
        raise WeightFileError(
            "its layers must be numbered 0, 1 and so on, each with matrices to_qkv, or proj_in of gMLP, and net.0"
        )
    depths = (max(wrappers[name] for name in inputs if name), wrappers["net.0.weight"])
    return Network(outside, [layers[number] for number in range(len(layers))], depths, reversible)


def _input(attention: Tensors) -> str | None:
    """Name of the first matrix of an attention or a gMLP block; None if there is none."""
    names = ("to_qkv.weight", "proj_in.0.weight")
    return next((name for name in names if name in attention and len(attention[name].shape) == 2), None)


def translated(network: Network, config: DallePytorchConfig) -> dict[str, Lazy]:
    """All tensors under our names.

    Raises:
        WeightFileError: One is missing, or left over.
    """
    left = {name: tensor for name, tensor in network.outside.items() if name != "logits_mask"}
    d = config.width

    def take(name: str) -> StoredTensor:
        if name not in left:
            raise WeightFileError(f"it has no {name}")
        return left.pop(name)

    native: dict[str, Lazy] = {}
    native |= {f"head.{kind}": take(f"to_logits.1.{kind}") for kind in ("weight", "bias")}
    if config.norm == "layer":
        native |= {f"final_norm.{kind}": take(f"to_logits.0.{kind}") for kind in ("weight", "bias")}
    else:
        native["final_norm.weight"] = _gain(take("to_logits.0.g"), d)
    for what in ("text", "image"):
        if config.tied_embeddings:  # which are the head once more
            for kind in ("weight", "bias"):
                take(f"{what}_emb.linear.{kind}")
        else:
            native[f"{what}_embedding.weight"] = take(f"{what}_emb.weight")
    if config.positions == "rotary":
        native["rotation"] = _rotation(take(ANGLES), config)
    else:
        native["text_position.weight"] = take("text_pos_emb.weight")
        for axis, (native_name, size) in enumerate((("row", config.image_height), ("column", config.image_width))):
            native[f"{native_name}_position.weight"] = _reshaped(take(_axial_name(network, axis)), (size, d))
    if config.sparse_layers:
        native["blocks"] = _blocks(network.layers[config.sparse_layers[0]][0].get(LAYOUT), config)
    for index, branches in enumerate(network.layers):
        shared = (config.shared_attention, config.shared_mlp)
        for kind, parts, numbers in zip(("attention", "mlp"), branches, shared, strict=True):
            for name, tensor in parts.items():
                if name in _MATRICES:
                    native.setdefault(f"{kind}s.{(numbers or range(index + 1))[index]}.{_MATRICES[name]}", tensor)
                elif name in _GMLP and index in config.gmlp_layers:
                    native[f"attentions.{index}.{_GMLP[name]}"] = _mixing(tensor, name, config.fed_length)
                elif name == LAYOUT and index in config.sparse_layers:
                    pass  # that of the first such layer is that of all
                elif name in _PARTS:
                    native[f"layers.{index}.{kind}.{_PARTS[name]}"] = (
                        _reshaped(tensor, (d,))
                        if name == "scale"
                        else _gain(tensor, d)
                        if name == "norm.g"
                        else tensor
                    )
                else:
                    left[f"{kind} {index}: {name}"] = tensor
    if left:
        raise WeightFileError(f"it has {', '.join(list(left)[:5])} besides, which no version of the original has")
    return native


def _blocks(stored: StoredTensor | None, config: DallePytorchConfig) -> DerivedTensor:
    """Layout of block-sparse attention, from that of the first layer that has it."""
    count = config.fed_length // BLOCK
    if stored is None:
        if random_blocks(config.fed_length):
            raise WeightFileError(
                f"its block-sparse layers lack {LAYOUT}, and some of the blocks that they read were sampled at random"
            )
        return DerivedTensor((count, count), torch.float32, lambda: sure_blocks(config.fed_length))
    if stored.shape != (config.num_heads, count, count):
        raise WeightFileError(f"{LAYOUT} has shape {stored.shape}, expected {(config.num_heads, count, count)}")

    def read() -> torch.Tensor:
        layout = (stored.read() != 0).float()
        if not (layout == layout[0]).all() or not layout[0].diagonal().all():
            raise WeightFileError(f"{LAYOUT} must be the same for all heads, and every block must read itself")
        return layout[0].clone()

    return DerivedTensor((count, count), torch.float32, read)


def _mixing(tensor: StoredTensor, name: str, length: int) -> Lazy:
    """A tensor of a gMLP block; the matrix over positions and its bias had sides of 1 in most versions."""
    shape = {"sgu.weight": (length, length), "sgu.bias": (length,)}.get(name)
    return tensor if shape is None else _reshaped(tensor, shape)


def _unused(stored: Tensors) -> dict[str, int]:
    """How many tensors are not taken: the mask of the logits, layouts but the first, matrices left in gMLP blocks."""
    counts = {
        "logits_mask": sum(name == "logits_mask" for name in stored),
        LAYOUT: max(sum(name.endswith(LAYOUT) for name in stored) - 1, 0),
        "sgu.proj": sum(name.replace("sgu.proj.", "sgu.") in stored for name in stored if "sgu.proj." in name),
    }
    return {name: count for name, count in counts.items() if count}


def _axial_name(network: Network, axis: int) -> str:
    """Name of the table of rows (axis 0) or columns; that of the package it comes from changed once."""
    names = [f"image_pos_emb.weights{mark}{axis}" for mark in "_."]
    return next((name for name in names if name in network.outside), names[0])


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> DerivedTensor:
    if math.prod(shape) != tensor.num_elements:
        raise WeightFileError(f"a tensor of shape {tensor.shape} should have {shape}, but for sides of 1")
    return DerivedTensor(shape, tensor.dtype, lambda: tensor.read().view(shape))


def _gain(tensor: StoredTensor, width: int) -> Lazy:
    """Gains of the normalization by root mean square; version 0.5 has a single one, over the length."""
    if tensor.shape != (1,) or width == 1:
        return tensor
    return DerivedTensor((width,), tensor.dtype, lambda: tensor.read().expand(width) / math.sqrt(width))


def _rotation(angles: StoredTensor, config: DallePytorchConfig) -> DerivedTensor:
    """Cosines and sines of the angles in the file, which versions and precisions made in different ways.

    In float32 whatever the angles are, for rounding cosines is harmless and rounding angles of 8,192 is not.
    """
    length, size = config.layout.length, rotated_size(config.head_size)
    rows = angles.num_elements // max(size, 1)
    if angles.shape[-2:] != (rows, size) or rows not in (length - 1, length):
        raise WeightFileError(f"{ANGLES} has shape {angles.shape}, expected ({length}, {size})")

    def read() -> torch.Tensor:
        table = angles.read().float().view(rows, size)
        return turns(torch.cat([table, table[-1:]])[:length])  # versions before 1.1.2 leave out the last, never fed

    return DerivedTensor((2, length, size), torch.float32, read)


# ------------------------------------------------------------ what is inferred


def _infer(
    network: Network, hparams: HyperParameters, version: tuple[int, ...] | None
) -> tuple[DallePytorchConfig, dict[str, str]]:
    """The architecture, and where the fields come from that tensors do not tell.

    Raises:
        WeightFileError: Tensors and hyper-parameters do not fit each other, or it is not converted.
    """
    first = network.layers[0]
    rotary, tied = ANGLES in network.outside, "text_emb.linear.weight" in network.outside
    inferred: dict[str, Any] = {
        "dim": network.matrix(HEAD).shape[1],
        "depth": len(network.layers),
        "reversible": network.reversible,
        "rotary_emb": rotary,
        "shift_tokens": network.shifts,
        "sandwich_norm": "norm_out.weight" in first[0],
        "share_input_output_emb": tied,
    }
    if not rotary:
        inferred["text_seq_len"] = network.matrix("text_pos_emb.weight").shape[0] - 1
    hparams.check(inferred)
    text_length = inferred.get("text_seq_len", hparams.number("text_seq_len"))
    text_vocab = hparams.number("num_text_tokens")
    text_ids = text_vocab + text_length if tied else network.matrix("text_emb.weight").shape[0]
    if text_ids - text_vocab not in (0, text_length):
        raise WeightFileError(
            f"its table of {text_ids} text tokens fits neither num_text_tokens {text_vocab} nor as many more as "
            f"text_seq_len {text_length}"
        )
    height, width = _grid(network, text_length)
    heads, head_size = hparams.number("heads"), hparams.number("dim_head")
    matrices = [attention["to_qkv.weight"] for attention, _ in network.layers if "to_qkv.weight" in attention]
    if matrices and 3 * heads * head_size != (rows := matrices[0].shape[0]):
        raise WeightFileError(
            f"heads {heads} and dim_head {head_size} need a to_qkv of {3 * heads * head_size} rows, it has {rows}"
        )
    masks, about_masks = attention_masks(hparams, len(network.layers), version, network.caches)
    gmlps = tuple(index for index, (attention, _) in enumerate(network.layers) if "proj_in.0.weight" in attention)
    if gmlps != (stated := layers_of_kind("mlp", hparams, len(network.layers))):
        raise WeightFileError(f"attn_types in {hparams.where} has gMLP layers {stated}, the tensors have {gmlps}")
    config = DallePytorchConfig(
        text_length=text_length,
        text_vocab=text_vocab,
        image_height=height,
        image_width=width,
        codebook_size=network.matrix(HEAD).shape[0] - text_ids,
        width=inferred["dim"],
        num_layers=inferred["depth"],
        num_heads=heads,
        head_size=head_size,
        masks=masks,
        sparse_layers=layers_of_kind("sparse", hparams, len(network.layers)),
        gmlp_layers=gmlps,
        positions="rotary" if rotary else "axial",
        padding="learned" if text_ids > text_vocab else "masked",
        padding_id=hparams.number("padding_id", least=0),
        shift_tokens=network.shifts,
        layer_scale="scale" in first[0],
        norm="rms" if "norm.g" in first[0] else "layer",
        sandwich_norm=inferred["sandwich_norm"],
        divide_by_max=hparams.flag("stable"),
        reversible=network.reversible,
        tied_embeddings=tied,
        shared_attention=_numbers([attention for attention, _ in network.layers]),
        shared_mlp=_numbers([mlp for _, mlp in network.layers]),
    )
    notes = {
        "text_vocab": hparams.origin("num_text_tokens"),
        "num_heads": hparams.origin("heads"),
        "head_size": hparams.origin("dim_head"),
        "masks": about_masks,
        "divide_by_max": hparams.origin("stable"),
        "padding_id": hparams.origin("padding_id"),
    }
    if config.sparse_layers:
        notes["sparse_layers"] = f"{hparams.origin('attn_types')}; all read the blocks of the first, as with DeepSpeed"
    if rotary:
        notes["text_length"] = hparams.origin("text_seq_len")
    return config, notes


def _grid(network: Network, text_length: int) -> tuple[int, int]:
    """Rows and columns of the code grid."""
    if ANGLES not in network.outside:
        sides = [network.outside.get(_axial_name(network, axis)) for axis in (0, 1)]
        if any(side is None or len(side.shape) != 4 for side in sides):
            raise WeightFileError("it has neither rotary nor axial positions of the image")
        return sides[0].shape[1], sides[1].shape[2]  # type: ignore[union-attr]
    shape = network.outside[ANGLES].shape
    rows = shape[-2] if len(shape) > 1 else 0
    for cells in (rows - text_length - 1, rows - text_length):  # the last row came with version 1.1.2
        if cells > 0 and math.isqrt(cells) ** 2 == cells:
            return math.isqrt(cells), math.isqrt(cells)
    raise WeightFileError(f"{ANGLES} has {rows} rows, which are not text_seq_len {text_length} and a square grid")


def _numbers(branches: Sequence[Tensors]) -> tuple[int, ...]:
    """Number of each attention or MLP, equal where all its matrices are the same in the file; none if no two are."""
    seen: dict[tuple[tuple[int, int], ...], int] = {}
    matrices = [[branch[name] for name in (*_MATRICES, *_GMLP) if name in branch] for branch in branches]
    places = [tuple((id(tensor.storage), tensor.start) for tensor in tensors) for tensors in matrices]
    numbers = tuple(seen.setdefault(place, len(seen)) for place in places)
    return numbers if len(seen) < len(numbers) else ()


def _refuse_deepspeed(location: Location) -> None:
    """Raises `WeightFileError` where there is DeepSpeed's auxiliary file without the weights."""
    for checkpoint in location.checkpoints:
        content = checkpoint.content
        if isinstance(content, Mapping) and isinstance(content.get("weights"), str) and "hparams" in content:
            raise WeightFileError(
                f"{checkpoint.path} is what DALLE-pytorch writes beside DeepSpeed's partitions, without weights: join "
                "these with DeepSpeed's zero_to_fp32.py, which lies among them, and give its output together with "
                f"{checkpoint.path.name}"
            )
