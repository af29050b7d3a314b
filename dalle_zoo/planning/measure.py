"""Measures the rates of this machine's CPU with a training step of the planned network, in seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from dalle_zoo.models.dvae import DVAE
from dalle_zoo.models.losses import dvae_loss
from dalle_zoo.planning.duration import computes_in
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.formats import GIB
from dalle_zoo.planning.hardware import CPU, GPU
from dalle_zoo.planning.prior import PLANNED, PriorWorkload
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Workload

LAYERS = 2
"""Layers of a prior that are measured; all have the same size."""
ENOUGH = 2e10
"""Operations of a measured step above which one sample is enough."""
STEPS = 3
"""Steps that are measured, after one that is not; the fastest counts."""
COPIED = 2**24
"""Float32 numbers that are copied to measure the memory."""


def measure_cpu(work: Workload, setup: Setup) -> GPU:
    """Returns this machine's CPU as the hardware of a plan, whose processes share its cores and its memory.

    Args:
        work: The stage. Its operations are measured in a network of the same sizes; a prior has only two layers.
        setup: Training setup, which gives the batch and the precision.
    """
    small, loss = _prior(work, setup) if isinstance(work, PriorWorkload) else _dvae(work)
    bfloat16 = computes_in(setup) == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
        rate = small / _fastest(loss) / setup.devices
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source)) / setup.devices
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / setup.devices
    tera = dict.fromkeys(("float32", computes_in(setup)), rate / 1000000000000.0)
    threads = f"measured on this machine, {torch.get_num_threads()} threads"
    giga = bandwidth / 1e9  # processes exchange gradients through the memory
    return GPU(name=CPU, memory=memory, tflops=tera, bandwidth=giga, intra=giga / 2, inter=giga / 2, source=threads)


def _prior(work: PriorWorkload, setup: Setup) -> tuple[float, Callable[[], object]]:
    """Operations of a training step of a prior with few layers, and the step."""
    config = replace(work.config, num_layers=min(LAYERS, work.config.num_layers))
    net = PLANNED[type(config)](config)
    flops = PriorWorkload(config).flops.model
    batch = 1 if flops * setup.batch > ENOUGH else setup.batch
    text = torch.randint(2, config.text_vocab, (batch, config.text_length))
    codes = torch.randint(config.codebook_size, (batch, config.image_height, config.image_width))
    return flops * batch, lambda: _step(net, net.loss(text, codes).total)


def _dvae(work: Workload) -> tuple[float, Callable[[], object]]:
    """Operations of a training step of the dVAE with one image, and the step."""
    assert isinstance(work, DVAEWorkload)
    net = DVAE(work.config).to(memory_format=torch.channels_last)
    images = torch.rand(1, net.config.channels, net.config.image_size, net.config.image_size)

    def step() -> None:
        parameters, logits = net(images, 0.5)
        _step(net, dvae_loss(net.map_pixels(images), parameters, logits, 1.0)[0])

    return work.flops.model, step


def _step(net: nn.Module, loss: Tensor) -> None:
    net.zero_grad()
    torch.autograd.backward(loss)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
