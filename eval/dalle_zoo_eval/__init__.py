"""Evaluation of dalle-zoo models, and of images from anywhere: one path from a protocol to a number in a report.

| module | what it holds |
|---|---|
| `command` | ``dalle-zoo eval``, ``report``, ``overlap`` and ``card`` |
| `protocol`, `rules`, `published` | protocols and published scores, read from YAML |
| `request`, `runner` | what is asked for; from datasets and a model, or images, to result file and report |
| `datasets` | readers of MS-COCO, CUB, the AttnGAN layout, folders and shards; lists of prompts |
| `groups` | a group of prompts with its real and generated images, and their feature stores |
| `image_sources`, `generation`, `external`, `training_images` | images of files, of a model, of another system |
| `extractors` | images to features |
| `features`, `blur` | features on disk, chunk by chunk, by any number of processes |
| `metrics`, `scores`, `moments` | torchmetrics metrics; feature stores to scores; moments that add up |
| `selfcheck` | what must hold of the real images before anything is generated |
| `memorization` | the nearest image of a training set: copies and overlaps |
| `comparison`, `report`, `sweeps` | result files that belong together, to tables and figures |
| `documents`, `plots`, `sheets` | documents in two forms; figures; images with captions below |
| `data_files`, `provenance` | data files of the package; digests and versions |

The schema of a result file is that of `dalle_zoo.results`.
"""
