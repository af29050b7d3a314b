"""Shards and replicas, bytes sent, and PowerSGD."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from dalle_zoo.models.prior import PriorConfig
from dalle_zoo.planning.collectives import collectives
from dalle_zoo.planning.parameters import held
from dalle_zoo.planning.prior import PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import OPTIONS, Sharding, factors_of, sharding_of
from dalle_zoo.training.powersgd import compresses
from dalle_zoo.training.strategies import STRATEGIES

SMALL = PriorWorkload(PriorConfig(width=256, num_layers=4, num_heads=4))
PAPER = PriorWorkload(PriorConfig())


def sent(setup: Setup, work: PriorWorkload = SMALL, **options: Any) -> dict[str, tuple[float, float]]:
    """Bytes inside the node and to others by name."""
    return {c.name: (c.intra, c.inter) for c in collectives(work, setup, **options)}


def test_strategies_and_options_are_those_of_training() -> None:
    assert set(OPTIONS) - {"auto"} == set(STRATEGIES)
    for name, factory in STRATEGIES.items():
        parameters = inspect.signature(factory).parameters
        assert set(OPTIONS[name]) == set(parameters), name
        if "wire_bits" in parameters:
            assert parameters["wire_bits"].default == Sharding.wire_bits


@pytest.mark.parametrize(
    ("strategy", "devices", "nodes", "shards", "replicas"),
    [
        ("auto", 8, 2, (1, 1), (8, 2)),
        ("ddp", 8, 128, (1, 1), (8, 128)),
        ("fsdp2", 8, 2, (8, 2), (1, 1)),
        ("hsdp", 8, 2, (8, 1), (1, 2)),
        ("hsdp(shard_size=0)", 8, 2, (8, 1), (1, 2)),
        ("hsdp(shard_size=4)", 8, 2, (4, 1), (2, 2)),
        ("hsdp(shard_size=16)", 8, 4, (8, 2), (1, 2)),
        ("hsdp_powersgd(rank=896)", 8, 128, (8, 1), (1, 128)),
    ],
)
def test_groups_of_shards_and_replicas(
    strategy: str, devices: int, nodes: int, shards: tuple[int, int], replicas: tuple[int, int]
) -> None:
    sharding = sharding_of(strategy, devices, nodes)
    assert (sharding.shards.per_node, sharding.shards.nodes) == shards
    assert (sharding.replicas.per_node, sharding.replicas.nodes) == replicas
    assert sharding.shards.size * sharding.replicas.size == devices * nodes


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("hsdpp", "unknown strategy 'hsdpp'. Did you mean 'hsdp'"),
        ("hsdp(shard=8)", "unknown option of hsdp 'shard'. Did you mean 'shard_size'"),
        ("hsdp(shard_size=3)", "shard_size 3 does not divide 2 x 8 GPUs .* choose one of 1, 2, 4, 8, 16"),
        ("hsdp_powersgd", r"hsdp_powersgd needs a rank, such as hsdp_powersgd\(rank=896\)"),
        ("hsdp_powersgd(rank=900)", "must be a multiple of 8: try rank=896"),
        ("hsdp_powersgd(rank=0)", "must be a multiple of 8: try rank=8"),
        ("hsdp_powersgd(rank=8, wire_bits=8)", "wire_bits must be 16 or 32, got 8"),
        ("hsdp(8)", "an option of 'hsdp' is written"),
    ],
)
def test_unknown_or_invalid_strategies_raise(strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharding_of(strategy, 8, 2)


def test_one_gpu_sends_nothing() -> None:
    for strategy in ("auto", "ddp", "fsdp2", "hsdp"):
        assert sent(Setup(devices=1, strategy=strategy)) == {}


def test_all_reduce_of_a_ring() -> None:
    gradients = 4 * held(SMALL.parameters)
    for devices, nodes in ((8, 1), (1, 8), (8, 4)):
        ((intra, inter),) = sent(Setup(devices=devices, nodes=nodes, strategy="ddp")).values()
        world = devices * nodes
        assert intra + inter == pytest.approx(2 * (world - 1) / world * gradients)
        assert (inter == 0) == (nodes == 1)
        assert inter == pytest.approx(2 * gradients / devices * (nodes - 1) / nodes)


def test_sharding_gathers_blocks_twice_and_scatters_gradients_once() -> None:
    found = sent(Setup(devices=8, strategy="fsdp2", precision="bf16-mixed"))
    everything = held(SMALL.parameters)
    inside = held(p for p in SMALL.parameters if p.unit != "root")
    share = 7 / 8
    assert found["all-gather of weights, forward"] == (2 * inside * share, 0)
    assert found["all-gather of weights, backward"] == (2 * inside * share, 0)
    assert found["all-gather of weights outside the blocks"] == (4 * (everything - inside) * share, 0)
    assert found["reduce-scatter of gradients"] == (4 * everything * share, 0)
    assert len(found) == 4


def test_accumulated_passes_gather_again_but_ddp_averages_once() -> None:
    for strategy, times in (("fsdp2", 3), ("ddp", 1)):
        once, thrice = (sent(Setup(devices=4, strategy=strategy, accumulate=n)) for n in (1, 3))
        for name, (intra, _) in once.items():
            assert thrice[name][0] == pytest.approx(times * intra)


@pytest.mark.parametrize(("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_compression_rates_of_table_1(width: int, rank: int, percent: int) -> None:
    work = PriorWorkload(PriorConfig(width=width, num_heads=width // 64))
    factors = factors_of(work.parameters, 8, rank // 8)
    assert round(100 * factors.compression) == percent
    assert factors.compression == pytest.approx(1 - 5 * rank / (8 * width))  # table 2 for 8 GPUs per node
    d, m, r = width, 8, rank
    assert factors.matrices == 64 * 12 * d * d // m
    assert factors.left + factors.right == 64 * ((5 * d * r * m + 4 * d * r) + (d * r * m + 8 * d * r)) // m**2


def test_powersgd_sends_less_to_other_nodes() -> None:
    setup = Setup(devices=8, nodes=128, strategy="hsdp_powersgd(rank=896)", precision="16-resblock")
    compressed, uncompressed = sent(setup, PAPER), sent(setup, PAPER, compress=False)
    factors = factors_of(PAPER.parameters, 8, 112)
    ring = 2 * 127 / 128
    assert compressed["all-reduce of P and R"] == (0, pytest.approx(4 * ring * (factors.left + factors.right)))
    assert compressed["all-reduce of the rest"] == (0, pytest.approx(4 * ring * factors.uncompressed))
    assert uncompressed["all-reduce of gradients"] == (0, pytest.approx(4 * ring * held(PAPER.parameters, 8)))
    halved = sent(Setup(devices=8, nodes=128, strategy="hsdp_powersgd(rank=896, wire_bits=16)"), PAPER)
    assert halved["all-reduce of P and R"][1] == pytest.approx(compressed["all-reduce of P and R"][1] / 2)


def test_matrices_below_the_rank_are_not_compressed_as_in_training() -> None:
    for shards, rank in ((1, 16), (8, 16), (8, 28), (8, 40)):
        compressed = 0
        for p in SMALL.parameters:
            sides = p.matrices(shards)
            compressed += p.count * sum(rows * columns for rows, columns in sides if compresses((rows, columns), rank))
        factors = factors_of(SMALL.parameters, shards, rank)
        assert factors.matrices == compressed
        assert factors.matrices + factors.uncompressed == held(SMALL.parameters, shards)
        assert (factors.too_small > 0) == (rank == 40)


def test_a_rank_that_compresses_nothing_raises() -> None:
    with pytest.raises(ValueError, match=r"rank 1600 is too large to compress any matrix.* take at most rank=\d+"):
        factors_of(SMALL.parameters, 8, 200)
