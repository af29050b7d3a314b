"""Which extractors a protocol needs, and opening them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dalle_zoo.paths import user_path
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.extractors import Extractor, ExtractorFileError, load_extractor
from dalle_zoo_eval.extractors.inception import WEIGHTS_2015, WEIGHTS_DMGAN
from dalle_zoo_eval.extractors.model_parts import MODEL_PARTS, open_model_part
from dalle_zoo_eval.generation import model_sha256
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.frechet import FID_FAMILIES
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.rules import ExtractorRule, MetricRule

RANKER = "ranker"
PUBLISHED = {"inception-2015": (WEIGHTS_2015,), "dmgan": WEIGHTS_DMGAN}
"""Equivalent files of the networks that are what their name says with these weights alone."""
FILES = {
    **{name: str(files[0]) for name, files in PUBLISHED.items()},
    "clip": "clip, a CLIP folder as transformers writes it, such as openai/clip-vit-base-patch32",
    RANKER: "ranker, the folder of a dalle-zoo model",
    "mobilenet": "mobilenet_v1_025_224.safetensors, MobileNet v1 of width 0.25 trained on ImageNet",
}
"""What to fetch for extractors that a protocol can need."""
DEFAULT_NAMES = {
    **{name: files[0].name for name, files in PUBLISHED.items()}, "mobilenet": "mobilenet_v1_025_224.safetensors"
}  # fmt: skip
"""Name in the folder of networks, where it is not that of the extractor."""
OTHER_INPUTS = frozenset({"images", "reference_images", "keys", "concepts", "captions", "targets", "real"})
"""Parameters of a metric's `update` that need no extractor; every other is a tensor that one gives."""


def networks_folder() -> Path:
    """Where files of extractors are searched: ``$DALLE_ZOO_NETWORKS``, or a folder of the user's cache."""
    given = os.environ.get("DALLE_ZOO_NETWORKS")
    return user_path(given, "DALLE_ZOO_NETWORKS") if given else Path.home() / ".cache" / "dalle-zoo" / "networks"


def needs_extractor(rule: MetricRule) -> bool:
    """Whether a metric takes tensors that an extractor gives."""
    return bool(METRICS.spec(rule.name).inputs - OTHER_INPUTS)


def extractors_of(rule: MetricRule, opened: Mapping[str, Extractor]) -> list[str]:
    """Opened extractors whose features a metric takes: those of its rule, or every one that is no Inception."""
    if not needs_extractor(rule):
        return []
    names = rule.extractor or [name for name in opened if name not in (*FID_FAMILIES, *MODEL_PARTS)]
    return [name for name in names if name in opened]


def needed_extractors(protocol: Protocol) -> dict[str, list[str]]:
    """Extractors of a protocol, each with the metrics that need it."""
    needed: dict[str, list[str]] = {}
    for rule in protocol.metrics:
        for name in rule.extractor if needs_extractor(rule) else ():
            if rule.name not in needed.setdefault(name, []):
                needed[name].append(rule.name)
    return needed


def expected_digests(protocol: Protocol, name: str) -> tuple[str, ...]:
    """sha256 of the weights that an extractor may have: of the protocol, or of the published files; empty if any."""
    stated = protocol.extractors.get(name, ExtractorRule()).sha256
    return (stated,) if stated else tuple(file.sha256 for file in PUBLISHED.get(name, ()))


def open_extractor(protocol: Protocol, name: str, location: Path, *, device: str = "cpu") -> Extractor:
    """Opens one extractor with the weights that a protocol fixes; errors as in `load_extractor`."""
    return load_extractor(
        name, location, device, expected_sha256=protocol.extractors.get(name, ExtractorRule()).sha256
    )


def check_extractors(
    protocol: Protocol, locations: Mapping[str, Path], leave_out: Sequence[str], *, of_model: bool
) -> None:
    """Raises the errors of `open_extractors` that can be seen before a model is loaded.

    Args:
        protocol: Its metrics decide.
        locations: File or folder of every extractor.
        leave_out: Extractors that are needed and not at hand.
        of_model: Whether a model is measured, which may bring a ranker.
    """
    found = _located(protocol, locations, leave_out)
    _check_missing(protocol, {*found, *leave_out, *((RANKER,) if of_model else ())})
    for name, place in found.items():
        if not place.exists():
            raise ExtractorFileError(
                f"--network {name}={place}: there is no such file or folder; expected {FILES.get(name, name)}"
            )


def open_extractors(
    protocol: Protocol,
    locations: Mapping[str, Path],
    leave_out: Sequence[str],
    *,
    device: str = "cpu",
    pipe: DallePipeline | None = None,
) -> tuple[dict[str, Extractor], list[str]]:
    """Opens the extractors that a protocol needs, and others that are given.

    Args:
        protocol: Its metrics decide.
        locations: File or folder of every extractor.
        leave_out: Extractors that are needed and not at hand; their metrics are left out.
        device: Where they compute.
        pipe: The measured model, which brings its own parts and, where no other is given, its ranker.

    Returns:
        Extractors by name, and what is left out for lack of one.

    Raises:
        ExtractorFileError: An extractor is neither given nor left out (all such are reported together), or is another
            one than it should be, or is of no use to the protocol.
    """
    needed, locations = needed_extractors(protocol), _located(protocol, locations, leave_out)
    if RANKER in needed and RANKER not in {*locations, *leave_out} and pipe is not None and pipe.ranker is not None:
        assert pipe.folder is not None
        locations[RANKER] = pipe.folder
    known = {*locations, *leave_out}
    _check_missing(protocol, known)
    opened = {name: open_extractor(protocol, name, place, device=device) for name, place in locations.items()}
    left_out = [f"{', '.join(needed[name])}: the network {name} was left out" for name in leave_out]
    left_out += [
        f"{', '.join(needed[n])}: {'the model has no ranker' if n == RANKER else f'no {n} was given'}"
        for n in _absent(protocol, known)
        if n not in MODEL_PARTS
    ]
    for name in (name for name in _absent(protocol, known) if name in MODEL_PARTS):
        if pipe is None:
            left_out.append(f"{', '.join(needed[name])}: the images are of no model")
        else:
            opened[name] = open_model_part(name, pipe, model_sha256(pipe))
    if not opened and needed:
        raise ExtractorFileError(f"every network of {protocol.name} is left out: nothing can be measured")
    return opened, left_out


def _located(protocol: Protocol, locations: Mapping[str, Path], leave_out: Sequence[str]) -> dict[str, Path]:
    """Files of the extractors that are given, and of needed ones in the folder of networks."""
    needed, found = needed_extractors(protocol), dict(locations)
    for name in needed:
        place = networks_folder() / DEFAULT_NAMES.get(name, name)
        if name not in {*found, *leave_out, *MODEL_PARTS} and place.exists():
            found[name] = place
    _check_use(protocol, needed, found, leave_out)
    return found


def _absent(protocol: Protocol, known: Collection[str]) -> list[str]:
    return [name for name in needed_extractors(protocol) if name not in known]


def _check_missing(protocol: Protocol, known: Collection[str]) -> None:
    """Reports all extractors that are needed and are neither known, nor optional, nor parts of the model."""
    needed = needed_extractors(protocol)
    rules = {name: protocol.extractors.get(name, ExtractorRule()) for name in needed}
    missing = [n for n in _absent(protocol, known) if n not in MODEL_PARTS and not rules[n].optional]
    if missing:
        each = [f"\n  {n} (for {', '.join(needed[n])}): {FILES.get(n, n)}" for n in missing]
        raise ExtractorFileError(
            f"{protocol.name} needs networks that were not given:{''.join(each)}\n"
            f"Put them into {networks_folder()} under these names, or name each with --network NAME=PATH, or go "
            "without one and its scores with --leave-out NAME."
        )


def _check_use(
    protocol: Protocol, needed: Mapping[str, Sequence[str]], locations: Mapping[str, Path], leave_out: Sequence[str]
) -> None:
    for name in leave_out:
        if name in locations or name not in needed:
            reason = "it is given with --network" if name in locations else f"{protocol.name} does not need it"
            raise ExtractorFileError(f"--leave-out {name}: {reason}")
    takes_any = any(needs_extractor(rule) and not rule.extractor for rule in protocol.metrics)
    for name in locations:
        if name not in needed and (name in FID_FAMILIES or not takes_any):
            raise ExtractorFileError(f"--network {name}: no metric of {protocol.name} uses it")
