"""Writes images in the layouts of GenEval 2, T2I-CompBench and EvalScope."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from dalle_zoo.files import atomic_write, write_json
from dalle_zoo.images import save_png
from dalle_zoo_eval.datasets import DatasetError, read_dataset
from dalle_zoo_eval.datasets.manifest import read_caption_file

LAYOUTS = ("geneval2", "t2i-compbench", "evalscope")


def images_by_prompt(place: Path) -> dict[str, list[Path]]:
    """Reads the images of each prompt, in their order.

    Args:
        place: Manifest of ``dalle-zoo generate --prompts``, its folder, or a folder with a text file per image.

    Raises:
        DatasetError: There is no such place, or an image has no prompt.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for item in read_dataset("place", None, str(place)).items:
        if not item.captions or not isinstance(item.image, Path):
            raise DatasetError(f"{place}: {item.key} has no prompt: give a manifest, or a text file for each image")
        found[item.captions[0]].append(item.image)
    return dict(found)


def export_layout(layout: str, place: Path, out: Path, prompts: Path | None = None) -> int:
    """Writes the images of a place in a layout.

    | layout | out |
    |---|---|
    | ``geneval2`` | JSON file: prompt to path of its first image, for ``evaluation.py --image_filepath_data`` |
    | ``t2i-compbench`` | folder with ``samples/PROMPT_000000.png``, for ``--out_dir`` |
    | ``evalscope`` | JSONL file with ``id``, ``prompt`` and ``image_path``, for ``general_t2i`` and others |

    Args:
        layout: One of `LAYOUTS`.
        place: As in `images_by_prompt`.
        out: File or folder to write.
        prompts: Prompts of the benchmark: lines, or JSONL. Defaults to those of the images.

    Returns:
        Number of images.

    Raises:
        DatasetError: A prompt has no image, or cannot be the name of a file where the layout needs that.
    """
    images = images_by_prompt(place)
    if prompts is not None:
        wanted = list(dict.fromkeys(read_caption_file(prompts)))
        missing = [prompt for prompt in wanted if prompt not in images]
        if missing:
            raise DatasetError(
                f"{place} has no image for {len(missing)} of {len(wanted)} prompts of {prompts}, "
                f"such as {missing[0]!r}"
            )
        images = {prompt: images[prompt] for prompt in wanted}
    match layout:
        case "geneval2":
            write_json(out, {prompt: str(paths[0].resolve()) for prompt, paths in images.items()})
            return len(images)
        case "t2i-compbench":
            return _compbench(images, out / "samples")
        case _:
            return _evalscope(images, out)


def _compbench(images: Mapping[str, Sequence[Path]], folder: Path) -> int:
    """Writes ``PROMPT_NUMBER.png``. The evaluation sorts by number, and takes the name up to the first underscore."""
    wrong = [prompt for prompt in images if set(prompt) & set("/_\0") or len(prompt.encode()) > 200]
    if wrong:
        raise DatasetError(f"prompt {wrong[0]!r} cannot be the name of an image of T2I-CompBench: no / and no _")
    number = 0
    for prompt, paths in images.items():
        for path in paths:
            with Image.open(path) as image:
                save_png(image.convert("RGB"), folder / f"{prompt}_{number:06d}.png")
            number += 1
    return number


def _evalscope(images: Mapping[str, Sequence[Path]], out: Path) -> int:
    rows = [(prompt, path) for prompt, paths in images.items() for path in paths]
    lines = [
        json.dumps({"id": number, "prompt": prompt, "image_path": str(path.resolve())}, ensure_ascii=False)
        for number, (prompt, path) in enumerate(rows)
    ]
    with atomic_write(out) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)
