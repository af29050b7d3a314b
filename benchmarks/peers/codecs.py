"""Compares the dVAE with PyPI's DALL-E at the same weights; `benchmarks/dvae.py` has more rows of this comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dvae import PACKAGE, PEER_ROUNDING, native, peer_of, random_images
from harness import Equality, interleaved
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_zoo.models.dvae import DVAE, DVAEConfig

ROUNDS = 2
CUBE = 1024
"""Side of the matrices of the product whose rate is the floor."""


@torch.no_grad()
def measure() -> list[dict[str, Any]]:
    """Returns rows of encoding and decoding one image of 256 pixels in float32."""
    net = native("cpu")
    peer = peer_of(net, "cpu")
    if peer.name != PACKAGE:
        raise RuntimeError("DALL-E is not installed: run make bench-peers, which installs it")
    images = random_images(1, "cpu")
    codes = torch.randint(net.codebook_size, (1, 32, 32), generator=torch.Generator().manual_seed(0))
    differ = float((net.encode(images) != peer.encode(images)).float().mean())
    apart = float((net.decode(codes) - peer.decode(codes)).abs().max())
    checks = (
        Equality(what="share of codes that differ", value=differ, limit=0),
        Equality(what="largest difference of a pixel in [0, 1]", value=apart, limit=PEER_ROUNDING),
    )
    encoder, decoder = (flops(*work) for work in on_meta())
    return [
        row(
            "encode 1 image of 256 x 256", lambda: net.encode(images), lambda: peer.encode(images), encoder, checks[0]
        ),
        row("decode 1 image of 256 x 256", lambda: net.decode(codes), lambda: peer.decode(codes), decoder, checks[1]),
    ]


def on_meta() -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Encoder and decoder on the meta device, with inputs; 1x1 convolutions of the decoder come before upsampling."""
    with torch.device("meta"):
        net = DVAE(DVAEConfig())
        encoder = nn.Sequential(net.encoder.input, net.encoder.groups, net.encoder.output)
        return [(encoder, torch.rand(1, 3, 256, 256)), (net.decoder.from_stem, torch.rand(1, 128, 32, 32))]


def flops(work: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Floating-point operations of the convolutions."""
    with FlopCounterMode(display=False) as counter:
        work(x)
    return counter.get_total_flops()


def row(
    name: str, own: Callable[[], object], peer: Callable[[], object], operations: int, check: Equality
) -> dict[str, Any]:
    """Measures a row; the floor is the time of its operations at the rate of a large product."""
    a, b = torch.randn(2, CUBE, CUBE).unbind(0)
    scale = operations / (2 * CUBE**3)
    seconds = interleaved(
        {"dalle-zoo": own, "floor": lambda: a @ b, PACKAGE: peer}, rounds=ROUNDS, warm_up=0
    )  # the checks called all
    seconds["floor"] = [scale * time for time in seconds["floor"]]
    print(name, seconds, check, flush=True)
    return {
        "shape": "dvae", "name": name, "unit": "images/s", "amount": 1, "dtype": "float32", "seconds": seconds,
        "errors": {}, "operations": operations, "checked": f"{check.what} {check.value:.3g}",
    }  # fmt: skip
