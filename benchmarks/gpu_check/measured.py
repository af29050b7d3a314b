"""Stages that time single steps and measure memory, with the functions of the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks.gpu_check.check import Check
from benchmarks.harness import Row
from dalle_zoo.masks import TextImageLayout
from dalle_zoo.models.dvae import DVAEConfig
from dalle_zoo.models.prior import PriorConfig

SMALL = PriorConfig(width=1024, num_layers=24, num_heads=16)
MIDDLE = PriorConfig(width=2048, num_layers=24, num_heads=32)
LARGE = PriorConfig()
"""The paper's shape: 64 layers of width 3,968."""
TINY = PriorConfig(
    text_length=8, text_vocab=32, image_height=4, image_width=4, codebook_size=16, width=32, num_layers=4, num_heads=2
)  # fmt: skip
FEW_ROWS = 8
"""Rows of the grid where a complete image would take too long; a token costs about as much as in a complete image. The
time of recording the CUDA graph is part of every call, so that fewer rows would make it look larger than it is."""
ROUNDS = 3
PLAN_ERROR = 0.1
"""Relative error allowed of a planned peak, as in the tests."""


def _add_row(check: Check, row: Row, unit: str) -> None:
    """Records a row of the benchmarks."""
    least = None if check.tiny or row.target is None else row.target
    seconds = {path: statistics.median(times) for path, times in row.seconds.items()}
    check.add(
        f"{row.name}, {row.path} / {row.against}", row.ratio, unit, least=least, seconds=seconds, row=asdict(row)
    )


def ceilings(check: Check) -> None:
    """Describes the device and measures what bounds every other figure."""
    import torch

    from benchmarks import harness

    sizes = (2**20, 128) if check.tiny else (2**30, 8192)
    if check.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        details = {"name": properties.name, "capability": [properties.major, properties.minor]}
        check.add("memory of the GPU", properties.total_memory / 1e9, "GB", **details)
    found = harness.ceilings(check.device, *sizes)
    check.add("copy, read and written", found["bytes"] / 1e12, "TB/s", limit={"bytes": found["bytes"]})
    check.add("bfloat16 product", found["flop"] / 1e12, "TFLOP/s", limit={"flop": found["flop"]})


def _limits(check: Check) -> dict[str, float]:
    """The ceilings; measured here if their stage was left out."""
    from benchmarks import harness

    return check.limits or harness.ceilings(check.device, *((2**20, 128) if check.tiny else (2**30, 8192)))


def sampling(check: Check) -> None:
    """Single images against the copy rate, graphs against single launches, and batches against the roofline."""
    import decoding
    import torch

    limits = _limits(check)
    small, middle, large = (TINY,) * 3 if check.tiny else (SMALL, MIDDLE, LARGE)
    few = 2 if check.tiny else FEW_ROWS

    def single(name: str, config: PriorConfig, rows: int) -> None:
        row = decoding.single_image(name, replace(config, image_height=rows), limits, check.device, ROUNDS)
        _add_row(check, row, "of the floor")
        graph, launches = (statistics.median(row.seconds[path]) for path in ("sampling", "single launches"))
        check.add(f"{row.name}, single launches / CUDA graph", launches / graph, "x")
        check.add(f"{row.name}, CUDA graph", 1000 * graph / (rows * config.image_width), "ms per token")

    def batch(name: str, config: PriorConfig, rows: int, prompts: int, candidates: int) -> None:
        shape = replace(config, image_height=rows)
        row = decoding.best_batch(name, shape, prompts, candidates, limits, check.device, 2)
        _add_row(check, row, "of the roofline")
        check.add(f"{row.name}", row.extra["images per second"], "images/s")

    many = (2, 4) if check.tiny else (8, 64)
    with torch.inference_mode():
        check.each([
            partial(single, "300M", small, few),
            partial(single, "12B", large, few),
            partial(single, "1.2B", middle, few),
            partial(batch, "12B", large, few, 1, many[1]),
            partial(batch, "1.2B", middle, middle.image_height, 1, many[1]),
            partial(batch, "1.2B", middle, middle.image_height, *many),
            partial(batch, "1.2B", middle, few, many[0] * many[1] // 2, 1),
        ])  # fmt: skip


def training(check: Check) -> None:
    """Attention by mask, and steps of two shapes against the rate of products."""
    import torch
    import training as benchmark

    limits = _limits(check)
    layout = TextImageLayout(8, 4, 4) if check.tiny else benchmark.PAPER
    batch = 2 if check.tiny else 8
    layers = 4
    shapes = {
        "1.2B": TINY if check.tiny else MIDDLE,
        f"{layers} of the 64 layers of 12B": TINY if check.tiny else replace(LARGE, num_layers=layers),
    }

    def step(name: str) -> None:
        row = benchmark.large_step(name, shapes[name], batch, limits, check.device, ROUNDS, compiled=False)
        _add_row(check, row, "of the rate of products")
        check.add(row.name, row.extra["tokens per second"], "tokens/s")

    def attention(spec: str) -> None:
        _add_row(check, benchmark.attention_row(spec, torch.bfloat16, None, check.device, layout), "x")

    check.each([
        *(partial(step, name) for name in shapes),
        *(partial(attention, spec) for spec in ("row", "column", "conv")),
    ])  # fmt: skip


def compiled(check: Check) -> None:
    """Training steps with compiled blocks, and the compiled dVAE, both against eager ones."""
    import dvae as images
    import torch
    import training as benchmark

    limits = _limits(check)
    config, batch = (TINY, 2) if check.tiny else (replace(SMALL, num_layers=12), 8)

    def steps() -> None:
        eager, fast = (
            benchmark.large_step("300M, 12 layers", config, batch, limits, check.device, ROUNDS, compiled=on)
            for on in (False, True)
        )
        _add_row(check, fast, "of the rate of products")
        check.add(f"{fast.name}, eager / compiled", fast.ratio / eager.ratio, "x")

    @torch.no_grad()
    def encoding() -> None:
        net = images.native(check.device, _dvae(check))
        for row in images.compare_compiled(net, check.device, 2 if check.tiny else 32):
            _add_row(check, row, "x")

    # A rehearsal compiles nothing: the compiler of the CPU takes minutes.
    with torch.compiler.set_stance("force_eager" if check.tiny else "default"):
        check.each([steps, encoding])


def _dvae(check: Check) -> DVAEConfig:
    if not check.tiny:
        return DVAEConfig()
    return DVAEConfig(image_size=32, width=8, num_groups=3, codebook_size=16, decoder_stem=8)


def dvae(check: Check) -> None:
    """Images per second of the dVAE, and codes of bfloat16 against those of float32."""
    import dvae as images
    import torch

    from benchmarks.harness import interleaved

    count = 2 if check.tiny else 64

    @torch.no_grad()
    def encoding() -> None:
        net = images.native(check.device, _dvae(check))
        peer = images.Peer(images.MODULES, lambda x: net.logits(x).argmax(1), net.decode)
        for row in images.compare_encoding(net, peer, count, None, check.device, ""):
            _add_row(check, row, "x")
            check.add(f"encode, {row.path}", row.extra["images per second"], "images/s")

    @torch.no_grad()
    def decoding() -> None:
        net = images.native(check.device, _dvae(check))
        side = net.config.grid_size
        codes = torch.randint(net.codebook_size, (count, side, side)).to(check.device)
        seconds = interleaved({"decode": lambda: net.decode(codes)}, ROUNDS, check.device)["decode"]
        check.add("decode, float32", count / statistics.median(seconds), "images/s")

    check.each([encoding, decoding])


def evaluation(check: Check) -> None:
    """Images per second of the Inception of FID: from memory, and from files."""
    import tempfile
    from pathlib import Path

    import torch
    from dalle_zoo_eval.datasets import read_dataset
    from dalle_zoo_eval.image_sources import ImageFiles

    from benchmarks import evaluation as benchmark
    from benchmarks.harness import interleaved

    count, batch = (4, 4) if check.tiny else (200, 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        network = benchmark.open_inception(folder, check.device)

        def from_memory() -> None:
            images = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8)
            seconds = interleaved({"network": lambda: network(images)}, 2 if check.tiny else ROUNDS, check.device)
            check.add(f"Inception, {batch} images per call", batch / min(seconds["network"]), "images/s")

        def from_files() -> None:
            benchmark.make_images(folder / "images", count, 256)
            source = ImageFiles(
                read_dataset("folder", folder / "images", "all").items, "center", 256, source="benchmark"
            )
            found = benchmark.compare(network, source, (0,), 1, folder / "features")
            check.add("Inception, from JPEG files", found["images per second, from files"], "images/s", **found)

        check.each([from_memory, from_files])


# ------------------------------------------------------------ memory


def memory(check: Check) -> None:
    """Peaks of training steps of the prior and the dVAE against those that are planned."""
    from dalle_zoo.models.losses import dvae_loss
    from dalle_zoo.planning.dvae import DVAEWorkload
    from dalle_zoo.planning.prior import PriorWorkload
    from dalle_zoo.planning.setup import Setup

    config, batch = (TINY, 2) if check.tiny else (replace(SMALL, num_layers=12), 8)
    if check.tiny:  # large enough for the terms that the plan counts
        config = replace(config, width=128, text_length=32, text_vocab=512, image_height=8, image_width=8,
                         codebook_size=256)  # fmt: skip

    def prior(precision: str, recompute: bool) -> None:
        import decoding
        import torch
        import training as benchmark

        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        net = decoding.make_prior(config, dtype, check.device)
        for block in net.residual_blocks():
            block.residual.recompute = recompute
        tokens = benchmark.make_tokens(config, batch, check.device)
        setup = Setup(devices=1, batch=batch, precision=precision, recompute=recompute)
        name = f"prior, {precision}{', recomputed' if recompute else ''}"
        _add_peak(check, name, net, lambda: net.loss(*tokens).total, PriorWorkload(config), setup)

    def images(precision: str) -> None:
        import dvae as benchmark

        small = DVAEConfig(image_size=64, width=16, num_groups=3, codebook_size=128, decoder_stem=16)
        chosen = small if check.tiny else DVAEConfig()
        net = benchmark.native(check.device, chosen).requires_grad_(True).train()
        pixels = benchmark.random_images(batch, check.device, chosen.image_size)

        def loss() -> Any:
            parameters, logits = net(pixels, 0.5)
            return dvae_loss(net.map_pixels(pixels), parameters, logits, 1.0)[0]

        setup = Setup(devices=1, batch=batch, precision=precision)
        _add_peak(check, f"dVAE, {precision}", net, loss, DVAEWorkload(chosen), setup)

    check.each([
        *(partial(prior, *case) for case in (("bf16-mixed", False), ("bf16-mixed", True), ("bf16-true", False))),
        partial(images, "bf16-mixed"),
        partial(prior, "32-true", False),
    ])  # fmt: skip


def _add_peak(check: Check, name: str, net: Any, loss: Callable[[], Any], work: Any, setup: Any) -> None:
    """Measures the peak of three steps and compares it with the plan."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    from dalle_zoo.planning.memory import memory_of

    cuda = check.device == "cuda"
    mixed = setup.precision == "bf16-mixed"
    optimizer = torch.optim.AdamW(net.parameters(), fused=cuda, foreach=None if cuda else False)
    tracker = MemTracker()  # where there is no allocator that counts
    tracker.track_external(net, optimizer)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with nullcontext() if cuda else tracker:
        for _ in range(3 if cuda else 2):
            with torch.autocast(check.device, torch.bfloat16, enabled=mixed):
                value = loss()
            optimizer.zero_grad()
            value.backward()
            del value
            optimizer.step()
            if not cuda:
                tracker.reset_mod_stats()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    )
    planned = memory_of(work, setup, reserve=0).total
    limits = {"least": 1 - PLAN_ERROR, "most": 1 + PLAN_ERROR}
    check.add(f"peak / planned, {name}", peak / planned, "x", **limits, peak=int(peak), planned=planned)
