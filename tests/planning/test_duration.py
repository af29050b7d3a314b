"""Operations, compared with PyTorch's counter, and seconds."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.planning.collectives import collectives
from dalle_zoo.planning.duration import duration_of, rates_of
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.hardware import GPU, find_gpu, known_gpus
from dalle_zoo.planning.memory import memory_of
from dalle_zoo.planning.prior import PriorWorkload
from dalle_zoo.planning.setup import Setup

CONFIG = PriorConfig(
    text_length=16, text_vocab=64, image_height=4, image_width=4, codebook_size=32, width=32, num_layers=3,
    num_heads=2, masks="row, full, column",
)  # fmt: skip
WORK = PriorWorkload(CONFIG)
GPU_OF_TEN = GPU(
    name="ten", memory=1, tflops={"float32": 1e-6, "float16": 1e-5}, bandwidth=1e-3, intra=1e-3, inter=1e-4, source=""
)


def tokens(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, 16, dtype=torch.int64), torch.zeros(batch, 4, 4, dtype=torch.int64)


def counted(net: Prior, batch: int) -> tuple[int, int]:
    """Operations of forward and backward pass by PyTorch's counter, which counts dense attention."""
    with FlopCounterMode(display=False) as forward:
        loss = net.loss(*tokens(batch)).total
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_of_the_prior_equal_the_counter(recompute: bool) -> None:
    net = Prior(CONFIG, "dense")
    for block in net.residual_blocks():
        block.residual.recompute = recompute
    forward, backward = counted(net, 2)
    flops = WORK.flops
    dense = 3 * 4 * 32**2 * CONFIG.width  # layers, both products of two operations, pairs, width
    more = dense - flops.forward["attention"]  # pairs that the mask forbids, which the counter includes
    # Gradients of the heads' inputs; the counter omits products that are added in place.
    assert forward == 2 * (sum(flops.forward.values()) + more + flops.early / 2)
    recomputed = (flops.recomputed + more) if recompute else 0
    assert backward == 2 * (2 * (sum(flops.forward.values()) + more) + recomputed - flops.early)
    assert flops.early == 2 * flops.forward["heads"]
    assert flops.model == 3 * sum(flops.forward.values())


def test_operations_of_the_dvae_equal_the_counter() -> None:
    config = DVAEConfig(image_size=32, width=8, num_groups=3, codebook_size=16, decoder_stem=8)
    with FlopCounterMode(display=False) as counter:
        DVAE(config)(torch.rand(2, 3, 32, 32), 0.5)
    assert counter.get_total_flops() == 2 * sum(DVAEWorkload(config).flops.forward.values())


def test_operations_at_the_papers_size() -> None:
    flops = PriorWorkload(PriorConfig()).flops
    pairs = 47 * 328_304 + 16 * 311_936 + 356_384  # rows, columns, the convolution
    assert flops.forward["attention"] == 4 * 3968 * pairs
    assert flops.forward["matrices"] == 2 * 1280 * 12_092_178_432
    dvae = DVAEWorkload(DVAEConfig()).flops.forward
    # The decoder without upsampling before its 1x1 convolutions; with it they would take 48 more.
    assert [round(n / 1e9) for n in dvae.values()] == [272, 260]


def test_a_step_is_the_sum_of_its_parts_uncompressed_overlap() -> None:
    setup = Setup(devices=2, nodes=3, strategy="hsdp", precision="bf16-mixed", batch=2, recompute=True)
    rates = rates_of(GPU_OF_TEN, setup, mfu=0.5, intra=0.002, inter=0.001)
    assert rates.compute == pytest.approx(0.5 * 1e6)  # it does not support bfloat16, so float32 applies
    d = duration_of(WORK, setup, memory_of(WORK, setup), rates)
    flops = WORK.flops
    assert d.forward == pytest.approx(2 * (sum(flops.forward.values()) + flops.early) / rates.compute)
    assert d.forward + d.backward == pytest.approx(2 * (flops.model + flops.recomputed) / rates.compute)
    network = {"forward": 0.0, "backward": 0.0, "after": 0.0}
    for c in collectives(WORK, setup):
        network[c.when] += c.intra / 2e6 + 2 * c.inter / 1e6
    assert (d.forward_network, d.backward_network) == pytest.approx((network["forward"], network["backward"]))
    waiting = max(d.forward_network - d.forward, 0) + max(d.backward_network - d.backward, 0)
    assert d.total == pytest.approx(d.forward + d.backward + waiting + d.optimizer)


def test_powersgd_trades_communication_for_computation() -> None:
    setup = Setup(devices=8, nodes=128, strategy="hsdp_powersgd(rank=896)", precision="16-resblock", batch=1)
    work, gpu = PriorWorkload(PriorConfig()), find_gpu("v100-16gb")
    memory = memory_of(work, setup)
    slow, fast = (rates_of(gpu, setup, 0.4, inter=gigabytes) for gigabytes in (3.0, 1000.0))
    compressed, uncompressed = (duration_of(work, setup, memory, slow, compress=on) for on in (True, False))
    assert compressed.powersgd > 0 == uncompressed.powersgd
    assert compressed.total < uncompressed.total
    assert compressed.exchange < 0.2 * uncompressed.backward_network
    compressed, uncompressed = (duration_of(work, setup, memory, fast, compress=on) for on in (True, False))
    assert compressed.total > uncompressed.total


def test_dtypes_that_the_gpu_lacks_run_at_the_rate_of_float32() -> None:
    gpu = find_gpu("v100-16gb")
    rates = {
        precision: rates_of(gpu, Setup(devices=1, precision=precision), 1.0).compute
        for precision in ("32-true", "bf16-mixed", "16-resblock")
    }
    assert rates == pytest.approx({"32-true": 15.7e12, "bf16-mixed": 15.7e12, "16-resblock": 125e12})


@pytest.mark.parametrize(("mfu", "intra"), [(0, None), (1.5, None), (0.4, -1.0), (0.4, 0.0)])
def test_rates_out_of_range_raise(mfu: float, intra: float | None) -> None:
    with pytest.raises(ValueError, match=r"mfu must be in|intra must be above 0"):
        rates_of(GPU_OF_TEN, Setup(devices=1), mfu, intra)


def test_the_table_of_gpus() -> None:
    for name, gpu in known_gpus().items():
        assert gpu.name == name
        assert gpu.source
        assert gpu.tflops["float32"] < gpu.tflops["float16"]
        assert min(gpu.memory, gpu.bandwidth, gpu.intra, gpu.inter) > 0
        assert abs(gpu.memory - int(name.rpartition("-")[2].removesuffix("gb"))) <= 1  # the driver reports 140 of 141
    with pytest.raises(ValueError, match=r"unknown GPU 'v100-16'. Did you mean 'v100-16gb'"):
        find_gpu("v100-16")
