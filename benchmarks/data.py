"""Times reading code shards and images, and checks that the records are the same.

    python benchmarks/data.py --threads 1        writes benchmarks/results/speed/data_cpu1.json

WebDataset's own writer stores one record per member, as ``KEY.npy`` and ``KEY.json``; that library reads these shards
here. Nothing in this script runs on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.harness import Equality, Row, compare, store  # noqa: E402 (a checkout runs uninstalled)
from dalle_zoo.data import CodeDataset, Item, ResumableLoader, encode_source  # noqa: E402
from dalle_zoo.data.codes import CodeRecord  # noqa: E402
from dalle_zoo.data.datasets import CaptionedDataset  # noqa: E402
from dalle_zoo.data.ordering import Order, in_order  # noqa: E402
from dalle_zoo.data.samples import Sample, SampleSource, Skipped  # noqa: E402
from dalle_zoo.data.transforms import area_resize  # noqa: E402

SAMPLES, GRID, CODES = 20_000, 32, 8192
BATCH, SHUFFLE = 256, 4096
IMAGES = 24
ONE, CHUNKS = "one record per member", "256 records per member"
PILLOW = "Pillow"
SIDE = 270
AREA, PRODUCTS = "weighted rows", "two matrix products"


class NumberedSamples(SampleSource):
    """Captioned samples with random codes, whose images are not decoded."""

    def __init__(self, count: int) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1)).save(buffer, "PNG")
        self.count, self.image = count, buffer.getvalue()

    @property
    def num_samples(self) -> int:
        return self.count

    def read(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        for number in range(start + skip, stop):
            yield Sample(f"{number:08d}", self.image, (f"a photograph of thing number {number} on a table",))

    def fingerprint(self) -> str:
        return str(self.count)


class OneByOne(CaptionedDataset):
    """Reads a tar with one record per member, in stored order or with the bounded shuffle of `CodeDataset`."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__()
        self.path, self.count = path, count

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return str(self.path)

    def records(self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0) -> Iterator[CodeRecord]:
        order = Order(self.count, seed=seed, epoch=epoch, start=start, buffer_size=SHUFFLE, skip=skip)
        return in_order(order, enumerate(self._stored()))

    def item(self, record: CodeRecord, epoch: int) -> Item:
        codes = torch.from_numpy(record.codes.astype(np.int64))
        return {"key": record.key, "codes": codes, "caption": record.captions[0]}

    def _stored(self) -> Iterator[CodeRecord]:
        from webdataset import tariterators

        with self.path.open("rb") as stream:
            members = tariterators.tar_file_expander([{"url": str(self.path), "stream": stream}])
            for group in tariterators.group_by_keys(members):
                codes = np.load(io.BytesIO(group["npy"]), allow_pickle=False)
                yield CodeRecord(group["__key__"], json.loads(group["json"])["captions"], codes)


def write_shards(folder: Path) -> tuple[OneByOne, CodeDataset]:
    """Writes the same records in both layouts."""
    generator = torch.Generator().manual_seed(0)

    def numbered_codes(images: Tensor) -> Tensor:
        return torch.randint(CODES, (len(images), GRID, GRID), generator=generator)

    encode_source(NumberedSamples(SAMPLES), numbered_codes, folder / "chunks", size=1, info={"codebook_size": CODES},
                  batch_size=256, samples_per_shard=SAMPLES, progress=False)  # fmt: skip
    chunks = CodeDataset(folder / "chunks", shuffle_buffer=SHUFFLE)
    with tarfile.open(folder / "one.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for item in chunks:
            codes = io.BytesIO()
            np.save(codes, item["codes"].numpy().astype(np.uint16))
            captions = json.dumps({"captions": [item["caption"]]}).encode()
            for ending, data in (("npy", codes.getvalue()), ("json", captions)):
                member = tarfile.TarInfo(f"{item['key']}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return OneByOne(folder / "one.tar", SAMPLES), chunks


def drain(items: Iterable[Any]) -> None:
    """Reads all records."""
    for _ in items:
        pass


def different(a: Iterable[Item], b: Iterable[Item]) -> float:
    """Returns the share of records that differ in key, caption or a code."""
    differ = [
        x["key"] != y["key"] or x["caption"] != y["caption"] or not torch.equal(x["codes"], y["codes"])
        for x, y in zip(a, b, strict=True)
    ]
    return sum(differ) / len(differ)


def compare_shards(folder: Path) -> list[Row]:
    """Compares reading records in stored order, and in shuffled batches through the loader."""
    one, chunks = write_shards(folder)
    same = Equality(what="share of records that differ", value=different(one, chunks), limit=0)

    def batches(data: CaptionedDataset) -> ResumableLoader:
        return ResumableLoader(data, BATCH, seed=0)

    rows = [
        compare(
            f"{SAMPLES:,} records of {GRID} x {GRID} codes with captions",
            {ONE: lambda: drain(one), CHUNKS: lambda: drain(chunks)},
            path=CHUNKS,
            against=ONE,
            target=20.0,
            equal=(same,),
        ),
        compare(
            f"the same in shuffled batches of {BATCH}",
            {ONE: lambda: drain(batches(one)), CHUNKS: lambda: drain(batches(chunks))},
            path=CHUNKS,
            against=ONE,
            target=None,
            equal=(same,),
            note="Shuffling and batching are the same work for both.",
        ),
    ]
    for row in rows:
        each = {path: round(SAMPLES / sorted(times)[len(times) // 2]) for path, times in row.seconds.items()}
        print("  samples per second: " + ", ".join(f"{path} {rate:,}" for path, rate in each.items()), flush=True)
    return rows


# ------------------------------------------------------------ images


def photographs() -> list[bytes]:
    """Returns JPEG files of 640 x 480 pixels, quality 90, with smooth colors and grain."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), 3)
        grain = rng.normal(0, 6, (480, 640, 1))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def by_pillow(data: bytes) -> np.ndarray:
    """Decodes with Pillow and resizes the central square to 256 pixels with an antialiased bicubic filter."""
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((80, 0, 560, 480))
    return np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))


def by_torchvision(data: bytes) -> np.ndarray:
    """Does the same with torchvision."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    small = resize(pixels[:, :, 80:560], [256, 256], InterpolationMode.BICUBIC, antialias=True)
    return small.permute(1, 2, 0).numpy()


def by_simplejpeg(data: bytes) -> np.ndarray:
    """Decodes with simplejpeg, resizes with Pillow."""
    import simplejpeg

    image = Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB")).crop((80, 0, 560, 480))
    return np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))


def by_opencv(data: bytes) -> np.ndarray:
    """Decodes with OpenCV, resizes with Pillow, because OpenCV's bicubic filter is not antialiased."""
    import cv2

    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    image = Image.fromarray(pixels).crop((80, 0, 560, 480))
    return np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))


OTHERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "torchvision": by_torchvision,
    "simplejpeg": by_simplejpeg,
    "cv2": by_opencv,
}

NOTES = {
    "torchvision": "Pillow stays: pixels differ, and torchvision belongs to the extra `eval`, not to the package.",
    "simplejpeg": "The same pixels, no faster.",
    "cv2": "The same pixels, no faster.",
}


def area_by_products(pixels: np.ndarray, t: int) -> np.ndarray:
    """Computes `area_resize` as two matrix products, with the weights that it gives to single pixels."""
    s = len(pixels)
    ratio = (s - 1) / (t - 1)
    starts, numbers = np.arange(t)[:, None] * ratio, np.arange(2 * s)
    overlap = np.minimum(numbers + 1, starts + ratio) - np.maximum(numbers, starts)
    weights = (overlap.clip(0) / ratio).astype(np.float32)
    weights[:, s - 1] += weights[:, s:].sum(1)  # the last pixel is repeated
    weights = weights[:, :s]
    rows = (weights @ pixels.reshape(s, -1).astype(np.float32)).reshape(t, s, 3)
    return np.matmul(weights, rows).round().clip(0, 255).astype(np.uint8)


def compare_reduction() -> Row:
    """Times the area filter of training, which is applied after decoding."""
    squares = [np.asarray(Image.open(io.BytesIO(f)).convert("RGB"))[:, 80:560] for f in photographs()]
    apart = max(int(np.abs(area_resize(p, SIDE).astype(int) - area_by_products(p, SIDE)).max()) for p in squares)
    return compare(
        f"{IMAGES} squares of 480: area filter of training to {SIDE}",
        {
            PRODUCTS: lambda: [area_by_products(p, SIDE) for p in squares],
            AREA: lambda: [area_resize(p, SIDE) for p in squares],
        },
        path=AREA,
        against=PRODUCTS,
        target=None,
        equal=(Equality(what="largest difference of a pixel in 0..255", value=apart, limit=1),),
        note="Training pays this on top of decoding; Pillow's box filter is another function.",
    )


def compare_images() -> list[Row]:
    """Compares Pillow, which the readers use, with every installed library."""
    files = photographs()
    rows = [compare_reduction()]
    for library, read in OTHERS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: no row")
            continue
        apart = max(int(np.abs(by_pillow(f).astype(int) - read(f).astype(int)).max()) for f in files)
        rows.append(
            compare(
                f"{IMAGES} JPEG of 640 x 480: decoded, bicubic 256",
                {PILLOW: lambda: [by_pillow(f) for f in files], library: lambda read=read: [read(f) for f in files]},
                path=library,
                against=PILLOW,
                target=None,
                equal=(Equality(what="largest difference of a pixel in 0..255", value=apart),),
                note=NOTES[library],
            )
        )
    return rows


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_shards(Path(folder)) + compare_images()
    print(store("data", f"python benchmarks/data.py --threads {options.threads}", rows))


if __name__ == "__main__":
    main()
