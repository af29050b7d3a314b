"""Quantizes weights to 8 or 4 bits for sampling, by torchao: a token reads half or a quarter of the bytes of bfloat16.

The matrices of the layers are rounded, with one scale per row (int8) or per 32 weights of a row (int4). Embeddings,
norms and heads keep their precision, and sums are computed in the precision of the prior. Quantization changes the
images; `benchmarks/quantization.py` measures by how much.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dalle_zoo.registry import suggest

Bits = Literal["int8", "int4"]
GROUP = 32
"""Number of weights of a row that share a scale in int4."""


def quantize(net: nn.Module, bits: Bits) -> None:
    """Rounds the matrices of a network's layers in place; this cannot be undone.

    Args:
        net: The network, on its final device: on a GPU, int4 weights are packed for that kind of device and computed
            in bfloat16. On a CPU they are stored as bytes, which shows their effect on the images but needs as much
            memory as int8.
        bits: "int8" or "int4".

    Raises:
        ImportError: torchao is not installed.
        ValueError: The precision is unknown, or the network does not fit it.
    """
    check_quantization(bits)
    chosen = {name: module for name, module in net.named_modules() if _is_matrix(module, name)}
    weight = next(net.parameters())
    if bits == "int4":
        for name, module in chosen.items():
            if module.in_features % GROUP:
                raise ValueError(
                    f"int4 needs rows of a multiple of {GROUP} weights, {name} has {module.in_features}: use int8"
                )
        if weight.is_cuda and weight.dtype != torch.bfloat16:
            raise ValueError(f"int4 on a GPU needs a prior in bfloat16, got {weight.dtype}: pass dtype=torch.bfloat16")
    with _quiet():
        from torchao.quantization import quantize_

        quantize_(net, _config(bits, weight.is_cuda), filter_fn=lambda _, name: name in chosen)


def check_quantization(bits: Bits) -> None:
    """Raises the errors of `quantize` that do not depend on the network, before one is loaded."""
    if bits not in get_args(Bits):
        raise ValueError(suggest("quantization", str(bits), get_args(Bits)))
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(f"{bits} weights need torchao: pip install 'dalle-zoo[quantize]'")


def is_quantized(net: nn.Module) -> bool:
    """Whether `quantize` has rounded weights of the network."""
    return any(type(parameter.data) is not Tensor for parameter in net.parameters())


def _is_matrix(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("head")


def _config(bits: Bits, on_gpu: bool) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    # set_inductor_config would lower the precision of all float32 products of the process.
    if bits == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if on_gpu:
        return Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torchao reports on import about torch's registrations and libraries of other platforms."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
