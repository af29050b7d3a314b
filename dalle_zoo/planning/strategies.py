"""How a strategy distributes a network and its gradients over GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.specs import parse_spec

OPTIONS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "ddp": (),
    "ddp_powersgd": ("rank", "wire_bits"),
    "fsdp": (),
    "fsdp2": (),
    "hsdp": ("shard_size",),
    "hsdp_powersgd": ("rank", "shard_size", "wire_bits"),
}
"""Strategies of `dalle_zoo.training.strategies`, which imports Lightning, with their options. "auto" is ddp."""


@dataclass(frozen=True)
class Group:
    """GPUs of one collective, the same number on every participating node."""

    per_node: int
    nodes: int

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.per_node * self.nodes


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Shards and replicas of the network."""

    name: str
    shards: Group
    """GPUs that share one replica of the network."""
    replicas: Group
    """GPUs that hold the same shard."""
    rank: int | None
    """Rank of PowerSGD per shard; None without PowerSGD."""
    wire_bits: int = 32
    """Bits of a number of its factors in collectives."""

    def factors(self, parameters: tuple[Parameter, ...]) -> Factors | None:
        """Returns the sizes of PowerSGD's factors; None without PowerSGD."""
        return None if self.rank is None else factors_of(parameters, self.shards.size, self.rank)


def sharding_of(strategy: str, devices: int, nodes: int) -> Sharding:
    """Parses a strategy such as ``hsdp_powersgd(rank=896, shard_size=8)``.

    ``hsdp`` and ``hsdp_powersgd`` shard over the GPUs of a node unless ``shard_size`` is given, ``fsdp`` and ``fsdp2``
    over all. ``rank`` is the total over the shards: each is compressed at ``rank / shard_size`` (table 2).

    Args:
        strategy: Name, with options in parentheses.
        devices: GPUs per node.
        nodes: Number of nodes.

    Raises:
        UnknownNameError: The strategy or one of its options is unknown.
        ValueError: A size or rank does not fit the GPUs.
    """
    name, options = parse_spec(strategy, "strategy", "hsdp(shard_size=8)")
    if name not in OPTIONS:
        raise UnknownNameError(suggest("strategy", name, OPTIONS))
    for option in options:
        if option not in OPTIONS[name]:
            raise UnknownNameError(suggest(f"option of {name}", option, OPTIONS[name]))
    name = "ddp" if name == "auto" else name
    default = devices if name.startswith("hsdp") else 1 if name.startswith("ddp") else devices * nodes
    size = options.get("shard_size") or default  # 0 is the default, too
    _check_shards(size, devices, nodes)
    rank, wire_bits = options.get("rank"), options.get("wire_bits", 32)
    if wire_bits not in (16, 32):
        raise ValueError(f"wire_bits must be 16 or 32, got {wire_bits}")
    if name.endswith("powersgd"):
        if rank is None:
            raise ValueError(f"{name} needs a rank, such as {name}(rank=896): the paper's are 512, 640 and 896")
        if rank < size or rank % size:
            near = max(round(rank / size), 1) * size
            raise ValueError(
                f"rank {rank} is the total over {size} shards, so it must be a multiple of {size}: try rank={near}"
            )
        rank //= size
    inside = min(size, devices)
    shards = Group(inside, size // inside)
    replicas = Group(devices // inside, nodes // shards.nodes)
    return Sharding(name=name, shards=shards, replicas=replicas, rank=rank, wire_bits=wire_bits)


def _check_shards(size: int, devices: int, nodes: int) -> None:
    fits = size > 0 and devices * nodes % size == 0 and (devices % size == 0 or size % devices == 0)
    if not fits:
        sizes = [n for n in range(1, devices * nodes + 1) if devices * nodes % n == 0]
        good = [n for n in sizes if devices % n == 0 or n % devices == 0]
        raise ValueError(
            f"shard_size {size} does not divide {nodes} x {devices} GPUs into equal groups inside nodes or of "
            f"complete nodes: choose one of {', '.join(map(str, good))}"
        )


@dataclass(frozen=True)
class Factors:
    """Sizes of the low-rank factors that PowerSGD sends for the gradients of one GPU."""

    left: int
    """Elements of P: shorter side x rank."""
    right: int
    """Elements of R: longer side x rank; the fixed Gaussian Q has the same number."""
    matrices: int
    """Elements of the compressed matrices."""
    uncompressed: int
    """Elements of all other gradients."""
    too_small: int
    """Elements of uncompressed matrices that are smaller than their factors."""
    flops: int
    """Operations of two products, a Householder QR and the product of the factors; a multiply-add counts 2."""

    @property
    def compression(self) -> float:
        """Share of the compressed matrices that is not sent, as in table 1 of the paper."""
        return 1 - (self.left + self.right) / self.matrices


def factors_of(parameters: tuple[Parameter, ...], shards: int, rank: int) -> Factors:
    """Returns the factors of one GPU's shards.

    Args:
        parameters: All parameters.
        shards: GPUs over which they are sharded.
        rank: Rank per shard.

    Raises:
        ValueError: The rank compresses no matrix.
    """
    left = right = matrices = uncompressed = too_small = flops = 0
    for p in parameters:
        thin = [sides for sides in p.matrices(shards) if rank * sum(sides) < sides[0] * sides[1]]
        elements = p.count * sum(rows * columns for rows, columns in thin)
        matrices += elements
        uncompressed += p.held(shards) - elements
        too_small += p.held(shards) - elements if p.low_rank else 0
        for short, long in map(sorted, thin):
            left += p.count * short * rank
            right += p.count * long * rank
            flops += p.count * (6 * short * long * rank + 4 * short * rank**2)  # QR that forms its Q
    if not matrices:
        most = max(
            (rows * columns - 1) // (rows + columns) for p in parameters for rows, columns in p.matrices(shards)
        )
        raise ValueError(
            f"rank {rank * shards} is too large to compress any matrix of this network: P and Q would be larger than "
            f"the gradient; take at most rank={most * shards}"
        )
    return Factors(left, right, matrices, uncompressed, too_small, flops)
