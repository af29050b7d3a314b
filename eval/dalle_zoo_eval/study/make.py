"""Makes the folder of a study: the page with its images for raters, and ``study.json`` for the organizer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dalle_zoo.data.decoding import CorruptImageError, decode_image, read_image
from dalle_zoo.files import escape_surrogates, new_folder
from dalle_zoo.plain_data import MAX_BYTES
from dalle_zoo.seeds import seeded_rng
from dalle_zoo_eval.study.design import PAGE, RATERS, STUDY, Pair, Study, plan_raters, system_pairs
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.page import page_html
from dalle_zoo_eval.study.questions import PAPER, Question
from dalle_zoo_eval.study.sources import System, read_captions, read_system

TILES = 8
"""A scrambled image is divided into this many tiles along each side, which are permuted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study is made of."""

    systems: tuple[tuple[str, Path], ...]
    """Name and folder or manifest of each system."""
    captions: Path
    """File of captions."""
    questions: tuple[Question, ...] = PAPER
    title: str = "Which image is better?"
    votes: int = 5
    """Votes per pair and question. Defaults to 5, as in the paper."""
    controls: int = 10
    """Number of control pairs for every rater, at most one per caption. Defaults to 10."""
    num_captions: int | None = None
    """Number of captions to choose at random. Defaults to all."""
    per_rater: int | None = None
    """Largest number of pairs per rater, without controls. Defaults to all."""
    spare: int = 0
    """Further raters, who replace those that are excluded. Defaults to 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = [name for name, _ in self.systems]
        if len(names) < 2:
            raise StudyError(f"a study compares at least 2 systems, got {len(names)}")
        for name in names:
            if names.count(name) > 1:
                raise StudyError(f"two systems have the name {name!r}: give each its own with --name")
        for text in (self.title, *names):
            if escape_surrogates(text) != text:
                raise StudyError(f"{text!a} is not valid Unicode: choose another --title or --name")
        for field, least in (("votes", 1), ("controls", 0), ("num_captions", 1), ("per_rater", 1), ("spare", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise StudyError(f"--{field.replace('_', '-')} must be at least {least}, got {value}")


def make_study(plan: Plan, out: Path) -> Study:
    """Reads and checks all inputs, then writes the folder of the study.

    Images are decoded and written as PNG files without metadata, because metadata, formats and names of files can tell
    which system an image is from.

    Args:
        plan: What the study is made of.
        out: The folder; it must not exist or must be empty.

    Raises:
        StudyError: An input cannot be used.
        FileExistsError: The folder is not empty.
    """
    everything = read_captions(plan.captions)
    systems = [read_system(path, name, everything) for name, path in plan.systems]
    numbers = _choose(len(everything), plan)
    captions = [everything[number] for number in numbers]
    chosen = [System(name=s.name, images=tuple(s.images[n] for n in numbers)) for s in systems]
    with new_folder(out, marker=STUDY) as folder:
        images = folder / PAGE / "images"
        images.mkdir(parents=True)
        pairs = _pairs(chosen, plan, images)
        study = Study(
            title=plan.title,
            seed=plan.seed,
            votes=plan.votes,
            systems=tuple(system.name for system in chosen),
            questions=plan.questions,
            captions=tuple(captions),
            pairs=tuple(pairs),
            raters=plan_raters(pairs, seed=plan.seed, votes=plan.votes, per_rater=plan.per_rater, spare=plan.spare),
        )
        study.write(folder)
        _check_size(folder / STUDY)
        (folder / PAGE / "index.html").write_text(page_html(study), encoding="utf-8")
        addresses = "".join(f"index.html#{rater.code}\n" for rater in study.raters)
        (folder / RATERS).write_text(addresses, encoding="utf-8")
    return study


def _check_size(path: Path) -> None:
    """Raises an error if the file of a study is too large for its readers."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise StudyError(
            f"the study has {size / 2**20:.0f} MB, more than {MAX_BYTES / 2**20:.0f}: choose fewer captions with "
            "--num-captions, or fewer --votes"
        )


def _choose(count: int, plan: Plan) -> list[int]:
    """Returns the numbers of the captions of the study, in the order of the file."""
    if plan.num_captions is None:
        return list(range(count))
    if plan.num_captions > count:
        raise StudyError(f"--num-captions {plan.num_captions} is more than the {count} captions of {plan.captions}")
    return sorted(seeded_rng("study captions", plan.seed).sample(range(count), plan.num_captions))


def _pairs(systems: Sequence[System], plan: Plan, folder: Path) -> list[Pair]:
    """Writes the images and returns the pairs: all pairs of systems for each caption, then the controls."""
    count = len(systems[0].images)
    names: dict[tuple[int, int], str] = {}
    for system, each in enumerate(systems):
        for caption, path in enumerate(each.images):
            names[system, caption] = _write(_decode(path), (plan.seed, system, caption), folder)
    pairs = [
        _pair(caption, (names[one, caption], one), (names[other, caption], other))
        for caption in range(count)
        for one, other in system_pairs(len(systems))
    ]
    controlled = seeded_rng("study controls", plan.seed).sample(range(count), min(plan.controls, count))
    for number, caption in enumerate(controlled):
        system = number % len(systems)  # so that a control says nothing of a system
        image = _scrambled(_decode(systems[system].images[caption]), plan.seed, caption)
        name = _write(image, (plan.seed, "scrambled", caption), folder)
        pairs.append(_pair(caption, (names[system, caption], system), (name, None)))
    return pairs


def _pair(caption: int, one: tuple[str, int | None], other: tuple[str, int | None]) -> Pair:
    (first, first_system), (second, second_system) = sorted((one, other), key=lambda image: image[0])
    return Pair(caption=caption, images=(first, second), systems=(first_system, second_system))


def _decode(path: Path) -> Image.Image:
    try:
        return decode_image(read_image(path))
    except CorruptImageError as error:
        raise StudyError(f"{path}: {error}. Replace the image") from None


def _write(image: Image.Image, place: tuple[object, ...], folder: Path) -> str:
    """Writes an image without metadata under a hashed name, which is returned."""
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    data = io.BytesIO()
    clean.save(data, "PNG")
    name = f"{hashlib.sha256(repr(place).encode() + data.getvalue()).hexdigest()[:20]}.png"
    (folder / name).write_bytes(data.getvalue())
    return name


def _scrambled(image: Image.Image, seed: int, caption: int) -> Image.Image:
    """Returns an image whose tiles are permuted: the colors remain, the content does not."""
    side = [length // TILES for length in image.size]
    if min(side) == 0:
        raise StudyError(
            f"images of control pairs must have at least {TILES} x {TILES} pixels, got {image.size}: pass --controls 0"
        )
    corners = [(x * side[0], y * side[1]) for x in range(TILES) for y in range(TILES)]
    targets = list(corners)
    seeded_rng("study scrambled", seed, caption).shuffle(targets)
    result = image.copy()
    for (x, y), target in zip(corners, targets, strict=True):
        result.paste(image.crop((x, y, x + side[0], y + side[1])), target)
    return result
