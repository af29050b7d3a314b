"""Datasets of evaluations: folders in a known layout, or any other source, to captioned images.

| module | what it holds |
|---|---|
| `base` | what every reader returns, and the registry |
| `coco` | MS-COCO captions 2014 and 2017 |
| `cub` | CUB-200-2011, with the class-disjoint split and bounding boxes |
| `attngan` | the layout of AttnGAN and DM-GAN, for both |
| `folder` | any folder of images |
| `composition` | prompts that are made for what they test, with composed images |
| `source` | shards, folders and data in the package, as `dalle_zoo.data.open_source` reads them |
| `safe_pickle` | pickles of plain data |
| `prompts` | the pinned list of prompts |
| `images`, `digests` | decoding and cropping; digests of files by their contents |

A new dataset is one file with ``@DATASETS.register(...)`` and one import line here; other distributions use the
entry-point group ``dalle_zoo.eval_datasets``.
"""

from dalle_zoo_eval.datasets import (  # noqa: F401 (they register themselves)
    attngan,
    coco,
    composition,
    cub,
    folder,
    source,
)
from dalle_zoo_eval.datasets.base import DATASETS, DatasetError, EvalDataset, Item, read_dataset
from dalle_zoo_eval.datasets.images import load_image
from dalle_zoo_eval.datasets.prompts import (
    CaptionList,
    check_exclusions,
    choose_captions,
    load_exclusions,
    save_captions,
)
from dalle_zoo_eval.datasets.safe_pickle import UnsafePickleError, load_plain

__all__ = [
    "DATASETS",
    "CaptionList",
    "DatasetError",
    "EvalDataset",
    "Item",
    "UnsafePickleError",
    "check_exclusions",
    "choose_captions",
    "load_exclusions",
    "load_image",
    "load_plain",
    "read_dataset",
    "save_captions",
]
