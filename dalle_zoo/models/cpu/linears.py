"""Linear layers with packed matrices, for the few rows of a decoding step on a CPU.

With few rows, PyTorch's matrix product reaches only a half to two thirds of the memory bandwidth, because the matrix
is stored in a layout for many rows. oneDNN has layouts for few rows. While a sampler runs, each packed matrix takes
the place of the plain one in memory; when it ends, the plain one is restored, equal in every bit. Both conversions
cost about as much as copying the weights.

Packing is not faster everywhere: `is_faster` says where. It is a rule and not a measurement, so that a machine always
computes a seed's image with the same rounding; `benchmarks/packing.py` measures what it is based on.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.cpu import onednn

SMALLEST = 2**18
"""Fewest values of a matrix that is packed, 512 x 512. The packed product takes longer to start, by some 10 us."""
MOST_ROWS = 64
"""Most rows for which matrices are packed. With more, the plain product makes better use of the processor."""


def is_faster(weight: Tensor, rows: int) -> bool:
    """Whether the packed product with a matrix is faster than the plain one.

    Args:
        weight: The matrix, (out, in).
        rows: Number of input rows.
    """
    # For one to three rows PyTorch calls a routine of Intel's library that is at its best on Intel's own processors.
    fewest = 4 if _is_intel() else 1
    return weight.numel() >= SMALLEST and fewest <= rows <= MOST_ROWS


@cache
def _is_intel() -> bool:
    info = Path("/proc/cpuinfo")
    vendor = info.read_text("utf-8", "replace")[:200] if info.is_file() else platform.processor()
    return "GenuineIntel" in vendor


class PackedLinear(nn.Module):
    """Takes the place of a plain linear layer while a sampler runs.

    Args:
        plain: The plain layer.
        rows: Number of input rows to pack for; other numbers give the same values more slowly.
        release: Whether the plain matrix is removed from memory while the packed one exists.
    """

    def __init__(self, plain: nn.Linear, rows: int, release: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.rows, self.releases, self.dtype = rows, release, plain.weight.dtype
        self.packed: Tensor | None = None  # packed on first use: sampling never runs the text head
        self._inference = plain.weight.is_inference()
        self._plain = (plain,)  # not a child, so that networks have no second name for it

    @property
    def plain(self) -> nn.Linear:
        """The plain layer; its matrix may be empty while the packed one exists."""
        return self._plain[0]

    @property
    def weight(self) -> Tensor:
        """The matrix, (out, in)."""
        return self.plain.weight if self.packed is None else self.packed.to_dense()

    @property
    def bias(self) -> Tensor | None:
        """The bias, (out,), or none."""
        return self.plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if x.dtype != self.dtype:  # happens only under autocast
            return F.linear(x, self.weight, self.bias)
        return onednn.linear(x, self._pack() if self.packed is None else self.packed, self.bias)

    def _pack(self) -> Tensor:
        with _LOCK:
            if self.packed is None:
                weight = self.plain.weight
                self.packed = onednn.reorder_linear(weight.detach(), self.rows)
                if self.releases:
                    weight.data = weight.new_empty(0)
                    _return_freed(self.packed)
            return self.packed

    def restore(self) -> None:
        """Gives the plain layer its matrix back, and removes the packed one."""
        if self.packed is not None and self.releases:
            # A sampler runs in inference mode, whose tensors could not be trained later; a matrix that was made in
            # inference mode must be one of them again.
            with torch.inference_mode(self._inference):
                self.plain.weight.data = self.packed.to_dense()


Replaced = tuple[PackedLinear, list[tuple[nn.Module, str]]]
"""A packed layer, and the modules that had the plain one as a child, with the name of the child."""


@dataclass
class _Packing:
    """The layers of a network that are replaced, and how many samplers run on it."""

    replaced: list[Replaced] = field(default_factory=list)
    samplers: int = 0


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
_LOCK = RLock()
_PACKINGS: WeakKeyDictionary[nn.Module, _Packing] = WeakKeyDictionary()


@contextmanager
def packed_linears(net: nn.Module, rows: int) -> Iterator[None]:
    """Replaces the linear layers of a network by packed ones for the length of a block.

    Within the block the network computes the same function, also in other threads, but does not list the weights of
    the replaced layers among its parameters. Only PyTorch's own linear layers in float32 or bfloat16 on the CPU are
    replaced, and only where that `is_faster`; none under autocast or where packing does not work. A matrix that shares
    its memory with another tensor stays in memory beside the packed one.

    Args:
        net: The network.
        rows: Number of rows of a decoding step, P * n. While samplers overlap, that of the first one counts.
    """
    if torch.is_autocast_enabled("cpu") or not onednn.linears_work():
        yield
        return
    with _LOCK:
        packing = _PACKINGS.setdefault(net, _Packing())
        packing.samplers += 1
    try:
        with _LOCK:
            if packing.samplers == 1:  # another one may be computing with the plain matrices
                _replace(net, rows, packing.replaced)
        yield
    finally:
        with _LOCK:
            packing.samplers -= 1
            if not packing.samplers:
                _restore(packing.replaced)


def _replace(net: nn.Module, rows: int, replaced: list[Replaced]) -> None:
    """Replaces the plain layers of a network and lists them."""
    names = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    users: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent in net.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and _is_plain(child) and is_faster(child.weight, rows):
                users.setdefault(child, []).append((parent, name))
    for plain, found in users.items():
        packed = PackedLinear(plain, rows, names[id(plain.weight)] == 1 and _fills_its_storage(plain.weight))
        replaced.append((packed, found))
        for parent, name in found:
            setattr(parent, name, packed)


def _restore(replaced: list[Replaced]) -> None:
    """Undoes `_replace`."""
    while replaced:
        packed, users = replaced[0]
        packed.restore()
        for parent, name in users:
            setattr(parent, name, packed.plain)
        plain = packed.plain
        del replaced[0], packed
        _return_freed(plain.weight)


def _return_freed(weight: Tensor) -> None:
    """Returns memory to the system that was freed along with a large matrix.

    The C library retains freed memory between other allocations, where the next matrix rarely fits: the weights would
    be in memory almost twice. Only glibc needs this call.
    """
    if weight.numel() * weight.element_size() >= 2**20 and _TRIM is not None:
        _TRIM(0)


def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer is PyTorch's own: not a subclass, quantized, sharded, hooked or with another ``forward``."""
    if type(module) is not nn.Linear or type(module.weight.data) is not Tensor:
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and onednn.computes_in(module.weight.dtype)


def _fills_its_storage(weight: Tensor) -> bool:
    """Whether no other tensor can be a view of the same memory, such as other weights of a sharded network."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
