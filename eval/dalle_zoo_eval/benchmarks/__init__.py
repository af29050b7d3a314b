"""Readers of benchmarks: folders in a known layout to images with captions.

| module | what it holds |
|---|---|
| `base` | what every reader gives, and the registry of layouts |
| `coco` | MS-COCO captions 2014 and 2017 |
| `cub` | CUB-200-2011, with the class-disjoint split and bounding boxes |
| `attngan` | the layout of AttnGAN and DM-GAN, for both |
| `folder` | any folder of images |
| `safe_pickle` | pickles of plain data |
| `captions` | the pinned list of captions |
| `images` | decoding and cropping |
"""

from dalle_zoo_eval.benchmarks import attngan, coco, cub, folder  # noqa: F401 (they register themselves)
from dalle_zoo_eval.benchmarks.base import LAYOUTS, Benchmark, BenchmarkError, Item, read_benchmark
from dalle_zoo_eval.benchmarks.captions import (
    CaptionList,
    check_exclusions,
    choose_captions,
    load_captions,
    load_exclusions,
    save_captions,
)
from dalle_zoo_eval.benchmarks.images import load_image
from dalle_zoo_eval.benchmarks.safe_pickle import UnsafePickleError, load_plain

__all__ = [
    "LAYOUTS",
    "Benchmark",
    "BenchmarkError",
    "CaptionList",
    "Item",
    "UnsafePickleError",
    "check_exclusions",
    "choose_captions",
    "load_captions",
    "load_exclusions",
    "load_image",
    "load_plain",
    "read_benchmark",
    "save_captions",
]
