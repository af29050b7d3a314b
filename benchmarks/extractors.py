"""Times the extractors of FD-DINOv2 and CMMD from image files, relative to the forward pass of their networks.

    python -m benchmarks.extractors --threads 1    writes benchmarks/results/extractors.json, in a few minutes
    python -m benchmarks.extractors --device cuda --images 256 --rounds 7

The networks have the published sizes and random weights, which does not change the time. The forward pass gets images
that are scaled and normalized already. Both ways alternate in one process; the ratio is that of the medians. On a CPU,
times are CPU seconds of the process, which a busy machine hardly changes, and which include the threads that read
images. On a GPU, they are seconds of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dalle_zoo_eval.datasets import read_dataset
from dalle_zoo_eval.extractors import Extractor, load_extractor
from dalle_zoo_eval.extractors.base import exact_float32
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageFiles
from safetensors.torch import save_file

from benchmarks.evaluation import conditions, make_images
from dalle_zoo.files import write_json
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.ranker_folder import save_ranker
from dalle_zoo.sharing import Share
from dalle_zoo.tokenizers import ByteTokenizer

TARGET = 1.2


def open_dinov2(folder: Path, device: str) -> tuple[Extractor, Callable[[], object]]:
    """Returns the extractor with random weights of ViT-L/14, and its forward pass of one chunk."""
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    save_file(Dinov2Model(config).state_dict(), folder / "model.safetensors")
    extractor: Any = load_extractor("dinov2", folder, device)
    return extractor, partial(extractor.net, torch.rand(CHUNK, 3, 224, 224, device=device))


def open_clip(folder: Path, device: str) -> tuple[Extractor, Callable[[], object]]:
    """Returns the extractor with random weights of ViT-L/14 at 336 pixels, and its forward pass of one chunk."""
    config = RankerConfig(
        image_size=336, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, text_width=64,
        text_layers=1, text_heads=1, embed_dim=768, text_length=16, text_vocab=256,
    )  # fmt: skip
    save_ranker(Ranker.create(config, ByteTokenizer()), folder)
    extractor: Any = load_extractor("clip-l14-336", folder, device)
    pixels = torch.rand(CHUNK, 3, 336, 336, device=device)
    return extractor, partial(extractor.ranker.model.get_image_features, pixel_values=pixels)


CHUNK = 2
NETWORKS = {"dinov2": open_dinov2, "clip-l14-336": open_clip}


def seconds(work: Callable[[], object], device: str) -> float:
    """Returns the CPU seconds of a call, or its duration on a GPU, seconds."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    work()
    return clock() - start


def compare(name: str, source: ImageFiles, rounds: int, device: str) -> dict[str, Any]:
    """Times both ways alternately; the first round warms up and does not count."""
    times: dict[str, list[float]] = {"forward": [], "from files": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        extractor, forward = NETWORKS[name](folder, device)

        def run_forward() -> None:
            with exact_float32(torch.device(device)):
                for _ in range(0, len(source), CHUNK):
                    forward()
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        for number in range(rounds + 1):
            store = FeatureStore(source, {name: extractor}, (0,), CHUNK, folder / str(number), device)
            found = {
                "forward": seconds(run_forward, device),
                "from files": seconds(partial(store.run, Share(), label=f"{name} {number}"), device),
            }
            for way, value in found.items() if number else ():
                times[way].append(value)
    medians = {way: statistics.median(values) for way, values in times.items()}
    ratio = medians["from files"] / medians["forward"]
    return {
        "ratio": ratio,
        "target": TARGET,
        "seconds per image": {way: median / len(source) for way, median in medians.items()},
        "seconds": times,
    }


def main() -> None:
    """Measures, prints and stores the ratios."""
    parser = argparse.ArgumentParser(description="Time of extractors from files, relative to their forward pass.")
    parser.add_argument("--images", type=int, default=4, help="images per run (4)")
    parser.add_argument("--size", type=int, default=256, help="image size, pixels (256)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way after one to warm up (2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU (all)")
    parser.add_argument("--device", default="cpu", help="device of the network (cpu)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/extractors.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name), options.images, options.size)
        items = read_dataset("folder", Path(name), "all").items
        source = ImageFiles(items, "center", options.size, source="benchmark")
        cases = {network: compare(network, source, options.rounds, options.device) for network in NETWORKS}
    result = {
        "command": f"python -m benchmarks.extractors --images {options.images} --size {options.size} "
        f"--rounds {options.rounds} --threads {options.threads} --device {options.device}",
        "clock": "wall" if options.device.startswith("cuda") else "CPU seconds of the process",
        "cases": cases,
        **conditions(options.device),
    }
    write_json(options.out, result)
    for case, found in cases.items():
        print(f"{case}: {found['ratio']:.3f} times its forward pass")


if __name__ == "__main__":
    main()
