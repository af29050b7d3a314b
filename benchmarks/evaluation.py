"""Times feature extraction from image files, compared with the network only, the lower bound.

    python benchmarks/evaluation.py                writes benchmarks/results/evaluation.json
    python benchmarks/evaluation.py --device cuda

Both paths use the same images in the same batches: uint8 tensors in memory, or JPEG files through
`dalle_zoo_eval.features`, which decodes, crops and blurs images and writes features to disk. They run once without
blur and once with all radii of figure 9, alternately in one process; the ratio is that of the medians. The weights of
Inception are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dalle_zoo_eval.blur import gaussian_blur
from dalle_zoo_eval.datasets import read_dataset
from dalle_zoo_eval.extractors import Extractor, load_extractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageFiles
from PIL import Image
from torch import Tensor

from dalle_zoo.files import sha256_file, write_json
from dalle_zoo.sharing import Share

CHUNK = 25
CASES = {"without blur": (0,), "with the blur of figure 9": (0, 1, 2, 4, 8)}


def make_images(folder: Path, count: int, size: int) -> None:
    """Writes JPEG files of smooth colored noise, which take about as long to decode as photographs."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, size // 8, size // 8, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (size, size + 64), mode="bicubic").clamp(0, 1)
        array = (255 * pixels[0]).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{number:06d}.jpg", quality=90)


def open_inception(folder: Path, device: str) -> Extractor:
    """Loads the Inception of 2015 with random weights: torchvision's, with another number of classes."""
    from torchvision.models.inception import Inception3

    torch.manual_seed(0)
    path = folder / "random.pth"
    torch.save(Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(), path)
    return load_extractor("inception-2015", path, device, expected_sha256=sha256_file(path))


def seconds(work: Callable[[], object]) -> float:
    """Returns the duration of a call, seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    network: Extractor, source: ImageFiles, radii: tuple[int, ...], rounds: int, folder: Path
) -> dict[str, Any]:
    """Times both paths alternately.

    Args:
        network: Feature extractor.
        source: Image files.
        radii: Radii of the blur; each gives one view of an image.
        rounds: Runs of each path.
        folder: Folder for the features.
    """
    total, views = len(source), [f"{radius}/1/features" for radius in radii]
    batches: dict[int, list[Tensor]] = {radius: [] for radius in radii}
    for start in range(0, total, CHUNK):
        loaded = source.load(range(start, min(start + CHUNK, total))).images[1]
        for radius, images in gaussian_blur(loaded, radii).items():
            batches[radius].append(torch.stack(images))
    times: dict[str, list[float]] = {"network only": [], "from files": []}
    difference = 0.0
    for number in range(rounds + 1):
        network_only = seconds(lambda: [network(batch) for parts in batches.values() for batch in parts])
        store = FeatureStore(source, {"inception-2015": network}, radii, CHUNK, folder / str(number))
        files = seconds(partial(store.run, Share(), label=f"round {number}"))
        if number == 0:  # warms up, and compares the features of both paths
            for view, parts in zip(views, batches.values(), strict=True):
                features = torch.cat([network(batch)["features"] for batch in parts])
                found = store.all("inception-2015", view)
                difference = max(difference, float((features - found).abs().max()))
            continue
        times["network only"].append(network_only)
        times["from files"].append(files)
    medians = {way: statistics.median(values) for way, values in times.items()}
    return {
        "radii": list(radii),
        "ratio": medians["from files"] / medians["network only"],
        "largest difference of the features": difference,
        **{f"images per second, {way}": total / median for way, median in medians.items()},
        "seconds": times,
    }


def conditions(device: str) -> dict[str, Any]:
    """Returns what a speed depends on besides the code."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Measures, prints and stores the ratios."""
    parser = argparse.ArgumentParser(
        description="Time of feature extraction from files, relative to the network only."
    )
    parser.add_argument("--images", type=int, default=200, help="images per run (200)")
    parser.add_argument("--size", type=int, default=256, help="image size, pixels (256)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each path (7)")
    parser.add_argument("--device", default="cpu", help="device of the network (cpu)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluation.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        make_images(folder / "images", options.images, options.size)
        network = open_inception(folder, options.device)
        items = read_dataset("folder", folder / "images", "all").items
        source = ImageFiles(items, "center", options.size, source="benchmark")
        cases = {case: compare(network, source, radii, options.rounds, folder / case) for case, radii in CASES.items()}
    result = {
        "command": f"python benchmarks/evaluation.py --images {options.images} --size {options.size} "
        f"--rounds {options.rounds} --device {options.device}",
        "cases": cases,
        **conditions(options.device),
    }
    write_json(options.out, result)
    for case, found in cases.items():
        for key in ("ratio", "largest difference of the features", "images per second, from files"):
            print(f"{case}, {key}: {found[key]:.4g}")


if __name__ == "__main__":
    main()
