"""The judged side of an evaluation: what a model generates from a benchmark's captions, or images of a folder."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from dalle_zoo.files import sha256_file
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.benchmarks import (
    Benchmark,
    BenchmarkError,
    CaptionList,
    choose_captions,
    load_image,
    read_benchmark,
)
from dalle_zoo_eval.benchmarks.base import Item
from dalle_zoo_eval.benchmarks.images import stored_size
from dalle_zoo_eval.measuring import Measurement
from dalle_zoo_eval.protocol import Protocol, external_crop
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.subjects import GeneratedImages, ImageFiles, ImageSource, Sampling, model_sha256

log = logging.getLogger(__name__)

SHEET = 24
"""Samples on the sheet."""
PASS = re.compile(r"_s-?\d+_\d+$")
"""What AttnGAN's and DM-GAN's code puts behind the name of an image: sentence, -1 for all, and number of the pass."""
SIZES = 8
"""Sizes of external images that are told apart, the most frequent ones."""


@dataclass(frozen=True, kw_only=True)
class GeneratedSet:
    """Images that are judged, and what is known of them besides their pixels."""

    subject: ImageSource
    """The images."""
    record: dict[str, Any]
    """What the result file says of them."""
    keys: list[str]
    """Name of the benchmark's image whose caption was generated from, or of the image itself."""
    groups: list[str]
    """Class of what a caption describes, or else its key."""
    texts: list[str] | None
    """Caption of every image; None where they have none."""
    captions: CaptionList | None
    """The chosen captions; None for images of a folder."""


def generated_by_model(
    pipe: DallePipeline,
    protocol: Protocol,
    benchmark: Benchmark,
    *,
    excluded: frozenset[str],
    count: int | None,
    candidates: int | None,
    sampling: Mapping[str, Any],
    batch_size: int,
) -> GeneratedSet:
    """What a model generates from captions of a benchmark.

    Args:
        pipe: The model.
        protocol: Chooses captions and numbers of candidates.
        benchmark: Whose captions.
        excluded: Keys of images that are left out.
        count: Captions instead of the protocol's number.
        candidates: Images of a caption instead of the protocol's number.
        sampling: Fields of `Sampling` that are not plain sampling's.
        batch_size: Images generated at once.
    """
    rule = protocol.captions
    wanted = count if count is not None else rule.count
    chosen = choose_captions(benchmark, count=wanted, rule=rule.rule, seed=rule.seed, exclude=excluded)
    candidates = candidates if candidates is not None else protocol.sampling.candidates
    curve = protocol.sampling.counts(candidates)
    fixed = Sampling(candidates=candidates, curve=curve, **{"seed": rule.seed, **sampling})
    by_key = {item.key: item for item in benchmark.items}
    keys, texts = [key for key, _ in chosen.entries], [caption for _, caption in chosen.entries]
    assert pipe.folder is not None
    record = {
        "kind": "model",
        "name": pipe.folder.name,
        "weights_sha256": {n: d for n, d in model_sha256(pipe).items() if n.endswith(".safetensors")},
        "files_sha256": {n: d for n, d in model_sha256(pipe).items() if not n.endswith(".safetensors")},
        "sampling": asdict(fixed),
        "generated_at": list(pipe.image_size),
    }
    return GeneratedSet(
        subject=GeneratedImages(pipe, texts, fixed, size=protocol.image.size, batch_size=batch_size),
        record=record,
        keys=keys,
        groups=[by_key[key].group or key for key in keys],
        texts=texts,
        captions=chosen,
    )


def read_from_folder(
    folder: Path, protocol: Protocol, benchmark: Benchmark, *, excluded: frozenset[str], count: int | None
) -> GeneratedSet:
    """Images of a folder, in the order of their names, cropped and scaled as the benchmark's.

    An image that is named like one of the benchmark takes its class from it, and is left out if that one is. The
    published systems name theirs so, below folders of their own: ``single/KEY_s-1_0.png`` is of ``KEY``. So names
    without folders are compared, where the complete one is not found.

    Args:
        folder: Images, perhaps with captions beside them.
        protocol: Asks for a number of images.
        benchmark: What they will be compared with.
        excluded: Keys of images that are left out.
        count: Images instead of the protocol's number.

    Raises:
        BenchmarkError: The folder has another number of images, or images are to be left out and no name tells
            which.
    """
    found = read_benchmark("folder", folder, "all")
    namesakes = _namesakes(found, benchmark)
    if protocol.captions.exclusions and not namesakes:
        raise BenchmarkError(
            f"{protocol.name} leaves images out by name, and none of the {len(found.items)} in {folder} is named "
            f"like one of {benchmark.name}: call them KEY.png, such as {benchmark.items[0].key}.png"
        )
    left_out = {key for key, namesake in namesakes.items() if namesake.key in excluded}
    items = [item for item in found.items if item.key not in left_out]
    wanted = count if count is not None else protocol.captions.count
    if wanted is not None and len(items) != wanted:
        raise BenchmarkError(
            f"{folder} has {len(items)} images, {wanted} are asked for: give a folder of just those, or pass "
            f"--captions {len(items)} for a score that is marked as not comparable"
        )
    if found.root.resolve() == benchmark.root.resolve():
        log.warning("%s is the benchmark's own folder: its distance to itself says nothing", folder)
    texts = [item.captions[0] for item in items if item.captions]
    groups = {key: namesake.group or namesake.key for key, namesake in namesakes.items()}
    # Contents, not names: images that are generated again have the old names, and may have the old sizes.
    contents = digest([[item.key, sha256_file(item.image)] for item in items if item.image is not None])
    return GeneratedSet(
        subject=ImageFiles(items, external_crop(protocol.image), protocol.image.size, source=contents),
        record={
            "kind": "images",
            "name": folder.resolve().name,
            "weights_sha256": {},
            "sha256": contents,
            "sizes": _sizes(items),
            **found.left_out(),
            "named_as_benchmark": len(namesakes),
            "excluded": len(left_out),
            "captions_sha256": digest(texts) if texts else None,
        },
        keys=[item.key for item in items],
        groups=[groups.get(item.key, item.key) for item in items],
        texts=texts if len(texts) == len(items) else None,
        captions=None,
    )


def _namesakes(found: Benchmark, benchmark: Benchmark) -> dict[str, Item]:
    """Of images by their keys the image of the benchmark that has the same name; without those that have none."""
    complete = {item.key: item for item in benchmark.items}
    count = Counter(PurePosixPath(key).name for key in complete)
    bare = {name: item for key, item in complete.items() if count[name := PurePosixPath(key).name] == 1}
    pairs = {item.key: complete.get(item.key) or _by_name(item.key, bare) for item in found.items}
    return {key: namesake for key, namesake in pairs.items() if namesake is not None}


def _by_name(key: str, bare: Mapping[str, Item]) -> Item | None:
    name = PurePosixPath(key).name
    return bare.get(name) or bare.get(PASS.sub("", name))


def _sizes(items: Sequence[Item]) -> dict[str, int]:
    """Images of every stored size, most frequent first; what was scaled up was not sampled at the protocol's size."""
    found = Counter(f"{width}x{height}" for width, height in map(stored_size, items))
    common = dict(found.most_common(SIZES))
    rest = found.total() - sum(common.values())
    return {**common, "other": rest} if rest else common


def sample_sheet(judged: GeneratedSet, measured: Measurement, benchmark: Benchmark, protocol: Protocol) -> Image.Image:
    """The first judged images; where a model generated them, beside the benchmark's image of the same caption."""
    indices = range(min(SHEET, len(judged.subject)))
    size, crop = protocol.image.size, protocol.image.crop
    sets = [measured.images(indices)]
    if judged.captions is not None:
        by_key = {item.key: item for item in benchmark.items}
        sets.append([load_image(by_key[judged.keys[i]], crop, size) for i in indices])
    names = judged.texts if judged.texts is not None else judged.keys
    stacked = [torch.stack([_resized(image, size) for image in images]) for images in sets]
    return comparison_sheet(*stacked, captions=names[: len(indices)], scale=1)


def _resized(image: torch.Tensor, side: int) -> torch.Tensor:
    pixels = image[None].float() / 255
    if image.shape[1:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    return pixels[0]
