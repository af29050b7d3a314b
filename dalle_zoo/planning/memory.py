"""Bytes on one GPU when it is fullest, and in the memory of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dalle_zoo.planning.formats import FLOAT32, GIB, SIXTEEN
from dalle_zoo.planning.parameters import ROOT, held, unit_sizes
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import factors_of
from dalle_zoo.planning.work import Bytes, Work

PROCESS = 4.0 * GIB
"""Assumed of the node's memory for every process: Python, torch, CUDA and its loaders."""
CHUNK = 2**25
"""Values that the optimizer updates together, `dalle_zoo.training.optimizer.CHUNK`."""


FORWARD, BACKWARD, STEP = "end of the forward pass", "backward pass", "step of the optimizer"
VALIDATION = "validation"


@dataclass(frozen=True)
class Memory:
    """Bytes by kind, and by the moments at which a GPU may be fullest."""

    held: Bytes
    """There at every moment."""
    moments: Mapping[str, Bytes]
    """Beside it."""
    reserve: float
    host: Bytes
    """Memory of a node."""

    @property
    def fullest(self) -> str:
        """The moment that decides."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def total(self) -> float:
        """Bytes on the GPU when it is fullest."""
        return sum(self.held.values()) + sum(self.moments[self.fullest].values()) + self.reserve


def memory_of(work: Work, setup: Setup, reserve: float | None = None) -> Memory:
    """Memory of a stage of training.

    Args:
        work: What the stage asks for.
        setup: How it is trained.
        reserve: Bytes of the GPU that are not for tensors. Defaults to what the formats assume.
    """
    f, recompute = setup.formats, setup.recompute
    held = _held(work, setup)
    retained = {**work.retained(setup.batch, f, recompute), **_early(work, setup)}
    briefly = work.in_backward(setup.batch, f, recompute)
    largest = max(briefly, key=lambda name: briefly[name])
    forward = {
        **_copies(work, setup, complete=True),
        **_gathered(work, setup),
        **retained,
        **work.at_step(setup.batch, f),
    }
    backward = {
        **_copies(work, setup, complete=not recompute),
        **_gathered(work, setup),
        **_unsharded(work, setup),
        **retained,
    }
    if setup.accumulate == 1:
        # Gradients of the last step are dropped before the backward pass: while new ones come, activations go.
        backward["gradients to come, in the place of activations"] = -min(held["gradients"], sum(retained.values()))
    backward[largest] = briefly[largest]
    moments = {FORWARD: forward, BACKWARD: backward, STEP: _step(work, setup)}
    if setup.average == "gpu":  # the weights wait while their average is in their place; no activation is kept
        waiting = {"weights, while their average is used": _weights(work, setup)}
        moments[VALIDATION] = {**waiting, **_gathered(work, setup), **_copies(work, setup, complete=False)}
    return Memory(held, moments, f.reserve if reserve is None else reserve, _host(work, setup))


def _split(work: Work, shards: int) -> tuple[int, int]:
    """Elements on one GPU in branches, and outside."""
    inside = held((p for p in work.parameters if p.unit != ROOT), shards)
    return inside, held(work.parameters, shards) - inside


def _weights(work: Work, setup: Setup) -> float:
    inside, outside = _split(work, setup.spread.shards.size)
    return inside * setup.formats.matrix + outside * setup.formats.other


def _averaged(work: Work, setup: Setup) -> float:
    """Float32 whatever the weights are; those of the paper are in their formats."""
    return _weights(work, setup) if setup.paper_formats else FLOAT32 * held(work.parameters, setup.spread.shards.size)


def _held(work: Work, setup: Setup) -> Bytes:
    spread, f = setup.spread, setup.formats
    inside, outside = _split(work, spread.shards.size)
    # Where an error buffer takes gradients in, they have no memory of their own.
    gradient = f.matrix if f.matrix_gradient == 0 and spread.rank is None else f.matrix_gradient
    kinds = {
        "weights": _weights(work, setup),
        "gradients": inside * gradient + outside * f.other_gradient,
        "AdamW moments": inside * f.matrix_moments + outside * f.other_moments,
    }
    if setup.average == "gpu":
        kinds["averaged weights"] = _averaged(work, setup)
    if spread.rank is not None:
        factors = factors_of(work.parameters, spread.shards.size, spread.rank)
        kinds["PowerSGD error buffers"] = factors.matrices * f.error
        kinds["PowerSGD fixed Q"] = factors.right * f.factor
    if setup.buckets:
        kinds["buckets of gradients"] = kinds["gradients"]
    return kinds


def _copies(work: Work, setup: Setup, complete: bool) -> Bytes:
    """Copies that autocast makes of weights; where blocks are gathered in 16 bits, only of heads.

    Args:
        work: What the stage asks for.
        setup: How it is trained.
        complete: Whether those of all blocks are there, or of the one at work.
    """
    f = setup.formats
    cast: dict[str, float] = {}
    for p in work.parameters:
        bytes_at_work, stored = (f.head, f.other) if p.unit == ROOT else (f.compute, f.matrix)
        if p.autocast and bytes_at_work < stored and (p.unit == ROOT or not setup.gathers):
            cast[p.unit] = cast.get(p.unit, 0) + p.total * bytes_at_work
    root = cast.pop(ROOT, 0.0)
    if setup.precision == "16-resblock" and setup.recompute:
        complete = False  # it keeps no copy beyond its use
    sizes = unit_sizes(work.parameters)
    blocks = sum(cast.values()) if complete else max((sizes[unit] * f.compute for unit in cast), default=0.0)
    return {"16-bit copies of weights": root + blocks} if root + blocks else {}


def _gathered(work: Work, setup: Setup) -> Bytes:
    """Complete weights of what is at work."""
    if not setup.gathers:
        return {}
    sizes = unit_sizes(work.parameters)
    root = sizes.pop(ROOT)
    # The block at work and the one that is fetched ahead; attention and MLP take turns.
    kinds = {"gathered: this block and the next": sum(sizes.values()) * setup.formats.compute}
    if not setup.paper_formats:  # where what lies outside the blocks is not gathered beside them
        kinds["gathered: outside the blocks"] = root * setup.formats.other
    return kinds


def _early(work: Work, setup: Setup) -> Bytes:
    """Gradients that the forward pass leaves; the paper's did not."""
    early = sum(p.total for p in work.parameters if p.early)
    return {"gradients of the heads, float32": early * FLOAT32} if early and not setup.paper_formats else {}


def _unsharded(work: Work, setup: Setup) -> Bytes:
    """Complete gradients, before they are split into shards."""
    if not setup.gathers:
        return {}
    sizes = unit_sizes(p for p in work.parameters if not p.early)
    root = sizes.pop(ROOT)
    largest, f = max(sizes.values()), setup.formats
    if setup.paper_formats:  # which scatters them as they are
        return {"complete gradients: one block": largest * f.compute}
    # They are summed in a float32 copy.
    return {
        "complete gradients: one block": largest * (f.compute + FLOAT32),
        "complete gradients: outside": root * f.other,
    }


def _step(work: Work, setup: Setup) -> Bytes:
    spread, f = setup.spread, setup.formats
    # Exchange and update come one after the other.
    moments = {"AdamW: arrays of the step": _optimizer(work, setup)}
    if spread.rank is None:
        return moments
    factors = factors_of(work.parameters, spread.shards.size, spread.rank)
    exchange = 2 * (factors.left + factors.right) * f.factor + factors.uncompressed * FLOAT32
    if f.matrix_gradient == SIXTEEN:  # the sums of gradients and errors are float32
        exchange += factors.matrices * FLOAT32
    return max(
        moments,
        {"PowerSGD: P and R, twice, and what is sent uncompressed": exchange},
        key=lambda kinds: sum(kinds.values()),
    )


def _optimizer(work: Work, setup: Setup) -> float:
    """Torch's fused AdamW needs nothing; ours updates a chunk at a time."""
    arrays = 4 if setup.moments != "float32" else 2 if setup.clips_variance else 0
    shards = setup.spread.shards.size
    largest = max(math.prod(p.shard_shape(shards)) for p in work.parameters)
    return arrays * FLOAT32 * min(max(CHUNK, largest), held(work.parameters, shards))


def _host(work: Work, setup: Setup) -> Bytes:
    kinds = {"processes": setup.devices * PROCESS}
    if setup.average == "host":
        kinds["averaged weights"] = setup.devices * _averaged(work, setup)
    return kinds
