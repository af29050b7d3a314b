"""Measures figures of docs/train/data-at-scale.md: resuming in a large set, two processes against one, rates of steps.

    python benchmarks/data_at_scale.py        writes benchmarks/results/data_at_scale.json

Data are simulated: captions of random words, and noise as images. Rates are in CPU seconds of one core, so that other
work on the machine changes them little. The ratio of wall times needs as many free cores as processes; the load of the
machine is stored next to it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.harness import cpu_name  # noqa: E402 (a checkout runs uninstalled)
from dalle_zoo.data import CodeDataset, ResumableLoader, encode_source, filter_source, open_source  # noqa: E402
from dalle_zoo.data.archives import add_file  # noqa: E402
from dalle_zoo.data.codes import CodeShardWriter  # noqa: E402
from dalle_zoo.data.counting import count_captions  # noqa: E402
from dalle_zoo.data.datasets import ImageTextDataset  # noqa: E402
from dalle_zoo.files import write_json  # noqa: E402
from dalle_zoo.networks import load_image_tokenizer  # noqa: E402
from dalle_zoo.sharing import Share  # noqa: E402
from dalle_zoo.tokenizers import BPETokenizer  # noqa: E402
from dalle_zoo.zoo import find_component  # noqa: E402

RESULT = Path(__file__).parent / "results/data_at_scale.json"
RECORDS, IMAGES = 1_000_000, 100_000
PER_SHARD = {"codes": 16_384, "images": 10_000}
GRID, CODES, BATCH = 8, 8192, 64
PASSED = 0.99
"""Share of an epoch after which a run is resumed."""
FILTERED, ROUNDS = 600, 3
WORDS = [f"{first}{second}" for first in ("dog", "cat", "house", "red", "old", "tree") for second in ("", "s", "like")]


def caption(number: int) -> str:
    rng = random.Random(number)
    return f"a photo of {rng.choice(WORDS)} and {rng.choice(WORDS)} number {number % 1000} on a table"


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Smooth colors with grain, about as many bytes as a photo of this size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), 3)
    pixels = np.asarray(coarse) + rng.normal(0, 6, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_images(folder: Path, count: int, images: list[bytes]) -> None:
    """Shards as img2dataset writes them, with their manifest."""
    folder.mkdir()
    shards = []
    for first in range(0, count, PER_SHARD["images"]):
        path, numbers = folder / f"{first:08d}.tar", range(first, min(first + PER_SHARD["images"], count))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in numbers:
                add_file(archive, f"{number:09d}.jpg", images[number % len(images)] + number.to_bytes(4))
                add_file(archive, f"{number:09d}.txt", caption(number).encode())
        shards.append({"file": path.name, "bytes": path.stat().st_size, "samples": len(numbers)})
    write_json(folder / "manifest.json", {"shards": shards})


def write_codes(folder: Path) -> None:
    """Code shards with their manifest."""
    folder.mkdir()
    codes, shards = torch.randint(CODES, (997, 1, GRID, GRID)), []
    for first in range(0, RECORDS, PER_SHARD["codes"]):
        path, numbers = folder / f"codes-{len(shards):05d}.tar", range(first, min(first + PER_SHARD["codes"], RECORDS))
        with CodeShardWriter(path, codebook_size=CODES) as writer:
            for number in numbers:
                writer.add(f"{number:09d}", [caption(number)], codes[number % len(codes)])
            writer.finish({})
        shards.append({"file": path.name, "bytes": path.stat().st_size, "samples": len(numbers)})
    write_json(folder / "manifest.json", {
        "format": "dalle-zoo code shards 1", "grid": [GRID, GRID], "variants": 1, "chunk": 256, "shards": shards,
        "tokenizer": {"codebook_size": CODES},
    })  # fmt: skip


# ------------------------------------------------------------ resuming


def seconds(work: Callable[[], object]) -> dict[str, float]:
    start = time.process_time(), time.perf_counter()
    work()
    return {"cpu": time.process_time() - start[0], "wall": time.perf_counter() - start[1]}


def resumed(dataset: Callable[[], Any]) -> dict[str, Any]:
    """Times the first batch of a run resumed late in an epoch, and reading all that it passes over."""
    first = ResumableLoader(dataset(), BATCH, seed=1)
    done = int(len(first) * PASSED)
    state = first.state_dict() | {"batches": done, "positions": [[done * BATCH]]}

    def resume() -> None:
        loader = ResumableLoader(dataset(), BATCH, seed=1)
        loader.load_state_dict(state)
        next(iter(loader))

    def read() -> None:
        data = dataset()
        for number, _ in enumerate(data.records(seed=1, epoch=0, start=0, stop=len(data))):
            if number == done * BATCH:
                break

    return {
        "records": len(dataset()), "passed": done * BATCH, "resume": seconds(resume),
        "reading what was passed": seconds(read),
    }  # fmt: skip


# ------------------------------------------------------------ processes


def together(work: Callable[[Path, Share], object], processes: int, folder: Path) -> dict[str, float]:
    """Wall seconds of processes that share work, and CPU seconds of all of them."""
    context, before = multiprocessing.get_context("fork"), resource.getrusage(resource.RUSAGE_CHILDREN)
    out, start = folder / f"{processes}-{time.monotonic_ns()}", time.perf_counter()
    ranks = [context.Process(target=work, args=(out, Share(rank=r, world=processes))) for r in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(rank.exitcode == 0 for rank in ranks)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compared(work: Callable[[Path, Share], object], folder: Path, samples: int) -> dict[str, Any]:
    """Compares one and two processes, alternately, and their bytes."""
    folder.mkdir()
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for processes, times in found.items():
            times.append(together(work, processes, folder))
    outs = [contents(out) for out in folder.iterdir()]
    middle = {n: {key: statistics.median(t[key] for t in times) for key in times[0]} for n, times in found.items()}
    return {
        "samples": samples, "rounds": {str(n): times for n, times in found.items()},
        "wall ratio, 1 process to 2": middle[1]["wall"] / middle[2]["wall"],
        "CPU ratio, 2 processes to 1": middle[2]["cpu"] / middle[1]["cpu"],
        "same bytes": all(out == outs[0] for out in outs),
        "CPU seconds per sample": middle[1]["cpu"] / samples,
    }  # fmt: skip


def filter_work(folder: Path, out: Path, share: Share) -> None:
    filter_source(open_source(folder), out, samples_per_shard=100, progress=False, share=share)


def encode_work(folder: Path, encode: Callable[[Tensor], Tensor], out: Path, share: Share) -> None:
    info = {"codebook_size": 2048}
    encode_source(open_source(folder), encode, out, size=64, info=info, samples_per_shard=100, progress=False,
                  share=share)  # fmt: skip


# ------------------------------------------------------------ rates


def per_sample(work: Callable[[], object], samples: int) -> float:
    return seconds(work)["cpu"] / samples


def counted(folder: Path) -> None:
    """Counts the samples of shards without their manifest."""
    (folder / "manifest.json").rename(folder / "manifest.moved")
    try:
        assert open_source(folder).num_samples
    finally:
        (folder / "manifest.moved").rename(folder / "manifest.json")


def rates(large: Path) -> dict[str, float]:
    """CPU seconds per sample, and of the training of a vocabulary per piece."""
    captions = [caption(number) for number in range(20_000)]
    pieces = count_captions(open_source(large)).pieces
    return {
        "counting samples": per_sample(partial(counted, large), IMAGES),
        "counting captions": per_sample(lambda: count_captions(open_source(large)), IMAGES),
        "vocabulary, per piece": per_sample(lambda: BPETokenizer.train_counts(pieces), sum(pieces.values())),
        "vocabulary of captions, per caption": per_sample(lambda: BPETokenizer.train(captions), len(captions)),
        "order of a resumed run": per_sample(partial(consume, 300_000), 300_000),
    }


def consume(count: int) -> None:
    from dalle_zoo.data.ordering import Order

    Order(count + 1, seed=0, buffer_size=16_384, skip=count)


def photos() -> Iterator[bytes]:
    return (jpeg(seed, 512, 384) for seed in range(24))


def main() -> None:
    """Runs the benchmark and stores its results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_codes(folder / "codes")
        write_images(folder / "images", IMAGES, [jpeg(seed, 64, 48) for seed in range(24)])
        write_images(folder / "photos", FILTERED, list(photos()))
        images = open_source(folder / "images")
        result: dict[str, Any] = {"resume": {
            "codes": resumed(lambda: CodeDataset(folder / "codes")),
            "images": resumed(lambda: ImageTextDataset(images, transform="prior", size=32)),
        }}  # fmt: skip
        print(json.dumps(result, indent=2), flush=True)
        net = load_image_tokenizer(find_component("composition", "dvae"), "cpu")
        with torch.inference_mode():
            encode = partial(encode_work, folder / "photos", net.encode)
            result["processes"] = {
                "filter": compared(partial(filter_work, folder / "photos"), folder / "filtered", FILTERED),
                "encode": compared(encode, folder / "encoded", FILTERED),
            }
        result["rates"] = rates(folder / "images")
        result["bytes per photo"] = (folder / "photos/00000000.tar").stat().st_size / FILTERED
    record = {
        "command": "python benchmarks/data_at_scale.py", "device": cpu_name(), "cores": os.cpu_count(), "load": load,
        "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, **result,
    }  # fmt: skip
    write_json(RESULT, record)
    print(json.dumps(record["processes"] | record["rates"], indent=2))


if __name__ == "__main__":
    main()
