"""Evaluation of dalle-zoo models, and of images from anywhere: one path from a protocol to a number in a report.

Modules in the order in which a protocol passes through them; docs/design/architecture.md ranks their imports.

| module | content |
|---|---|
| `command` | ``dalle-zoo eval``, ``report``, ``overlap`` and ``card`` |
| `caption_lists` | ``dalle-zoo captions`` |
| `compare`, `sides` | ``dalle-zoo compare``: two sets of any kind |
| `protocol`, `rules`, `choices`, `published` | protocols and published scores, read from YAML |
| `request`, `runner` | the request; from datasets and a model, or images, to result file and report |
| `opening` | the extractors of a protocol, opened |
| `datasets` | readers of MS-COCO, CUB, the AttnGAN layout, folders and shards; lists of prompts |
| `groups` | a group of prompts: its real and generated images, and their feature stores |
| `image_sources`, `generation` | images of files and of a model |
| `external`, `training_images` | images of another system and of a training set |
| `extractors` | images to features |
| `features`, `blur` | features on disk, chunk by chunk, by any number of processes |
| `metrics`, `scores`, `moments` | torchmetrics metrics; feature stores to scores; moments that add up |
| `statistics` | reference statistics in files |
| `selfcheck` | checks of the real images before anything is generated |
| `memorization` | nearest images in a training set: copies and overlaps |
| `comparison`, `report`, `sweeps` | from result files to tables and figures |
| `study` | ``dalle-zoo study``: human studies, from the page for raters to result files |
| `exchange` | ``dalle-zoo benchmark``: images for, and results of, benchmarks that other code runs |
| `documents`, `latex`, `score_rows`, `plots`, `sheets` | documents, figures, captioned images |
| `data_files`, `provenance` | data files of the package; digests and versions |

`dalle_zoo.results` defines the schema of a result file.
"""
