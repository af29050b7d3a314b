"""Determines the extractors that a protocol needs, and opens them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dalle_zoo.paths import user_path
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.extractors import EXTRACTORS, Extractor, ExtractorFileError, load_extractor
from dalle_zoo_eval.generation import model_sha256
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.rules import ExtractorRule, MetricRule

OTHER_INPUTS = frozenset({"images", "reference_images", "keys", "concepts", "captions", "targets", "real"})
"""Parameters of a metric's `update` that need no extractor; all others are tensors of an extractor."""


def networks_folder() -> Path:
    """Returns the folder of networks: ``$DALLE_ZOO_NETWORKS``, or a folder in the user's cache."""
    given = os.environ.get("DALLE_ZOO_NETWORKS")
    return user_path(given, "DALLE_ZOO_NETWORKS") if given else Path.home() / ".cache" / "dalle-zoo" / "networks"


def needs_extractor(rule: MetricRule) -> bool:
    """Returns whether a metric takes tensors of an extractor."""
    return bool(METRICS.spec(rule.name).inputs - OTHER_INPUTS)


def extractors_of(rule: MetricRule, opened: Mapping[str, Extractor]) -> list[str]:
    """Returns the opened extractors of a metric: those of its rule, or all but those of FID and model parts."""
    if not needs_extractor(rule):
        return []
    specs = [EXTRACTORS.spec(name) for name in opened]
    names = rule.extractor or [spec.name for spec in specs if not (spec.fid or spec.model_part)]
    return [name for name in names if name in opened]


def needed_extractors(protocol: Protocol) -> dict[str, list[str]]:
    """Returns the extractors of a protocol, each with the metrics that need it."""
    needed: dict[str, list[str]] = {}
    for rule in protocol.metrics:
        for name in rule.extractor if needs_extractor(rule) else ():
            if rule.name not in needed.setdefault(name, []):
                needed[name].append(rule.name)
    return needed


def expected_digests(protocol: Protocol, name: str) -> tuple[str, ...]:
    """Returns the accepted sha256 of an extractor: of the protocol, or of the published files; empty if any."""
    stated = protocol.extractors.get(name, ExtractorRule()).sha256
    return (stated,) if stated else tuple(file.sha256 for file in EXTRACTORS.spec(name).weights)


def open_extractor(protocol: Protocol, name: str, location: Path, *, device: str = "cpu") -> Extractor:
    """Opens one extractor with the weights that a protocol requires; errors as in `load_extractor`."""
    return load_extractor(
        name, location, device, expected_sha256=protocol.extractors.get(name, ExtractorRule()).sha256
    )


def check_extractors(
    protocol: Protocol, locations: Mapping[str, Path], leave_out: Sequence[str], *, of_model: bool
) -> None:
    """Raises those errors of `open_extractors` that do not depend on a loaded model.

    Args:
        protocol: Its metrics determine the extractors.
        locations: File or folder of every extractor.
        leave_out: Extractors to omit, with their metrics.
        of_model: Whether a model is evaluated, which may contain its own ranker.
    """
    found = _located(protocol, locations, leave_out)
    possible = [n for n in needed_extractors(protocol) if of_model and EXTRACTORS.spec(n).model_folder]
    _check_missing(protocol, {*found, *leave_out, *possible})
    for name, place in found.items():
        if not place.exists():
            raise ExtractorFileError(
                f"--network {name}={place}: there is no such file or folder; expected {EXTRACTORS.spec(name).source}"
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
        protocol: Its metrics determine the extractors.
        locations: File or folder of every extractor.
        leave_out: Extractors to omit, with their metrics.
        device: Device of the extractors.
        pipe: The evaluated model, which contains its own parts and, unless another is given, its ranker.

    Returns:
        Extractors by name, and what is left out because of missing ones.

    Raises:
        ExtractorFileError: An extractor is neither given nor left out (all such are reported together), has the wrong
            weights, or is not used by the protocol.
    """
    needed = needed_extractors(protocol)
    locations = _located(protocol, locations, leave_out, None if pipe is None else pipe.folder)
    known = {*locations, *leave_out}
    _check_missing(protocol, known)
    opened = {name: open_extractor(protocol, name, place, device=device) for name, place in locations.items()}
    left_out = [f"{', '.join(needed[name])}: the network {name} was left out" for name in leave_out]
    parts = [name for name in _absent(protocol, known) if EXTRACTORS.spec(name).model_part]
    for name in (name for name in _absent(protocol, known) if name not in parts):
        reason = f"the model has no {name}" if EXTRACTORS.spec(name).model_folder else f"no {name} was given"
        left_out.append(f"{', '.join(needed[name])}: {reason}")
    for name in parts:
        if pipe is None:
            left_out.append(f"{', '.join(needed[name])}: the images were not generated by a model")
        else:
            opened[name] = EXTRACTORS[name](pipe, model_sha256(pipe))
    if not opened and needed:
        raise ExtractorFileError(f"every network of {protocol.name} is left out: nothing can be evaluated")
    return opened, left_out


def _located(
    protocol: Protocol, locations: Mapping[str, Path], leave_out: Sequence[str], model: Path | None = None
) -> dict[str, Path]:
    """Returns the locations of given extractors, and of needed ones in the model or in the folder of networks."""
    needed, found = needed_extractors(protocol), dict(locations)
    for spec in (EXTRACTORS.spec(name) for name in needed if name not in {*found, *leave_out}):
        inside = [model / spec.model_folder] if model is not None and spec.model_folder else []
        bundled = [spec.bundled] if spec.bundled is not None else []
        places = [] if spec.model_part else [*inside, networks_folder() / spec.default_file, *bundled]
        if (place := next((p for p in places if p.exists()), None)) is not None:
            found[spec.name] = place
    _check_use(protocol, needed, found, leave_out)
    return found


def _absent(protocol: Protocol, known: Collection[str]) -> list[str]:
    return [name for name in needed_extractors(protocol) if name not in known]


def _check_missing(protocol: Protocol, known: Collection[str]) -> None:
    """Raises an error that lists all needed extractors that are neither known, nor optional, nor model parts."""
    needed = needed_extractors(protocol)
    rules = {name: protocol.extractors.get(name, ExtractorRule()) for name in needed}
    missing = [n for n in _absent(protocol, known) if not (EXTRACTORS.spec(n).model_part or rules[n].optional)]
    if missing:
        each = [f"\n  {n} (for {', '.join(needed[n])}): {EXTRACTORS.spec(n).source}" for n in missing]
        raise ExtractorFileError(
            f"{protocol.name} needs networks that were not given:{''.join(each)}\n"
            f"Put them into {networks_folder()} under these names, give each with --network NAME=PATH, or omit their "
            f"metrics with {' '.join(f'--leave-out {name}' for name in missing)}"
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
        if name not in needed and (EXTRACTORS.spec(name).fid or not takes_any):
            raise ExtractorFileError(f"--network {name}: no metric of {protocol.name} uses it")
