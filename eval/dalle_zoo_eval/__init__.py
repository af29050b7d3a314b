"""Evaluation of dalle-zoo models, and of images from anywhere.

A benchmark run is `evaluate`: `benchmarks`, `judged`, `judges`, then `measuring`, `selfcheck`, `scoring`, `report`.
``emoji64`` is a protocol of another kind: all of it is in `concepts`.

| module | what it holds |
|---|---|
| `command` | ``dalle-zoo eval``, ``report``, ``overlap`` and ``card`` |
| `evaluate` | a protocol from data and model, or folder of images, to result file and report |
| `protocol`, `published` | protocols and published scores, read from ``eval/protocols`` and ``eval/published`` |
| `benchmarks` | readers of MS-COCO, CUB, the AttnGAN layout and folders; lists of captions |
| `judged`, `subjects` | the judged images: what a model generates, or what a folder holds |
| `judges`, `networks` | the networks that look at images, and which of them a protocol needs |
| `blur` | Gaussian blur of several radii |
| `measuring`, `claims` | images to features on disk, chunk by chunk, by any number of processes |
| `statistics`, `measures` | moments that add up, and scores as pure functions |
| `scoring`, `selfcheck` | features to rows of scores, and what must hold of the reference first |
| `memorization`, `training_images` | the nearest image of a training set: copies and overlaps |
| `results`, `report`, `plots`, `documents` | result files to tables and figures |
| `rendering` | the report of any result file again |
| `concepts`, `metrics`, `evaluator` | protocols of the other kind, such as that of the bundled model |
| `sheets`, `shipped`, `provenance` | images with captions below; data files of the package; digests and versions |
"""
