"""Images of another system, read from a folder, as the generated set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from dalle_zoo_eval.datasets import DatasetError, EvalDataset, Item, read_dataset
from dalle_zoo_eval.datasets.digests import content_digests
from dalle_zoo_eval.datasets.images import stored_size
from dalle_zoo_eval.datasets.prompts import choose_items
from dalle_zoo_eval.image_sources import GeneratedSet, ImageFiles
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.rules import CaptionRule, ImageRule

PASS = re.compile(r"_s-?\d+_\d+$")
"""Suffix that the code of AttnGAN and DM-GAN adds to image names: sentence (-1 for all) and number of the pass."""
SIZES = 8
"""Number of sizes of external images that a result lists, the most frequent ones."""


def read_from_folder(
    folder: Path,
    rule: CaptionRule,
    image: ImageRule,
    dataset: EvalDataset,
    *,
    name: str,
    excluded: frozenset[str],
    seed: int | None = None,
) -> GeneratedSet:
    """Reads the images of a folder in the order of their names, cropped and scaled like those of the dataset.

    An image named after an image of the dataset gets its concept and is excluded with it. Published systems write such
    images to folders of their own: ``single/KEY_s-1_0.png`` belongs to ``KEY``. If a complete name is not found, the
    name without its folders is compared.

    Args:
        folder: Images, optionally with captions in text files of the same name; or a manifest, or its folder.
        rule: States the number of images.
        image: How they are cropped and scaled.
        dataset: Dataset that they will be compared with.
        name: Name of the protocol.
        excluded: Keys of excluded images.
        seed: Seed that chooses among more images than the rule asks for. Defaults to None: such a folder is refused.

    Raises:
        DatasetError: The folder has a different number of images, or images must be excluded and no name matches.
    """
    found = read_dataset("place", None, str(folder))
    namesakes = _namesakes(found, dataset)
    if rule.exclusions and not namesakes:
        raise DatasetError(
            f"{name} excludes images by name, but none of the {len(found.items)} in {folder} is named after an image "
            f"of {dataset.name}: name them KEY.png, such as {dataset.items[0].key}.png"
        )
    left_out = {key for key, namesake in namesakes.items() if namesake.key in excluded}
    items = [item for item in found.items if item.key not in left_out]
    wanted = rule.count
    if wanted is not None and seed is not None and len(items) > wanted:
        items = choose_items(items, wanted, seed)
    if wanted is not None and len(items) != wanted:
        raise DatasetError(
            f"{folder} has {len(items)} images, expected {wanted}: give a folder with exactly those, or pass "
            f"--captions {len(items)} for scores that are marked as not comparable"
        )
    texts = [item.captions[0] for item in items if item.captions]
    concepts = {key: namesake.concept or namesake.key for key, namesake in namesakes.items()}
    targets = {key: namesake.targets for key, namesake in namesakes.items()}
    # Contents, not names: images that are generated again have the same names, and perhaps the same sizes.
    files = [item.image for item in items if isinstance(item.image, Path)]
    digests = content_digests(files)
    contents = digest([[item.key, sha256] for item, sha256 in zip(items, digests, strict=True)])
    return GeneratedSet(
        source=ImageFiles(items, image.external_crop, image.size, source=contents),
        record={
            "kind": "images",
            "name": folder.resolve().name,
            "weights_sha256": {},
            "sha256": contents,
            "sizes": _sizes(items),
            **found.left_out(),
            "named_as_dataset": len(namesakes),
            "excluded": len(left_out),
            "same_as_dataset": sorted(digests) == sorted(content_digests(dataset.image_files)),
            "captions_sha256": digest(texts) if texts else None,
        },
        keys=[item.key for item in items],
        concepts=[concepts.get(item.key, item.key) for item in items],
        texts=texts if len(texts) == len(items) else None,
        targets=[targets.get(item.key, {}) for item in items],
    )


def _namesakes(found: EvalDataset, dataset: EvalDataset) -> dict[str, Item]:
    """Returns the dataset item of the same name by key; images without one are left out."""
    complete = {item.key: item for item in dataset.items}
    count = Counter(PurePosixPath(key).name for key in complete)
    bare = {name: item for key, item in complete.items() if count[name := PurePosixPath(key).name] == 1}
    pairs = {item.key: complete.get(item.key) or _by_name(item.key, bare) for item in found.items}
    return {key: namesake for key, namesake in pairs.items() if namesake is not None}


def _by_name(key: str, bare: Mapping[str, Item]) -> Item | None:
    name = PurePosixPath(key).name
    return bare.get(name) or bare.get(PASS.sub("", name))


def _sizes(items: Sequence[Item]) -> dict[str, int]:
    """Counts images by stored size, most frequent first: smaller ones were not generated at the protocol's size."""
    found = Counter(f"{width}x{height}" for width, height in map(stored_size, items))
    common = dict(found.most_common(SIZES))
    rest = found.total() - sum(common.values())
    return {**common, "other": rest} if rest else common
