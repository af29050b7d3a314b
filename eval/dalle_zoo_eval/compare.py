"""The command ``dalle-zoo compare``: two sets of images in one line, without a protocol file."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.parser import parser
from dalle_zoo.registry import suggest
from dalle_zoo.sharing import Share, device_of_environment
from dalle_zoo.values import as_integer
from dalle_zoo_eval.choices import Crop
from dalle_zoo_eval.command import add_copy_options, add_network_options, add_output_options, check_options
from dalle_zoo_eval.datasets import Item, read_dataset
from dalle_zoo_eval.datasets.manifest import read_caption_file
from dalle_zoo_eval.datasets.prompts import choose_items
from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.memorization import open_training
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.opening import check_extractors, needs_extractor, networks_folder
from dalle_zoo_eval.protocol import ALL, COPY, Protocol
from dalle_zoo_eval.report import Output, summary
from dalle_zoo_eval.request import Request
from dalle_zoo_eval.rules import CaptionRule, GroupRule, ImageRule, MetricRule
from dalle_zoo_eval.runner import evaluate
from dalle_zoo_eval.sides import EXPECTED, Side, find_side, generate_side, unpack
from dalle_zoo_eval.statistics import load_statistics

ALWAYS = ("frechet:pixels", "density:pixels", "coverage:pixels", "vendi:pixels")
"""Metrics without a network, which every comparison has unless ``--metrics`` says otherwise."""
WITH_NETWORKS = ("fid", "fd_dinov2", "cmmd", "kid", "is", "precision", "recall", "clip_score", "pick_score")
"""Metrics that are added where their networks are given or in the folder of networks."""
PREFERRED = ("dinov2", "inception-2015", "clip", "pixels")
"""Extractors of metrics that take any: the first one that is given or in the folder of networks."""
BOTH = ("vendi",)
"""Metrics of one set, which are computed of both sides."""


def main(arguments: list[str]) -> None:
    """Compares two sets: the entry point of ``dalle-zoo compare``.

    Args:
        arguments: Command line after ``dalle-zoo compare``.
    """
    options = _parser().parse_args(arguments)
    check_options(options)
    for option, least in (("captions", 2), ("size", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(options, option) is not None:
            as_integer(f"--{option.replace('_', '-')}", getattr(options, option), least=least)
    if options.training is not None and options.size is None:
        raise UserError("--training needs --size, the size at which images are compared with training images")
    sides = find_side(options.a, options.name_a), find_side(options.b, options.name_b)
    networks = dict(options.network)
    protocol = _protocol(options, sides, networks)
    check_extractors(protocol, networks, options.leave_out, of_model=False)  # all that is missing, before any work
    request = _request(options, sides, protocol, networks)
    result = evaluate(replace(request, command=shlex.join(["dalle-zoo", "compare", *arguments])))
    if result is None:
        return
    out = Output.of(options.out)
    print(summary([result]))  # noqa: T201 (what a command is for)
    for line in result["left_out"]:
        print(f"left out: {line}")  # noqa: T201
    print(f"result: {out.result}\nreport: {out.folder / 'report.html'}")  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    p = parser(
        "compare",
        "Compare two sets of images, A with the reference B. Each is one of:\n"
        f"{textwrap.fill(EXPECTED.removeprefix('expected '), 100)}\n\n"
        "  dalle-zoo compare generated/ real/\n"
        "  dalle-zoo compare generated.zip real/ --metrics fid,cmmd --network inception-2015=FILE\n"
        "  dalle-zoo compare my-model composition:val-styles --name-a 'my model' --out comparison.json\n"
        "  dalle-zoo compare generated/ statistics.safetensors\n\n"
        "Without --metrics, all metrics are computed whose networks are given or found in the usual folder, and\n"
        "those that need no network. A model generates one image per caption of the other side, or of --prompts.",
    )
    p.add_argument("a", metavar="A", help="the set that is evaluated")
    p.add_argument("b", metavar="B", help="the reference")
    p.add_argument(
        "--metrics",
        help=f"comma-separated metrics, such as fid,cmmd or frechet:clip for an extractor: {', '.join(_names())}",
    )
    p.add_argument("--name-a", help="name of A in the report [its last part]")
    p.add_argument("--name-b", help="name of B in the report [its last part]")
    add_network_options(p)
    p.add_argument("--size", type=int, help="crop and scale all images to this side, pixels [as they are]")
    p.add_argument("--captions", type=int, metavar="N", help="compare N images of each side, chosen by seed [all]")
    p.add_argument("--prompts", type=Path, help="captions for a model: a text file, or JSONL with prompt")
    p.add_argument("--seed", type=int, default=0, help="seed of generation and of --captions [0]")
    p.add_argument("--batch-size", type=int, help="number of images that a model generates at once [64]")
    add_copy_options(p)
    p.add_argument("--save-reference", type=Path, help="also write the statistics of B: NAME.safetensors")
    add_output_options(p, "comparison")
    return p


def _names() -> list[str]:
    """Metrics of images, or of images and captions; not those of parts of a model or of composed scenes."""
    usable = {"features", "text_features", "logits", "real", "captions", "concepts"}
    own = [spec.name for spec in EXTRACTORS.specs() if spec.model_part]
    return [n for n in METRICS if METRICS.spec(n).inputs <= usable and not set(METRICS.spec(n).extractor) & set(own)]


def _protocol(options: argparse.Namespace, sides: tuple[Side, Side], networks: Mapping[str, Path]) -> Protocol:
    """Returns the protocol of a comparison; its dataset is filled in when the sides are known to be usable."""
    available = _available(networks)
    if options.metrics is None:
        wanted = [*(n for n in WITH_NETWORKS if set(_extractors(n, available)) & set(available)), *ALWAYS]
    else:
        wanted = [name.strip() for name in options.metrics.split(",") if name.strip()]
    both = sides[1].kind != "statistics"
    crop: Crop = "none" if options.size is None else "center"
    group = GroupRule(
        dataset={"place": options.b},
        captions=CaptionRule(rule="one"),
        metrics=tuple(_rule(text, available, both=both) for text in dict.fromkeys(wanted)),
        samples=options.captions,
    )
    return Protocol(
        name="compare",
        title=f"{sides[0].name} against {sides[1].name}",
        groups={ALL: group},
        seed=options.seed,
        image=ImageRule(crop=crop, size=options.size),
        selfcheck=False,
    )


def _available(networks: Mapping[str, Path]) -> list[str]:
    """Returns the extractors that are given, in the folder of networks, or in the package."""
    specs = [spec for spec in EXTRACTORS.specs() if not spec.model_part]
    inside = networks_folder()
    return [s.name for s in specs if s.name in networks or s.bundled or (inside / s.default_file).exists()]


def _extractors(metric: str, available: Sequence[str]) -> tuple[str, ...]:
    """Returns the extractors of a metric: its own, the first of the FID families, or the best available one."""
    own, reads_captions = METRICS.spec(metric).extractor, "text_features" in METRICS.spec(metric).inputs
    if metric == "fid":
        return own[:1]
    if reads_captions and not own:
        return ("clip",)
    return own or (next(name for name in PREFERRED if name in available),)


def _rule(text: str, available: Sequence[str], *, both: bool) -> MetricRule:
    name, _, extractor = text.partition(":")
    if name not in _names():
        raise UserError(suggest("metric", name, _names()))
    if extractor and extractor not in EXTRACTORS:
        EXTRACTORS.spec(extractor)  # raises the error that suggests the nearest name
    rule = MetricRule(name=name, extractor=(extractor,) if extractor else _extractors(name, available))
    images = ("real", "generated") if name in BOTH and both else rule.images
    return replace(rule, images=images, extractor=rule.extractor if needs_extractor(rule) else ())


def _request(
    options: argparse.Namespace, sides: tuple[Side, Side], protocol: Protocol, networks: Mapping[str, Path]
) -> Request:
    """Returns the request, with archives unpacked and the images of models generated."""
    out = Output.of(options.out)
    cache = options.cache or out.result.parent / ".cache"
    places, records = _places(options, sides, protocol, cache)
    saved = Path(sides[1].location) if sides[1].kind == "statistics" else None
    group = replace(protocol.groups[ALL], dataset={"place": str(places[1])})
    return Request(
        protocol=replace(protocol, groups={ALL: group}),
        images=places[0],
        record={**records[0], "name": sides[0].name},
        dataset_record={} if saved else {**records[1], "name": sides[1].name},
        reference=saved,
        save_reference=options.save_reference,
        training=options.training,
        threshold=COPY if options.threshold is None else options.threshold,
        copies_network=options.copies_network,
        out=options.out,
        cache=cache,
        networks=networks,
        leave_out=tuple(options.leave_out),
        changes={} if options.captions is None else {"captions": options.captions},
        device=device_of_environment(options.device),
        share=Share.of_environment(),
        overwrite=options.overwrite,
    )


def _places(
    options: argparse.Namespace, sides: tuple[Side, Side], protocol: Protocol, cache: Path
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Returns the folder or manifest of each side, and what the result file says of its model.

    Everything that can be checked is checked before a model generates images, which can take hours.
    """
    first, second = sides
    models = [side for side in sides if side.kind == "model"]
    _check_sides(options, sides, models)
    places: dict[str, Path] = {}
    for side in sides:
        if side.kind in ("folder", "archive"):
            place = Path(side.location) if side.kind == "folder" else unpack(side.location, cache)
            places[side.location] = place
            _check_images(place, side, options.captions)
    records: dict[str, dict[str, Any]] = {}
    if models:
        captions = _captions(options, sides, places)
        if second.kind == "statistics":
            load_statistics(Path(second.location)).check_images(protocol.image.crop, protocol.image.size)
        if options.training is not None:
            open_training(options.training, protocol.image)
    for side in models:
        places[side.location], records[side.location] = generate_side(
            side.location, captions, cache, seed=options.seed, batch_size=options.batch_size,
            device=device_of_environment(options.device), share=Share.of_environment(),
        )  # fmt: skip
    if second.kind == "statistics":
        places[second.location] = places[first.location]  # a protocol names a dataset; none of its images is read
    return [places[s.location] for s in sides], [records.get(s.location, {}) for s in sides]


def _check_sides(options: argparse.Namespace, sides: tuple[Side, Side], models: Sequence[Side]) -> None:
    """Raises an error if the sides lack something, or options are for models and there is none."""
    first, second = sides
    if first.kind == "statistics":
        raise UserError(f"A is the file of statistics {first.location}: give the images as A, and the statistics as B")
    if models and options.prompts is None and (len(models) == 2 or second.kind == "statistics"):
        raise UserError(f"the model {models[0].location} needs captions: give them with --prompts FILE")
    for option, meaning in (("prompts", "captions for a model"), ("batch_size", "that of a model")):
        if getattr(options, option) is not None and not models:
            raise UserError(f"--{option.replace('_', '-')} is {meaning}, and neither side is a model: leave it out")


def _check_images(place: Path, side: Side, count: int | None) -> None:
    """Checks that a side has images, before networks or models are opened."""
    found = len(read_dataset("place", None, str(place)).items)
    if found < 2:
        raise UserError(f"{side.location} has {found} image: a comparison needs at least 2 of each side")
    if count is not None and found < count:
        raise UserError(f"{side.location} has {found} images, fewer than --captions {count}: choose a smaller number")


def _captions(options: argparse.Namespace, sides: tuple[Side, Side], places: Mapping[str, Path]) -> list[str]:
    """Returns the captions that models generate images from."""
    if options.prompts is not None:
        location, found = str(options.prompts), read_caption_file(options.prompts)
        items = [Item(key=str(number), image=None, captions=(text,)) for number, text in enumerate(found)]
    else:
        location = next(side.location for side in sides if side.location in places)
        items = [item for item in read_dataset("place", None, str(places[location])).items if item.captions]
    least = options.captions or 2
    if len(items) < least:
        raise UserError(
            f"{location} has {len(items)} captions to generate from, expected at least {least}: give more with "
            "--prompts FILE"
        )
    if options.captions is not None:
        items = choose_items(items, options.captions, options.seed)
    return [item.captions[0] for item in items]
