"""Tensors of DALLE-pytorch's priors: sorted by layer, and translated to native names.

The nesting of modules, and so the names of tensors, depends on the version and on the options:

| versions | attention of layer i, below ``transformer.layers.layers.i.0`` | its MLP, below ``….i.1`` |
|---|---|---|
| 0.1 to 0.7 | ``fn.to_qkv`` | ``fn.net.0`` |
| 0.8 to 0.14 | ``fn.fn.to_qkv`` | ``fn.fn.net.0`` |
| 1.0 to 1.2, shifted tokens | ``fn.fn.fn.to_qkv`` | ``fn.fn.fn.net.0`` |
| from 1.4 | ``fn.fn.fn.to_qkv`` | ``fn.fn.net.0`` |
| from 1.4, shifted tokens | ``fn.fn.fn.fn.fn.to_qkv`` | ``fn.fn.fn.fn.net.0`` |

Reversible layers are ``transformer.layers.blocks.i.f.net`` and ``….g.net``. A gMLP block has ``proj_in.0`` instead of
``to_qkv``; block-sparse attention also has a layout, ``attn_fn.master_layout``. Names are therefore recognized by
their end, and the number of wrappers determines two options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dalle_zoo.convert.lazy import DerivedTensor
from dalle_zoo.convert.pickles import WeightFileError
from dalle_zoo.convert.stored import Checkpoint, StoredTensor, Tensors
from dalle_zoo.models.external.dalle_pytorch_config import DallePytorchConfig
from dalle_zoo.models.external.dalle_pytorch_layers import cos_sin, rotary_size
from dalle_zoo.models.external.dalle_pytorch_sparse import BLOCK, fixed_blocks, random_blocks
from dalle_zoo.weights import Lazy

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
"""Tensors of a branch that are never shared: external and native names."""
_MATRICES = {
    "to_qkv.weight": "qkv.weight", "to_out.0.weight": "output.weight", "to_out.0.bias": "output.bias",
    "net.0.weight": "hidden.weight", "net.0.bias": "hidden.bias",
    "net.3.weight": "output.weight", "net.3.bias": "output.bias",
}  # fmt: skip
"""Tensors that several layers may share: external and native names."""
_GMLP = {
    "proj_in.0.weight": "hidden.weight", "proj_in.0.bias": "hidden.bias", "sgu.norm.weight": "norm.weight",
    "sgu.norm.bias": "norm.bias", "sgu.weight": "weight", "sgu.bias": "bias", "proj_out.weight": "output.weight",
    "proj_out.bias": "output.bias",
}  # fmt: skip
"""Tensors of a gMLP block: external names of the latest version, and native names."""
_GMLP_BEFORE = {
    "0.weight": "proj_in.0.weight", "0.bias": "proj_in.0.bias", "2.norm.weight": "sgu.norm.weight",
    "2.norm.bias": "sgu.norm.bias", "2.proj.weight": "sgu.proj.weight", "2.proj.bias": "sgu.proj.bias",
    "3.weight": "proj_out.weight", "3.bias": "proj_out.bias",
}  # fmt: skip
"""Names in g-mlp-pytorch up to 0.0.15, and the later ones. The matrix over positions moved from ``sgu.proj`` to
``sgu`` in 0.1.0; the old one stayed, unused, until 0.1.2."""


def transformer_in(checkpoint: Checkpoint) -> Tensors | None:
    """Returns the prior in a file, without prefix and image tokenizer; None if there is none."""
    for name in checkpoint.tensors:
        if name.endswith(HEAD):
            tensors = checkpoint.state_dict(name.removesuffix(HEAD))
            branches = [match["part"] for other in tensors if (match := _BRANCH.fullmatch(other))]
            if "net.3.weight" in branches:
                return {name: tensor for name, tensor in tensors.items() if not name.startswith("vae.")}
    return None


@dataclass(frozen=True)
class Network:
    """Stored tensors of a prior, sorted by layer."""

    outside: Tensors
    """Tensors outside the layers, under external names."""
    layers: Sequence[tuple[Tensors, Tensors]]
    """Tensors of attention and MLP of every layer, by the end of their names."""
    wrappers: tuple[int, int]
    """Number of modules that wrap attention and MLP."""
    reversible: bool
    """Whether the layers are reversible."""

    @property
    def shifts(self) -> bool:
        """Whether tokens are shifted: there is one wrapper more than normalization and scale need."""
        return self.wrappers[1] > 1 + ("scale" in self.layers[0][1])

    @property
    def caches(self) -> bool:
        """Whether attention has the wrapper that caches keys and values, which was added in version 1.4."""
        return self.wrappers[0] > self.wrappers[1]

    def matrix(self, name: str) -> StoredTensor:
        """Returns a tensor outside the layers that must have two dimensions."""
        tensor = self.outside.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise WeightFileError(f"it has no matrix {name}")
        return tensor


def sort_tensors(stored: Tensors) -> Network:
    """Sorts tensors by layer and branch.

    Raises:
        WeightFileError: Layers are missing or of an unsupported kind.
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
            "its layers must be numbered 0, 1, ..., each with the matrices to_qkv (or proj_in of gMLP) and net.0"
        )
    depths = (max(wrappers[name] for name in inputs if name), wrappers["net.0.weight"])
    return Network(outside, [layers[number] for number in range(len(layers))], depths, reversible)


def _input(attention: Tensors) -> str | None:
    """Returns the name of the first matrix of an attention or gMLP block; None if there is none."""
    names = ("to_qkv.weight", "proj_in.0.weight")
    return next((name for name in names if name in attention and len(attention[name].shape) == 2), None)


def translated(network: Network, config: DallePytorchConfig) -> dict[str, Lazy]:
    """Returns all tensors under native names.

    Raises:
        WeightFileError: A tensor is missing or unexpected.
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
        if config.tied_embeddings:  # they repeat the head
            for kind in ("weight", "bias"):
                take(f"{what}_emb.linear.{kind}")
        else:
            native[f"{what}_embedding.weight"] = take(f"{what}_emb.weight")
    if config.positions == "rotary":
        native["rotation"] = _rotation(take(ANGLES), config)
    else:
        native["text_position.weight"] = take("text_pos_emb.weight")
        for axis, (native_name, size) in enumerate((("row", config.image_height), ("column", config.image_width))):
            native[f"{native_name}_position.weight"] = _reshaped(take(axial_name(network, axis)), (size, d))
    if config.sparse_layers:
        native["blocks"] = _blocks(network.layers[config.sparse_layers[0]][0].get(LAYOUT), config)
    for index, branches in enumerate(network.layers):
        shared = (config.shared_attention, config.shared_mlp)
        for kind, parts, numbers in zip(("attention", "mlp"), branches, shared, strict=True):
            for name, tensor in parts.items():
                if name in _MATRICES:
                    native.setdefault(f"{kind}s.{(numbers or range(index + 1))[index]}.{_MATRICES[name]}", tensor)
                elif name in _GMLP and index in config.gmlp_layers:
                    native[f"attentions.{index}.{_GMLP[name]}"] = _mixing(tensor, name, config.input_length)
                elif name == LAYOUT and index in config.sparse_layers:
                    pass  # the layout of the first such layer is used for all
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
        raise WeightFileError(f"it has {', '.join(list(left)[:5])} in addition, which no version of the original has")
    return native


def _blocks(stored: StoredTensor | None, config: DallePytorchConfig) -> DerivedTensor:
    """Returns the layout of block-sparse attention, taken from the first layer that has it."""
    count = config.input_length // BLOCK
    if stored is None:
        if random_blocks(config.input_length):
            raise WeightFileError(
                f"its block-sparse layers lack {LAYOUT}, and some of the blocks they attend to were sampled at random"
            )
        return DerivedTensor((count, count), torch.float32, lambda: fixed_blocks(config.input_length))
    if stored.shape != (config.num_heads, count, count):
        raise WeightFileError(f"{LAYOUT} has shape {stored.shape}, expected {(config.num_heads, count, count)}")

    def read() -> torch.Tensor:
        layout = (stored.read() != 0).float()
        if not (layout == layout[0]).all() or not layout[0].diagonal().all():
            raise WeightFileError(f"{LAYOUT} must be the same for all heads, and every block must attend to itself")
        return layout[0].clone()

    return DerivedTensor((count, count), torch.float32, read)


def _mixing(tensor: StoredTensor, name: str, length: int) -> Lazy:
    """Returns a tensor of a gMLP block; most versions have dimensions of size 1 around the matrix over positions."""
    shape = {"sgu.weight": (length, length), "sgu.bias": (length,)}.get(name)
    return tensor if shape is None else _reshaped(tensor, shape)


def count_unused(stored: Tensors) -> dict[str, int]:
    """Counts tensors that are not converted: logits mask, layouts after the first, unused matrices of gMLP blocks."""
    counts = {
        "logits_mask": sum(name == "logits_mask" for name in stored),
        LAYOUT: max(sum(name.endswith(LAYOUT) for name in stored) - 1, 0),
        "sgu.proj": sum(name.replace("sgu.proj.", "sgu.") in stored for name in stored if "sgu.proj." in name),
    }
    return {name: count for name, count in counts.items() if count}


def axial_name(network: Network, axis: int) -> str:
    """Returns the name of the table of rows (axis 0) or columns (1); the package that makes it renamed it once."""
    names = [f"image_pos_emb.weights{mark}{axis}" for mark in "_."]
    return next((name for name in names if name in network.outside), names[0])


def _reshaped(tensor: StoredTensor, shape: tuple[int, ...]) -> DerivedTensor:
    if math.prod(shape) != tensor.num_elements:
        raise WeightFileError(
            f"a tensor of shape {tensor.shape} should have the shape {shape}, except for dimensions of size 1"
        )
    return DerivedTensor(shape, tensor.dtype, lambda: tensor.read().view(shape))


def _gain(tensor: StoredTensor, width: int) -> Lazy:
    """Returns the gains of RMS normalization; version 0.5 has a single one, relative to the L2 norm."""
    if tensor.shape != (1,) or width == 1:
        return tensor
    return DerivedTensor((width,), tensor.dtype, lambda: tensor.read().expand(width) / math.sqrt(width))


def _rotation(angles: StoredTensor, config: DallePytorchConfig) -> DerivedTensor:
    """Returns cosines and sines of the angles in the file; versions and dtypes computed angles in different ways.

    The result is float32 for every dtype of the angles: rounding cosines is harmless, rounding angles up to 8,192 is
    not.
    """
    length, size = config.layout.length, rotary_size(config.head_size)
    rows = angles.num_elements // max(size, 1)
    if angles.shape[-2:] != (rows, size) or rows not in (length - 1, length):
        raise WeightFileError(f"{ANGLES} has shape {angles.shape}, expected ({length}, {size})")

    def read() -> torch.Tensor:
        table = angles.read().float().view(rows, size)
        # Versions before 1.1.2 lack the last row, which is never used.
        return cos_sin(torch.cat([table, table[-1:]])[:length])

    return DerivedTensor((2, length, size), torch.float32, read)


def shared_numbers(branches: Sequence[Tensors]) -> tuple[int, ...]:
    """Returns an index per attention or MLP, the same for shared matrices; empty if none are shared."""
    seen: dict[tuple[tuple[int, int], ...], int] = {}
    matrices = [[branch[name] for name in (*_MATRICES, *_GMLP) if name in branch] for branch in branches]
    places = [tuple((id(tensor.storage), tensor.start) for tensor in tensors) for tensors in matrices]
    numbers = tuple(seen.setdefault(place, len(seen)) for place in places)
    return numbers if len(seen) < len(numbers) else ()
