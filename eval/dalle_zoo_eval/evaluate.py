"""Runs a protocol from data set and model, or folder of images, to result file and report."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.files import write_json
from dalle_zoo.images import save_png
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.benchmarks import (
    Benchmark,
    BenchmarkError,
    Item,
    check_exclusions,
    choose_captions,
    load_exclusions,
    read_benchmark,
    save_captions,
)
from dalle_zoo_eval.benchmarks.contents import MEMO, remember
from dalle_zoo_eval.claims import Claims
from dalle_zoo_eval.judged import GeneratedSet, generated_by_model, read_from_folder, sample_sheet
from dalle_zoo_eval.judges import open_networks
from dalle_zoo_eval.measures.frechet import LEVEL, ROUNDS, SEED
from dalle_zoo_eval.measuring import Measurement, Share, bind, refuse_other_run
from dalle_zoo_eval.memorization import check_threshold, find_copies, measured_training
from dalle_zoo_eval.protocol import COPY, Protocol, find_protocol
from dalle_zoo_eval.provenance import PACKAGES, code_version, digest, gpu_name, package_versions
from dalle_zoo_eval.report import COPIES, SAMPLES, write_report
from dalle_zoo_eval.scoring import Scorer
from dalle_zoo_eval.selfcheck import SelfCheck, check_reference
from dalle_zoo_eval.subjects import BATCH, ImageFiles

log = logging.getLogger(__name__)

RESULT = "result.json"
"""Name of the result file."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and with what."""

    protocol: str
    """Name or YAML file."""
    data: Path
    """Folder of the benchmark."""
    out: Path
    """Folder of the result."""
    model: str | None = None
    """Model that samples, or else"""
    images: Path | None = None
    """folder of images that were generated elsewhere."""
    layout: str | None = None
    """Layout of the benchmark. Defaults to the protocol's usual one."""
    networks: Mapping[str, Path] = field(default_factory=dict)
    """File or folder of every network."""
    leave_out: tuple[str, ...] = ()
    """Networks that the protocol needs and that are not at hand: their metrics are left out."""
    exclusions: Path | None = None
    """List of images of the benchmark to leave out."""
    captions: int | None = None
    """Captions instead of the protocol's number, for a try; the report marks such a score."""
    candidates: int | None = None
    """Images generated of a caption instead of the protocol's number."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Temperature, top_k, top_p, guidance and seed, where they are not plain sampling's."""
    training: str | None = None
    """Training images for the memorization check: folder, shards, or a pattern of shards."""
    threshold: float = COPY
    """Cosine from which an image counts as a copy."""
    copies_network: str | None = None
    """Network that looks for copies; Inception, or else the first one, if missing."""
    save_images: bool = False
    """Whether PNG files of the judged images are written too, while they are measured."""
    cache: Path | None = None
    """Folder of measured chunks, which several evaluations may share. Defaults to a folder next to the result."""
    device: str = "cpu"
    """Where the networks compute."""
    batch_size: int | None = None
    """Images generated at once. Defaults to `BATCH`."""
    share: Share = field(default_factory=Share)
    """Which part of the work this process begins with."""
    command: str | None = None
    """Command line that asks for it, for the record."""

    @property
    def images_per_batch(self) -> int:
        """Images that a model generates at once."""
        return BATCH if self.batch_size is None else self.batch_size


def evaluate(request: Request) -> dict[str, Any] | None:
    """Evaluates; the same request again goes on where a killed one stood.

    Returns:
        What the result file holds; None in a process other than the first, whose work ends with its share.

    Raises:
        ValueError: The request, the data, or a file does not fit; before any work begins wherever that can be seen.
    """
    protocol = find_protocol(request.protocol)
    if (request.model is None) == (request.images is None):
        raise ValueError("give either --model, which generates, or --images, a folder of images")
    check_threshold(request.threshold)
    layout = request.layout or protocol.layout
    split, excluded = protocol.split(layout), _exclusions(protocol, request)
    pipe = DallePipeline.from_pretrained(request.model, device=request.device) if request.model is not None else None
    networks, left_out = open_networks(
        protocol, request.networks, request.leave_out, device=request.device, own_ranker=pipe
    )
    benchmark = read_benchmark(layout, request.data, split)
    check_exclusions(benchmark, excluded)
    cache, chunk = request.cache or request.out / ".cache", protocol.sampling.chunk
    source = benchmark.sha256(cache / MEMO)
    reference = _reference(protocol, layout, benchmark, excluded, source)
    judged = _judged(request, protocol, pipe, benchmark, excluded)
    identity = _identity(protocol, judged, source, excluded)
    refuse_other_run(request.out, identity)

    real = Measurement(reference, networks, protocol.blur, chunk, cache, request.device)
    generated = Measurement(judged.subject, networks, protocol.blur, chunk, cache, request.device)
    known = None
    if request.training is not None:
        known = measured_training(
            request.training, protocol.image, networks, chunk, cache, request.device, request.copies_network
        )
    remember(benchmark.images, cache / MEMO)
    phases = {"reference": _run(real, request.share, label="reference")}
    check = _check_before_sampling(real, protocol, reference.items, cache, request.share)
    if request.share.rank == 0:
        bind(request.out, identity)
    images = request.out / "images" if request.save_images else None
    phases["judged"] = _run(generated, request.share, label="judged", images=images)
    if known is not None:
        phases["training"] = _run(known, request.share, label="training images")
    if request.share.rank != 0:
        log.warning("process %d of %d has done its share", request.share.rank, request.share.world)
        return None
    if judged.captions is not None:
        save_captions(judged.captions, request.out / "captions.jsonl")
    scorer = Scorer(protocol, generated, real, captions=judged.texts, groups=judged.groups)
    result: dict[str, Any] = {
        "protocol": asdict(protocol),
        "subject": judged.record,
        "benchmark": _benchmark_record(benchmark, source, protocol, judged, request.exclusions, excluded),
        "networks": {name: dict(network.record) for name, network in networks.items()},
        "selfcheck": check.checks,
        "reference": [asdict(record) for record in check.records],
        "scores": scorer.score(),
        "bootstrap": {"level": LEVEL, "rounds": ROUNDS, "seed": SEED},
    }
    sheet = sample_sheet(judged, generated, benchmark, protocol)
    sheets = [save_png(sheet, request.out / SAMPLES)]
    if known is not None:
        sheets.append(request.out / COPIES)
        result["memorization"] = find_copies(generated, known, threshold=request.threshold, sheet=sheets[-1])
    result |= {
        "speed": {
            **phases,
            "showing_seconds": {"reference": real.showing_seconds(), "judged": generated.showing_seconds()},
            "network_only_images_per_second": len(generated.subject) / generated.seconds(),
        },
        "left_out": [*left_out, *check.left_out, *scorer.left_out],
        "code_version": code_version(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "device": request.device,
        "run": {
            "command": request.command,
            "batch_size": None if pipe is None else request.images_per_batch,
            "threads": torch.get_num_threads(),
            "processes": request.share.world,
            "gpu": gpu_name(request.device),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(request.out / RESULT, result)
    write_report([request.out / RESULT], request.out, sheets=sheets)
    return result


def _run(measurement: Measurement, share: Share, *, label: str, images: Path | None = None) -> dict[str, Any]:
    """Runs a phase; the time of the clock that it took here, for what was still missing when it began."""
    missing, start = measurement.missing(), time.perf_counter()
    measurement.run(share, label=label, images=images)
    seconds = time.perf_counter() - start
    return {"images": missing, "seconds": seconds, "images_per_second": missing / seconds}


def _check_before_sampling(
    reference: Measurement, protocol: Protocol, items: Sequence[Item], cache: Path, share: Share
) -> SelfCheck:
    """Checks the reference, unless another process has; none goes on to the judged images before.

    Whoever comes first checks, while the others wait: a lock that ends with its owner, so that no process waits for
    one that is gone. The first process, which writes the result, always has a check of its own.
    """
    fixed = {"protocol": asdict(protocol), "reference": reference.identities, "groups": [item.group for item in items]}
    passed = cache / f"selfcheck-{digest(fixed)[:16]}.json"
    if share.rank != 0 and passed.is_file():
        return SelfCheck()
    with Claims() as claims:
        claims.take(passed.with_suffix(".claim"), wait=True)
        if share.rank != 0 and passed.is_file():  # while we waited
            return SelfCheck()
        reference.run(Share(), label="reference")  # what other processes have not done yet
        found = check_reference(reference, protocol, items)
        write_json(passed, found.checks)
        return found


def _judged(
    request: Request, protocol: Protocol, pipe: DallePipeline | None, benchmark: Benchmark, excluded: frozenset[str]
) -> GeneratedSet:
    if pipe is not None:
        return generated_by_model(
            pipe, protocol, benchmark, excluded=excluded, count=request.captions, candidates=request.candidates,
            sampling=request.sampling, batch_size=request.images_per_batch,
        )  # fmt: skip
    if request.candidates is not None or request.batch_size is not None or request.sampling:
        raise ValueError(
            "--candidates, --batch-size and the options of sampling belong to --model; --images are generated already"
        )
    assert request.images is not None
    return read_from_folder(request.images, protocol, benchmark, excluded=excluded, count=request.captions)


def _identity(protocol: Protocol, judged: GeneratedSet, source: str, excluded: frozenset[str]) -> dict[str, Any]:
    """What one folder of results holds. Networks may be added to it later."""
    return {
        "protocol": asdict(protocol),
        "subject": judged.subject.identity,
        "benchmark": source,
        "excluded": digest(sorted(excluded)) if excluded else None,
    }


def _benchmark_record(
    benchmark: Benchmark,
    source: str,
    protocol: Protocol,
    judged: GeneratedSet,
    exclusions: Path | None,
    excluded: frozenset[str],
) -> dict[str, Any]:
    rule = protocol.captions
    # What the protocol asks for, whatever --captions says: a report marks scores of another number of samples.
    right = rule.count
    if right is None and any(item.captions for item in benchmark.items):
        right = len(choose_captions(benchmark, count=None, rule=rule.rule, seed=rule.seed, exclude=excluded).entries)
    return {
        "name": benchmark.name,
        "sha256": source,
        "items": len(benchmark.items),
        **benchmark.left_out(),
        "excluded": sum(item.key in excluded for item in benchmark.items),
        "exclusions": exclusions.name if exclusions is not None else None,
        "exclusions_sha256": digest(sorted(excluded)) if excluded else None,
        "captions": right or 0,
        "captions_sha256": judged.captions.sha256 if judged.captions is not None else None,
    }


def _exclusions(protocol: Protocol, request: Request) -> frozenset[str]:
    if protocol.captions.exclusions and request.exclusions is None:
        raise ValueError(
            f"{protocol.name} leaves out images that overlap with the training set: give their list with "
            "--exclusions FILE (dalle-zoo overlap makes one)"
        )
    if request.exclusions is not None and not protocol.captions.exclusions:
        raise ValueError(f"{protocol.name} leaves no image out, so --exclusions would change what its name means")
    return load_exclusions(request.exclusions) if request.exclusions is not None else frozenset()


def _reference(
    protocol: Protocol, layout: str, benchmark: Benchmark, excluded: frozenset[str], source: str
) -> ImageFiles:
    """All images of the benchmark but those that are left out."""
    expected = protocol.images.get(layout, len(benchmark.items))
    if len(benchmark.items) != expected:
        first = f", such as {benchmark.skipped[0]}" if benchmark.skipped else ""
        raise BenchmarkError(
            f"{protocol.name} means the {expected} captioned images of {benchmark.name}, {benchmark.root} has "
            f"{len(benchmark.items)} ({len(benchmark.skipped)} were left out{first}): complete the data set, or write "
            "a protocol of another name"
        )
    items = [item for item in benchmark.items if item.image is not None and item.key not in excluded]
    if len(items) < 2:
        raise BenchmarkError(f"benchmark {benchmark.name} in {benchmark.root} has {len(items)} images: too few")
    boxless = [item.key for item in items if item.box is None]
    if protocol.image.crop == "box" and boxless:
        raise BenchmarkError(
            f"{protocol.name} crops images to their bounding boxes, and {len(boxless)} of {benchmark.name}, such as "
            f"{boxless[0]!r}, have none: is there a bounding_boxes.txt?"
        )
    return ImageFiles(items, protocol.image.crop, protocol.image.size, source=source)


def share_of_environment() -> Share:
    """The share that torchrun or another launcher gives this process."""
    return Share(rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")))


def device_of_environment(device: str) -> str:
    """``cuda`` becomes the GPU that torchrun gives this process."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device
