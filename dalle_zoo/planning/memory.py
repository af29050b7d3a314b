"""Peak memory of one GPU, and memory of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dalle_zoo.planning.formats import FLOAT32, GIB, SIXTEEN
from dalle_zoo.planning.parameters import ROOT, Parameter, held, unit_sizes
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Bytes, Workload

PROCESS = 4.0 * GIB
"""Bytes of the node's memory assumed per process: Python, torch, CUDA and data loaders."""
CHUNK = 2**25
"""Values that the optimizer updates together, `dalle_zoo.training.optimizer.CHUNK`."""
MUON_ARRAYS = 4
"""Copies of the matrices of one shape that Muon's step needs: directions, their stack, and two of the iteration."""

FORWARD, BACKWARD, STEP = "end of the forward pass", "backward pass", "optimizer step"
VALIDATION = "validation"


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose, and by phase."""

    held: Bytes
    """Allocated in all phases."""
    phases: Mapping[str, Bytes]
    """Allocated in one phase, by phase."""
    reserve: float
    """Bytes that are not available to tensors."""
    host: Bytes
    """Memory of a node."""

    @property
    def fullest(self) -> str:
        """Phase with the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> float:
        """Bytes of the GPU at the peak."""
        return sum(self.held.values()) + sum(self.phases[self.fullest].values()) + self.reserve


def memory_of(work: Workload, setup: Setup, reserve: float | None = None) -> Memory:
    """Estimates the memory of a training stage.

    Args:
        work: The stage.
        setup: Training setup.
        reserve: Bytes of the GPU that are not available to tensors. Defaults to the value of the formats.
    """
    f, recompute = setup.formats, setup.recompute
    held = _held(work, setup)
    retained = {**work.retained(setup.batch, f, recompute), **_early(work, setup)}
    gathered = _gathered(work, setup)
    briefly = work.in_backward(setup.batch, f, recompute)
    largest = max(briefly, key=lambda name: briefly[name])
    forward = {**_casts(work, setup, all_blocks=True), **gathered, **retained, **work.at_loss(setup.batch, f)}
    casts = _casts(work, setup, all_blocks=not recompute)
    backward = {**casts, **gathered, **_unsharded(work, setup), **retained}
    if setup.accumulate == 1:
        # The gradients of the last step are freed before the backward pass: new ones replace freed activations.
        backward["gradients to come, in place of activations"] = -min(held["gradients"], sum(retained.values()))
    backward[largest] = briefly[largest]
    phases = {FORWARD: forward, BACKWARD: backward, STEP: _step(work, setup)}
    if setup.average == "gpu":  # the averaged weights replace the weights, which are copied; no activation is retained
        waiting = {"weights, while their average is used": _weights(work.trained, setup)}
        phases[VALIDATION] = {**waiting, **gathered, **_casts(work, setup, all_blocks=False)}
    return Memory(held, phases, f.reserve if reserve is None else reserve, _host(work, setup))


def _split(parameters: tuple[Parameter, ...], shards: int) -> tuple[int, int]:
    """Elements on one GPU in residual branches, and outside."""
    inside = held((p for p in parameters if p.unit != ROOT), shards)
    return inside, held(parameters, shards) - inside


def _weights(parameters: tuple[Parameter, ...], setup: Setup) -> float:
    inside, outside = _split(parameters, setup.sharding.shards.size)
    return inside * setup.formats.matrix + outside * setup.formats.other


def _averaged(work: Workload, setup: Setup) -> float:
    """Bytes of the averaged weights: float32 under any precision, the formats of the weights in the paper."""
    if setup.paper_formats:
        return _weights(work.trained, setup)
    return FLOAT32 * sum(_split(work.trained, setup.sharding.shards.size))


def _held(work: Workload, setup: Setup) -> Bytes:
    sharding, f = setup.sharding, setup.formats
    inside, outside = _split(work.trained, sharding.shards.size)
    # Gradients that are added directly to error buffers need no memory.
    gradient = f.matrix if f.matrix_gradient == 0 and sharding.rank is None else f.matrix_gradient
    kinds = {
        "weights": _weights(work.parameters, setup),
        "gradients": inside * gradient + outside * f.other_gradient,
        **_moments(work, setup, inside * f.matrix_moments + outside * f.other_moments),
    }
    if setup.average == "gpu":
        kinds["averaged weights"] = _averaged(work, setup)
    factors = sharding.factors(work.parameters)
    if factors is not None:
        kinds["PowerSGD error buffers"] = factors.matrices * f.error
        kinds["PowerSGD fixed Q"] = factors.right * f.factor
    if setup.buckets:
        kinds["gradient buckets"] = kinds["gradients"]
    return kinds


def _by_muon(work: Workload, setup: Setup) -> list[Parameter]:
    """Parameters that Muon updates: the matrices of the residual branches."""
    return [p for p in work.trained if setup.muon_iterations and p.low_rank]


def _moments(work: Workload, setup: Setup, of_adamw: float) -> Bytes:
    if not setup.muon_iterations:
        return {"AdamW moments": of_adamw}
    matrices = held(_by_muon(work, setup), setup.sharding.shards.size)
    return {
        "AdamW moments": of_adamw - matrices * setup.formats.matrix_moments,
        "Muon momentum": matrices * float(FLOAT32),
    }


def _casts(work: Workload, setup: Setup, all_blocks: bool) -> Bytes:
    """16-bit copies of weights that autocast makes; only those of heads if blocks are gathered in 16 bits.

    Args:
        work: The stage.
        setup: Training setup.
        all_blocks: Whether the copies of all blocks exist at once, or only those of the current block.
    """
    f = setup.formats
    cast: dict[str, float] = {}
    for p in work.parameters:
        computed, stored = (f.head, f.other) if p.unit == ROOT else (f.compute, f.matrix)
        if p.autocast and computed < stored and (p.unit == ROOT or not setup.gathers):
            cast[p.unit] = cast.get(p.unit, 0) + p.total * computed
    root = cast.pop(ROOT, 0.0)
    if setup.precision == "16-resblock" and setup.recompute:
        all_blocks = False  # it frees each copy after its use
    sizes = unit_sizes(work.parameters)
    blocks = sum(cast.values()) if all_blocks else max((sizes[unit] * f.compute for unit in cast), default=0.0)
    return {"16-bit copies of weights": root + blocks} if root + blocks else {}


def _gathered(work: Workload, setup: Setup) -> Bytes:
    """Unsharded weights of the current and the next block."""
    if not setup.gathers:
        return {}
    sizes = unit_sizes(work.parameters)
    root = sizes.pop(ROOT)
    # The next block is prefetched; attention and MLP alternate.
    kinds = {"gathered: this block and the next": sum(sizes.values()) * setup.formats.compute}
    if not setup.paper_formats:  # the paper does not gather the parameters outside the blocks
        kinds["gathered: outside the blocks"] = root * setup.formats.other
    return kinds


def _early(work: Workload, setup: Setup) -> Bytes:
    """Gradients that the forward pass computes; there are none with the formats of the paper."""
    early = sum(p.total for p in work.trained if p.early)
    return {"gradients of the heads, float32": early * FLOAT32} if early and not setup.paper_formats else {}


def _unsharded(work: Workload, setup: Setup) -> Bytes:
    """Gradients before the reduce-scatter."""
    if not setup.gathers:
        return {}
    sizes = unit_sizes(p for p in work.parameters if not p.early)
    root = sizes.pop(ROOT)
    largest, f = max(sizes.values()), setup.formats
    if setup.paper_formats:  # reduced in their own dtype
        return {"unsharded gradients: one block": largest * f.compute}
    # A float32 copy is reduced.
    return {
        "unsharded gradients: one block": largest * (f.compute + FLOAT32),
        "unsharded gradients: outside": root * f.other,
    }


def _step(work: Workload, setup: Setup) -> Bytes:
    """Buffers of the gradient exchange, of AdamW or of Muon, whichever are larger: one follows the other."""
    factors, f = setup.sharding.factors(work.parameters), setup.formats
    optimizers = [{"AdamW: arrays of the step": _optimizer(work, setup)}]
    if setup.muon_iterations:
        optimizers.append({"Muon: arrays of the step": _orthogonalization(work, setup)})
    optimizer = max(optimizers, key=lambda kinds: sum(kinds.values()))
    if factors is None:
        return optimizer
    size = 2 * (factors.left + factors.right) * f.factor + factors.uncompressed * FLOAT32
    if f.matrix_gradient == SIXTEEN:  # sums of gradients and errors are float32
        size += factors.matrices * FLOAT32
    exchange = {"PowerSGD: P and R, twice, and uncompressed": size}
    return max(optimizer, exchange, key=lambda kinds: sum(kinds.values()))


def _optimizer(work: Workload, setup: Setup) -> float:
    """Bytes of temporary arrays: none in torch's fused AdamW; `ClippedAdamW` updates a chunk at a time."""
    arrays = 4 if setup.moments != "float32" else 2 if setup.clips_variance else 0
    shards = setup.sharding.shards.size
    muon = _by_muon(work, setup)
    own = [p for p in work.trained if p not in muon]
    largest = max((math.prod(p.shard_shape(shards)) for p in own), default=0)
    return arrays * FLOAT32 * min(max(CHUNK, largest), held(own, shards))


def _orthogonalization(work: Workload, setup: Setup) -> float:
    """Bytes of Muon's temporary arrays: it updates all matrices of one shape together."""
    by_shape: dict[tuple[int, ...], int] = {}
    for p in _by_muon(work, setup):
        by_shape[p.shape] = by_shape.get(p.shape, 0) + p.total
    return MUON_ARRAYS * FLOAT32 * max(by_shape.values(), default=0)


def _host(work: Workload, setup: Setup) -> Bytes:
    kinds = {"processes": setup.devices * PROCESS}
    if setup.average == "host":
        kinds["averaged weights"] = setup.devices * _averaged(work, setup)
    return kinds
