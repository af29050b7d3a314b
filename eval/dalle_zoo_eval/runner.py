"""Runs a protocol on a model or on a folder of images, and writes the result file and the report."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.claims import Claims
from dalle_zoo.files import write_json
from dalle_zoo.images import save_png
from dalle_zoo.inspection import code_version
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.results import check_result
from dalle_zoo.sharing import Share
from dalle_zoo.values import as_integer
from dalle_zoo_eval.datasets import DatasetError, UnavailableGroupError, save_captions
from dalle_zoo_eval.datasets.digests import MEMO, remember
from dalle_zoo_eval.details import COPIES
from dalle_zoo_eval.external import read_from_folder
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.generation import BATCH
from dalle_zoo_eval.groups import GALLERY, Group, Prompts, choose, generate, image_size, read_prompts
from dalle_zoo_eval.image_sources import GeneratedSet
from dalle_zoo_eval.memorization import check_threshold, copies_network, find_copies, open_training
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.estimates import LEVEL, ROUNDS, SEED
from dalle_zoo_eval.opening import check_extractors, open_extractors
from dalle_zoo_eval.protocol import ALL, Protocol, find_protocol
from dalle_zoo_eval.provenance import (
    PACKAGES,
    bind,
    digest,
    gpu_name,
    package_versions,
    refuse_other_run,
)
from dalle_zoo_eval.report import Output, sheet_name, write_report_of
from dalle_zoo_eval.request import Request
from dalle_zoo_eval.sample_sheet import sample_sheet
from dalle_zoo_eval.scores import Scorer, remark_on, targets
from dalle_zoo_eval.selfcheck import SelfCheck, check_reference
from dalle_zoo_eval.statistics import NPZ_EXTRACTOR, StoredReference, load_statistics, save_statistics

log = logging.getLogger(__name__)


def evaluate(request: Request) -> dict[str, Any] | None:
    """Runs an evaluation, or continues an interrupted one with the same request.

    Processes share only the folder of the result, so they may run on several machines with a common disk.

    Args:
        request: What to evaluate, with what, and where to write.

    Returns:
        Contents of the result file; None in every process but the first, which only does its share of the work.

    Raises:
        ValueError: The request, the data or a file is wrong. Where possible, this is raised before any work begins.
        FileExistsError: The result file exists, holds something else, and ``overwrite`` is False.
    """
    run = Evaluation(request)
    run.extract()
    if request.share.rank != 0:
        log.warning("process %d of %d has done its share", request.share.rank, request.share.world)
        return None
    return run.write()


class Evaluation:
    """A running evaluation; see `evaluate`."""

    def __init__(self, request: Request) -> None:
        given = request.protocol
        usual = given if isinstance(given, Protocol) else find_protocol(given)
        self.request, self.protocol = request, usual.changed(**request.changes)
        self.out = Output.of(request.out)
        self.cache = request.cache or self.out.result.parent / ".cache"
        model = request.model or (usual.model if request.images is None else None)
        _check_request(request, usual, model)
        excluded = request.excluded(usual)
        check_extractors(self.protocol, request.networks, request.leave_out, of_model=model is not None)
        asked, self.unavailable = self.protocol, list[str]()
        prompts = self._all_prompts(usual, excluded, generates=model is not None)
        self.saved = load_statistics(request.reference) if request.reference is not None else None
        training = open_training(request.training, self.protocol.image) if request.training is not None else None
        self.external = {name: self._external(name, usual, of, excluded) for name, of in prompts.items()}
        self.pipe = DallePipeline.from_pretrained(model, device=request.device) if model is not None else None
        if self.saved is not None:
            self.saved.check_images(self.protocol.image.crop, image_size(self.protocol, self.pipe))
        self.extractors, self.left_out = open_extractors(
            asked, request.networks, request.leave_out, device=request.device, pipe=self.pipe
        )
        self.known: FeatureStore | None = None
        if training is not None:
            searching = copies_network(self.extractors, request.copies_network)
            networks = {searching: self.extractors[searching]}
            self.known = FeatureStore(training, networks, (0,), self._chunk(), self.cache, request.device)
        self.groups = [self._group(name, of_group) for name, of_group in prompts.items()]
        self._check_references()
        self.identity = self._identity()
        if not request.overwrite:
            self._refuse_other_result()
        for group in self.groups:
            remember(group.prompts.dataset.image_files, self.cache / MEMO)
        self.phases: dict[str, Any] = {}
        self.checks: list[SelfCheck] = []

    def _chunk(self) -> int:
        return self.protocol.image.chunk or self.protocol.sampling.chunk

    def _all_prompts(self, usual: Protocol, excluded: frozenset[str], *, generates: bool) -> dict[str, Prompts]:
        """Reads the datasets of all groups, and removes the groups that the user's own files do not allow."""
        found = {}
        for name in self.protocol.groups:
            try:
                found[name] = self._prompts(name, usual, excluded, generates=generates)
            except UnavailableGroupError as error:
                self.unavailable.append(f"the group {name}: {error}")
                log.warning("the group %s is left out: %s", name, error)
        if not found:
            reasons = "\n  ".join(self.unavailable)
            raise DatasetError(f"{self.request.data} allows no group of {self.protocol.name}:\n  {reasons}")
        self.protocol = replace(
            self.protocol,
            groups={name: rule for name, rule in self.protocol.groups.items() if name in found},
            targets=tuple(target for target in self.protocol.targets if target.group in found),
        )
        return found

    def _prompts(self, name: str, usual: Protocol, excluded: frozenset[str], *, generates: bool) -> Prompts:
        """Reads the dataset of a group and, if images will be generated, chooses its captions."""
        request, protocol = self.request, self.protocol
        prompts = read_prompts(
            protocol, name, layout=request.layout, data=request.data, excluded=excluded, cache=self.cache
        )
        rule, expected = protocol.groups[name], usual.groups[name].captions.count
        fixed = "place" not in rule.dataset  # a comparison is of any number
        if expected is None and fixed and any(item.captions for item in prompts.dataset.items):
            expected = len(choose(protocol, name, prompts, count=None).entries)
        captions = choose(protocol, name, prompts, count=rule.captions.count) if generates else None
        return replace(prompts, expected=expected or 0, captions=captions)

    def _external(self, name: str, usual: Protocol, prompts: Prompts, excluded: frozenset[str]) -> GeneratedSet | None:
        """The images of another system, read before any network is opened; None if a model is evaluated."""
        if self.request.images is None:
            return None
        rule, protocol = self.protocol.groups[name].captions, self.protocol
        found = read_from_folder(
            self.request.images, rule, protocol.image, prompts.dataset, name=protocol.name, excluded=excluded,
            seed=protocol.seed if rule.count != usual.groups[name].captions.count else None,
        )  # fmt: skip
        return replace(found, record={**found.record, **self.request.record})

    def _group(self, name: str, prompts: Prompts) -> Group:
        request, protocol, pipe = self.request, self.protocol, self.pipe
        if pipe is not None:
            size = protocol.image.size
            batch_size = BATCH if request.batch_size is None else request.batch_size
            generated = generate(pipe, protocol, name, prompts, size=size, batch_size=batch_size, cache=self.cache)
            generated = replace(generated, record={**generated.record, **request.record})
        else:
            external = self.external[name]
            assert external is not None
            generated = external
        stored = StoredReference(self.saved, self.extractors, self._chunk()) if self.saved is not None else None
        return Group(
            name, protocol, prompts, generated, self.extractors, pipe=pipe, cache=self.cache, device=request.device,
            reference=stored, more=list(self.known.extractors) if self.known is not None else (),
        )  # fmt: skip

    def _check_references(self) -> None:
        """Runs the checks of metrics whose reference is that of all groups, before any work begins."""
        items = [item for group in self.groups if GALLERY in group.stores for item in group.prompts.dataset.items]
        for rule in self.protocol.metrics:
            check = METRICS.spec(rule.name).check
            if check is not None and items:
                check([item.key for item in items], [item.concept for item in items], **rule.options)

    def _identity(self) -> dict[str, Any]:
        """Returns what identifies the evaluation of a result folder; more extractors may be added later."""
        return {
            "protocol": asdict(self.protocol),
            "source": {group.name: group.generated.source.identity for group in self.groups},
            "dataset": {group.name: group.prompts.sha256 for group in self.groups},
            **({"reference": self.saved.sha256} if self.saved is not None else {}),
            "excluded": {
                g.name: digest(sorted(g.prompts.excluded)) if g.prompts.excluded else None for g in self.groups
            },
        }

    def _refuse_other_result(self) -> None:
        """Raises an error if the output folder holds another evaluation, or the result file is another file."""
        refuse_other_run(self.out.folder, self.identity)
        if self.request.share.rank == 0 and self.out.result.exists() and not self.out.identity.exists():
            raise FileExistsError(f"{self.out.result} already exists: choose another --out or pass --overwrite")

    # ------------------------------------------------------------ features

    def extract(self) -> None:
        """Computes this process's share of the features: real images with their self-check, then all other images.

        Raises:
            SelfCheckError: The real images fail the self-check; nothing is generated.
        """
        request = self.request
        if self.saved is None:
            self._phase("reference", "real")
        if self.protocol.selfcheck:
            for group in self.groups:
                self._check_before_sampling(group)
        if request.share.rank == 0:
            bind(self.out.folder, self.identity)
        self._phase("generated", "generated")
        self._phase("reconstructions", "reconstructed")
        self._phase("gallery", GALLERY)
        if self.known is not None:
            self.phases["training"] = _run(self.known, request.share, label="training images")

    def _phase(self, label: str, images: str) -> None:
        """Computes the features of an image set of all groups."""
        stores = {group.name: group.stores[images] for group in self.groups if images in group.stores}
        if not stores:
            return
        times = []
        for name, store in stores.items():
            folder = None
            if images == "generated" and self.request.save_images:
                folder = self.out.folder / "images" / ("" if name == ALL else name)
            times.append(
                _run(store, self.request.share, label=label if name == ALL else f"{label} {name}", images=folder)
            )
        seconds, count = sum(t["seconds"] for t in times), sum(t["images"] for t in times)
        self.phases[label] = {"images": count, "seconds": seconds, "images_per_second": count / seconds}

    def _check_before_sampling(self, group: Group) -> None:
        """Checks the real images before any process generates images.

        One process checks while the others wait for its lock. The lock is released when its owner ends, so that no
        process waits for one that no longer exists. The first process, which writes the result, always checks itself.
        """
        reference, items, share = group.reference, group.prompts.samples, self.request.share
        fixed = {
            "protocol": asdict(self.protocol), "reference": reference.identities,
            "concepts": [item.concept for item in items],
        }  # fmt: skip
        passed = self.cache / f"selfcheck-{digest(fixed)[:16]}.json"
        if share.rank != 0 and passed.is_file():
            return
        self.cache.mkdir(parents=True, exist_ok=True)  # stored statistics leave nothing to put there
        with Claims() as claims:
            claims.take(passed.with_suffix(".claim"), wait=True)
            if share.rank != 0 and passed.is_file():  # while we waited
                return
            reference.run(Share(), label="reference")  # the chunks that other processes have not computed yet
            rule = self.protocol.groups[group.name]
            found = check_reference(
                reference, self.protocol, items, known=bool(rule.num_images), exclusions=rule.captions.exclusions
            )
            write_json(passed, found.checks)
            self.checks.append(found)

    # ------------------------------------------------------------ results

    def write(self) -> dict[str, Any]:
        """Computes the scores and writes sheets, report and, last of all, the result file.

        If the result file is missing, other files in the folder are from an interrupted run and are replaced.

        Returns:
            Contents of the result file.
        """
        request, out = self.request, self.out
        left_out = [*self.unavailable, *self.left_out, *(line for check in self.checks for line in check.left_out)]
        scores: list[dict[str, Any]] = []
        notes = self._notes()
        for group in self.groups:
            scorer = Scorer(group, self.groups)
            scores += scorer.score()
            left_out += [line for line in scorer.left_out if line not in left_out]
            notes += [line for line in scorer.notes if line not in notes]
            if group.prompts.captions is not None:
                save_captions(group.prompts.captions, out.folder / _by_group("captions", group.name, ".jsonl"))
        # Of a comparison, the images of both sides are shown next to each other.
        right = request.dataset_record.get("name")
        sheets = [
            save_png(sample_sheet(group, self.protocol, right=right), out.folder / sheet_name(group.name))
            for group in self.groups
        ]
        memorization = None
        if self.known is not None:
            # Only in the first group: protocols with several groups bring their own data.
            first, (network,) = self.groups[0], self.known.extractors
            real = first.stores["real"]
            sheets.append(out.folder / COPIES)
            memorization = find_copies(
                first.stores["generated"], real if network in real.extractors and self.saved is None else None,
                self.known, keys=first.generated.keys, threshold=request.threshold, sheet=sheets[-1],
            )  # fmt: skip
        result = self._record(scores, left_out)
        result |= {key: value for key, value in (("notes", notes), ("memorization", memorization)) if value}
        result = json.loads(json.dumps(result))  # as read from the file when the report is rendered again
        check_result(result)
        write_report_of([result], out.folder, sheets=sheets)
        if request.save_reference is not None:
            store = self.groups[0].stores["real"]
            save_statistics(store, request.save_reference, name=self.groups[0].prompts.dataset.name)
        write_json(out.result, result)
        return dict(result)

    def _notes(self) -> list[str]:
        """What readers of the scores must know of the images."""
        same = self.saved is None and any(g.generated.record.get("same_as_dataset") for g in self.groups)
        notes = ["both sides hold the same images: distances are 0 except for rounding"] if same else []
        if self.saved is not None and self.saved.path.suffix == ".npz":
            notes.append(
                f"{self.saved.path.name} does not say how its images were scaled: pytorch-fid and clean-fid scale "
                f"them in other ways than {NPZ_EXTRACTOR} here, which changes a FID by some tenths"
            )
        return notes

    def _record(self, scores: list[dict[str, Any]], left_out: list[str]) -> dict[str, Any]:
        request, names = self.request, dict.fromkeys(row["metric"] for row in scores)
        metrics: dict[str, dict[str, Any]] = {name: METRICS.spec(name).record() for name in names}
        groups = {group.name: group.record() for group in self.groups}
        for name in names:
            if remark := remark_on(name, scores):
                metrics[name]["remark"] = remark
        for record in groups.values():
            record["dataset"]["exclusions"] = request.exclusions.name if request.exclusions is not None else None
            record["dataset"] |= request.dataset_record
        result: dict[str, Any] = {
            "protocol": asdict(self.protocol),
            "source": self.groups[0].generated.record,
            "groups": groups,
            "extractors": {name: dict(extractor.record) for name, extractor in self.extractors.items()},
            "metrics": metrics,
            "scores": scores,
        }
        result["targets"] = targets(self.protocol, result)
        result |= {
            "selfcheck": [check for found in self.checks for check in found.checks],
            "reference_file": None if self.saved is None else self.saved.record(),
            "reference": [asdict(record) for found in self.checks for record in found.records],
            "bootstrap": {"level": LEVEL, "rounds": ROUNDS, "seed": SEED},
            "left_out": left_out,
            "speed": self._speed(),
            "code_version": code_version(),
            "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
            "device": torch.device(request.device).type,  # without the index, which differs between processes
            "run": {
                "command": request.command,
                "batch_size": None if self.pipe is None else request.batch_size or BATCH,
                "threads": torch.get_num_threads(),
                "processes": request.share.world,
                "gpu": gpu_name(request.device),
            },
            "date": datetime.now(UTC).date().isoformat(),
        }
        return result

    def _speed(self) -> dict[str, Any]:
        generated = [group.stores["generated"] for group in self.groups if group.stores["generated"].extractors]
        real = [group.reference for group in self.groups if group.reference.extractors]
        speed: dict[str, Any] = {
            **self.phases,
            "loading_seconds": {
                "reference": sum(store.loading_seconds() for store in real),
                "generated": sum(store.loading_seconds() for store in generated),
            },
        }
        if seconds := sum(store.seconds() for store in generated):
            speed["extractors_only_images_per_second"] = sum(len(store.source) for store in generated) / seconds
        return speed


def _run(store: FeatureStore, share: Share, *, label: str, images: Path | None = None) -> dict[str, Any]:
    """Computes missing features; returns the number of images, the wall-clock time in seconds, and the speed."""
    missing, start = store.missing(), time.perf_counter()
    store.run(share, label=label, images=images)
    seconds = time.perf_counter() - start
    return {"images": missing, "seconds": seconds, "images_per_second": missing / seconds}


def _check_request(request: Request, protocol: Protocol, model: str | None) -> None:
    if (model is None) == (request.images is None):
        raise ValueError("give either --model, which generates images, or --images, a folder of images")
    if request.images is not None and (request.batch_size is not None or set(request.changes) - {"captions"}):
        raise ValueError("--candidates, --batch-size and sampling options need --model, not --images")
    if request.save_reference is not None and request.reference is not None:
        raise ValueError("--save-reference writes the statistics of real images, and --reference replaces them")
    if len(protocol.groups) > 1 and (request.save_reference or request.reference) is not None:
        raise ValueError(
            f"{protocol.name} has several groups, each with its own real images: files of statistics are of one set"
        )
    check_threshold(request.threshold)
    if request.batch_size is not None:
        as_integer("batch_size", request.batch_size, least=1)


def _by_group(name: str, group: str, ending: str) -> str:
    return f"{name}{ending}" if group == ALL else f"{name}-{group}{ending}"
