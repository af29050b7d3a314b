"""GPUs and their interconnects, from ``hardware.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dalle_zoo.registry import UnknownNameError, suggest

MFU = 0.4
"""Default share of the GPU's peak rate, which large transformers reach."""
CPU = "cpu"
"""Name of this machine's CPU, whose rates are measured, among the GPUs of a plan."""
TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU in a typical node."""

    name: str
    memory: float
    """Memory, GiB."""
    tflops: Mapping[str, float]
    """Peak rate by dtype of the product, 10^12 operations per second."""
    bandwidth: float
    """Memory bandwidth, GB/s."""
    intra: float
    """Bandwidth of one GPU to others in its node, in one direction, GB/s."""
    inter: float
    """Bandwidth of one node to other nodes, in one direction, GB/s."""
    source: str


@cache
def known_gpus() -> Mapping[str, GPU]:
    """Returns all GPUs by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: GPU(name=name, **row) for name, row in table.items()}


def recognize_gpu(name: str, memory: float) -> GPU | None:
    """Returns the known GPU that a driver describes; None if there is none.

    Args:
        name: Name that the driver reports, such as "NVIDIA H100 80GB HBM3". The slower PCIe and NVL forms of GPUs
            that the table has as SXM are not known.
        memory: Its memory, GiB, which drivers report up to 10 % below the nominal size.

    Example:
        >>> recognize_gpu("NVIDIA A100-SXM4-80GB", 79.2).name, recognize_gpu("NVIDIA A100-SXM4-40GB", 39.4).name
        ('a100-80gb', 'a100-40gb')
        >>> recognize_gpu("NVIDIA A1000", 8) is None
        True
    """
    words = re.findall(r"[a-z]+\d*s?", name.lower().replace("rtx ", "rtx"))
    slower = {"pcie", "nvl"} & set(words)
    for gpu in known_gpus().values():
        named = gpu.name.partition("-")[0] in words and not (slower and "SXM" in gpu.source)
        if named and 0.9 * gpu.memory <= memory <= 1.05 * gpu.memory:
            return gpu
    return None


def find_gpu(name: str) -> GPU:
    """Returns a GPU by name.

    Raises:
        UnknownNameError: The name is unknown; the message suggests the closest. It is also a `ValueError`.
    """
    gpus = known_gpus()
    if name not in gpus:
        raise UnknownNameError(suggest("GPU", name, [*gpus, CPU]))
    return gpus[name]
