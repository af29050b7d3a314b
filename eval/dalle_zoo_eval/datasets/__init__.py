"""Datasets of evaluations: readers of captioned images in known layouts and from other sources.

| module | content |
|---|---|
| `base` | the registry, the type that readers return, and helpers of readers |
| `coco` | MS-COCO captions 2014 and 2017 |
| `cub` | CUB-200-2011, with the class-disjoint split and bounding boxes |
| `attngan` | birds and MS-COCO in the layout of AttnGAN and DM-GAN |
| `folder` | any folder of images |
| `manifest` | manifests of generated images, and files of captions |
| `composition` | prompts for composed scenes, with composed images |
| `source` | shards, folders and bundled data, read by `dalle_zoo.data.open_source` |
| `safe_pickle` | pickles of plain data |
| `prompts` | the captions from which images are generated, chosen by seed; exclusion lists |
| `images`, `digests` | decoding and cropping; digests of files by their contents |

A new dataset is one file with ``@DATASETS.register(...)`` and one import line here. The fields of `DatasetSpec`
describe the layout of its folder for messages. Other distributions use the entry-point group
``dalle_zoo.eval_datasets``.
"""

from dalle_zoo_eval.datasets import (  # noqa: F401 (they register themselves)
    attngan,
    coco,
    composition,
    cub,
    folder,
    manifest,
    source,
)
from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    UnavailableGroupError,
    read_dataset,
)
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
    "UnavailableGroupError",
    "UnsafePickleError",
    "check_exclusions",
    "choose_captions",
    "load_exclusions",
    "load_image",
    "load_plain",
    "read_dataset",
    "save_captions",
]
