"""Readers, transforms, the resumable loader and code shards.

```
open_source ─► SampleSource ─► ImageTextDataset ─┐
                    └─ encode_source ─► shards ─► CodeDataset ─┴─► ResumableLoader, iterate_batches
                    └─ filter_source ─► shards ─► open_source         ─► batches
```
"""

from dalle_zoo.data.codes import CodeDataset, CodeShardWriter
from dalle_zoo.data.composition import CompositionSource
from dalle_zoo.data.datasets import CaptionedDataset, ImageTextDataset, Item
from dalle_zoo.data.decoding import CorruptImageError, decode_image
from dalle_zoo.data.encoding import encode_source
from dalle_zoo.data.filtering import filter_source
from dalle_zoo.data.filters import Filters
from dalle_zoo.data.folder import FolderSource
from dalle_zoo.data.loader import (
    Batch,
    Collate,
    EmptyDataError,
    EncodeCaptions,
    ResumableLoader,
    iterate_batches,
)
from dalle_zoo.data.samples import Sample, SampleSource, Skipped
from dalle_zoo.data.shards import ShardSource
from dalle_zoo.data.sources import open_source
from dalle_zoo.data.transforms import (
    TRANSFORMS,
    center_transform,
    dvae_transform,
    prior_transform,
    sample_rng,
)

__all__ = [
    "TRANSFORMS",
    "Batch",
    "CaptionedDataset",
    "CodeDataset",
    "CodeShardWriter",
    "Collate",
    "CompositionSource",
    "CorruptImageError",
    "EmptyDataError",
    "EncodeCaptions",
    "Filters",
    "FolderSource",
    "ImageTextDataset",
    "Item",
    "ResumableLoader",
    "Sample",
    "SampleSource",
    "ShardSource",
    "Skipped",
    "center_transform",
    "decode_image",
    "dvae_transform",
    "encode_source",
    "filter_source",
    "iterate_batches",
    "open_source",
    "prior_transform",
    "sample_rng",
]
