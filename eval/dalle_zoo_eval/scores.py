"""Computes scores: passes stored features and annotations to the metrics of a group."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from dalle_zoo.results import scores_of, selected
from dalle_zoo_eval.extractors import EXTRACTORS, TextExtractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.groups import GALLERY, STORED_AS, Group
from dalle_zoo_eval.image_sources import EVERY
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.base import ANNOTATIONS, MetricSpec
from dalle_zoo_eval.metrics.estimates import Estimate
from dalle_zoo_eval.metrics.frechet import FrechetBase
from dalle_zoo_eval.moments import ROWS, StatisticsError, regrouped
from dalle_zoo_eval.opening import OTHER_INPUTS, extractors_of, needs_extractor
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.rules import MetricRule, TargetRule
from dalle_zoo_eval.statistics import StoredReference

# n samples, N candidates

Row = dict[str, Any]
TEXT_FEATURES = "text_features"
LISTS = ("keys", "concepts", "captions", "targets")
"""Metric inputs that are lists with one entry per image."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The images on which a score is computed."""

    images: str
    """Image set."""
    blur: int = 0
    """Radius of the Gaussian blur, pixels."""
    count: int = 1
    """Number of candidates from which the best is taken, or `EVERY` for all candidates."""


class Scorer:
    """Computes the scores of a group.

    Args:
        group: The group.
        groups: All groups, for metrics whose reference is that of all groups.
    """

    def __init__(self, group: Group, groups: Sequence[Group]) -> None:
        self.group, self.groups = group, groups
        self.rows: list[Row] = []
        self.left_out: list[str] = list(group.left_out)
        self.few: dict[str, tuple[int, int]] = {}
        self._texts: dict[tuple[str, str], Tensor] = {}

    def score(self) -> list[Row]:
        """Returns all scores; ``left_out`` then lists those that could not be computed, with reasons."""
        work: list[tuple[MetricRule, list[str], str | None]] = []
        for rule, sets in self.group.plan:
            names = extractors_of(rule, self.group.extractors) if needs_extractor(rule) else [None]
            work += [(rule, sets, extractor) for extractor in names if sets]
        for rule, sets, extractor in tqdm(work, desc=f"score {self.group.name}", unit="metric", disable=None):
            self._score(rule, sets, extractor)
        return self.rows

    def _score(self, rule: MetricRule, sets: Sequence[str], extractor: str | None) -> None:
        spec, kind = METRICS.spec(rule.name), METRICS[rule.name]
        name = rule.name if len(rule.extractor) == 1 or extractor is None else f"{rule.name} of {extractor}"
        options = dict(rule.options)
        if "reset_real_features" in inspect.signature(kind).parameters:
            options["reset_real_features"] = False
        metric, fed = kind(**options), None
        for view in self._views(spec, sets):
            try:
                if "real" in spec.inputs and (fed != view.blur or "reset_real_features" not in options):
                    metric = kind(**options)
                    self._feed_reference(metric, spec, extractor, view)
                    fed = view.blur
                self._add(rule, extractor, view, *self._compute(metric, spec, extractor, view))
            except StatisticsError as error:
                self._leave_out(f"{name}: {error}")
            for what, reason in getattr(metric, "left_out", ()):
                self._leave_out(f"{what} of {name}: {reason}")

    def _leave_out(self, line: str) -> None:
        if line not in self.left_out:  # points of a figure often lack a score for the same reason
            self.left_out.append(line)

    def _views(self, spec: MetricSpec, sets: Sequence[str]) -> Iterator[View]:
        """Yields the views of a metric. Those of one blur radius are consecutive, so that they share a reference."""
        counts = self.group.stores["generated"].counts
        for images in sets:
            if images in STORED_AS:
                every = getattr(self.group.generated.source, "every", False)
                yield View(images=images, count=EVERY if every else counts[-1])
            elif images != "generated":
                yield View(images=images)
            elif spec.sweep:
                yield from (View(images=images, count=count) for count in reversed(counts))
                yield from (View(images=images, blur=r, count=counts[-1]) for r in self.group.protocol.blur if r)
            else:
                yield View(images=images, count=counts[-1])

    @property
    def notes(self) -> list[str]:
        """Which metrics have fewer samples than they need."""
        return [
            f"{label}: {samples:,} samples, and it needs {least:,} to be compared"
            for label, (samples, least) in self.few.items()
        ]

    # ------------------------------------------------------------ feeding

    def _feed_reference(self, metric: Metric, spec: MetricSpec, extractor: str | None, view: View) -> None:
        """Updates a metric with its reference images."""
        stored = self.group.reference
        if isinstance(stored, StoredReference) and isinstance(metric, FrechetBase) and extractor is not None:
            if view.blur:
                raise StatisticsError(f"{stored.saved.path.name} holds no statistics at blur radius {view.blur}")
            metric.set_reference(stored.moments(extractor))
            return
        groups, images = ([self.group], "real") if spec.reference == "group" else (self.groups, GALLERY)
        for group in groups:
            scorer = self if group is self.group else Scorer(group, self.groups)
            for batch in scorer._batches(spec, extractor, View(images=images, blur=view.blur)):
                metric.update(**batch, real=True)

    def _compute(
        self, metric: Metric, spec: MetricSpec, extractor: str | None, view: View
    ) -> tuple[dict[str, float | Estimate], int]:
        """Computes a metric; with all candidates, its mean over them.

        Returns:
            Values by part or annotation, and the number of samples.
        """
        more = {"real": False} if "real" in spec.inputs else {}
        found: list[dict[str, float | Estimate]] = []
        samples = 0
        one_by_one = view.count == EVERY and not spec.every
        for candidate in range(self.group.protocol.sampling.candidates) if one_by_one else [None]:
            metric.reset()
            samples = 0
            for batch in self._batches(spec, extractor, view, candidate):
                metric.update(**batch, **more)
                samples += max((len(values) for values in batch.values()), default=0)
            computed = metric.compute()
            values = computed if isinstance(computed, dict) else {"value": computed}
            found.append({part: _estimate(value) for part, value in values.items()})
        if len(found) == 1:
            return found[0], samples
        # Parts that some candidate lacks have no mean, and neither do intervals.
        shared = [part for part in found[0] if all(part in values for values in found)]
        means = {part: mean(_value(values[part]) for values in found) for part in shared}
        return dict(means), samples

    def _batches(
        self, spec: MetricSpec, extractor: str | None, view: View, candidate: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yields arguments of the metric's `update`, batch by batch."""
        store: FeatureStore | StoredReference = self.group.stores[STORED_AS.get(view.images, view.images)]
        if view.images == "real":
            store = self.group.reference
        known, lists = self.group.known(view.images), dict[str, Any]()
        for name in (n for n in LISTS if n in spec.inputs):
            if known[name] is None:
                raise StatisticsError("the images have no captions")
            lists[name] = known[name]
        if TEXT_FEATURES in spec.inputs:
            lists[TEXT_FEATURES] = self._text_features(extractor, view.images)
        kinds = [k for k in spec.inputs - OTHER_INPUTS - {TEXT_FEATURES} if k != "real"]
        if extractor is not None and kinds:
            missing = sorted(set(kinds) - set(store.kinds(extractor)))
            if missing:
                raise StatisticsError(f"{extractor} has no output {', '.join(missing)}")
        parts = [store.read(extractor, f"{view.blur}/{view.count}/{kind}") for kind in kinds if extractor is not None]
        pixels = []
        if "images" in spec.inputs:
            pixels.append(self._images(self.group.stores[STORED_AS.get(view.images, view.images)], view, candidate))
        if "reference_images" in spec.inputs:
            pixels.append(self._images(self.group.stores["real"], View(images="real"), None))
        names = [*kinds, *(n for n in ("images", "reference_images") if n in spec.inputs)]
        chunks = self._selected(zip(*parts, *pixels, strict=True), candidate, len(parts))
        if spec.every and view.count != EVERY:
            chunks = ((*(t[:, None] for t in tensors[: len(parts)]), *tensors[len(parts) :]) for tensors in chunks)
        start = 0
        for tensors in self._paired(spec, view, regrouped(chunks, 0 if pixels else ROWS)):
            stop = start + len(tensors[0])
            yield {
                **dict(zip(names, tensors, strict=True)),
                **{name: values[start:stop] for name, values in self._limited(spec, view, lists).items()},
            }
            start = stop

    def _selected(
        self, chunks: Iterator[tuple[Tensor, ...]], candidate: int | None, num_features: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Selects one candidate from features of all candidates, (n, N, ...); None leaves the features unchanged."""
        for tensors in chunks:
            some = [t if candidate is None else t[:, candidate] for t in tensors[:num_features]]
            yield (*some, *tensors[num_features:])

    def _paired(
        self, spec: MetricSpec, view: View, batches: Iterator[tuple[Tensor, ...]]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Selects the real or reconstructed images of the prompts if the metric is paired."""
        if not self._limits(spec, view):
            yield from batches
            return
        places = self.group.paired_places()
        columns = [torch.cat(column) for column in zip(*batches, strict=True)]
        yield tuple(column[places] for column in columns)

    def _limits(self, spec: MetricSpec, view: View) -> bool:
        return spec.paired and view.images in ("real", "reconstructed")

    def _limited(self, spec: MetricSpec, view: View, lists: dict[str, Any]) -> dict[str, Any]:
        if not self._limits(spec, view):
            return lists
        places = self.group.paired_places()
        return {n: v[places] if isinstance(v, Tensor) else [v[i] for i in places] for n, v in lists.items()}

    def _text_features(self, extractor: str | None, images: str) -> Tensor:
        """Returns the features of the captions of an image set, (n, d)."""
        assert extractor is not None
        captions, reader = self.group.known(images)["captions"], self.group.extractors[extractor]
        if captions is None:
            raise StatisticsError("the images have no captions")
        if not isinstance(reader, TextExtractor):
            raise StatisticsError(f"{extractor} does not encode captions")
        key = extractor, images
        if key not in self._texts:
            self._texts[key] = reader.text_features(captions)
        return self._texts[key]

    def _images(self, store: Any, view: View, candidate: int | None) -> Iterator[Tensor]:
        """Yields the pixels of an image set chunk by chunk, uint8 (B, 3, H, W)."""
        for chunk in range(store.chunks):
            indices = range(chunk * store.chunk, min((chunk + 1) * store.chunk, len(store.source)))
            images = store.source.load(indices).images[view.count]
            if candidate is not None:
                images = images[candidate :: self.group.protocol.sampling.candidates]
            yield torch.stack(images)

    # ------------------------------------------------------------ rows

    def _add(
        self,
        rule: MetricRule,
        extractor: str | None,
        view: View,
        values: dict[str, float | Estimate],
        samples: int,
    ) -> None:
        generated = view.images in ("generated", *STORED_AS) and self.group.generated.record["kind"] == "model"
        every = self.group.protocol.sampling.candidates
        row: Row = {
            "metric": rule.name,
            "part": None,
            "family": self._family(extractor),
            "group": self.group.name,
            "images": view.images,
            "blur": view.blur,
            "candidates": (every if view.count == EVERY else view.count) if generated else None,
            "samples": samples,
        }
        spec = METRICS.spec(rule.name)
        if "real" in spec.inputs:
            all_groups = spec.reference != "group"
            size = sum(len(g.stores[GALLERY].source) for g in self.groups) if all_groups else self.group.reference_size
            row["reference_samples"] = size
        self._note_few(spec, min(samples, row.get("reference_samples") or samples))
        notes: Row = {name: values[name] for name in ("std", "at_infinity") if name in values}
        if "low" in values:
            notes["interval"] = [values["low"], values["high"]]
        if "rank_deficient" in values:
            notes["rank_deficient"] = True
        for part, value in values.items():
            if part not in ANNOTATIONS:
                own = {"interval": [value.low, value.high]} if isinstance(value, Estimate) else notes
                self.rows.append({**row, "part": None if part == "value" else part, "value": _value(value), **own})

    def _note_few(self, spec: MetricSpec, samples: int) -> None:
        if samples < min(spec.least, self.few.get(spec.label, (spec.least, 0))[0]):
            self.few[spec.label] = samples, spec.least

    def _family(self, extractor: str | None) -> str | None:
        if extractor is not None and EXTRACTORS.spec(extractor).model_folder:  # each model has its own weights
            return f"{extractor} {str(self.group.extractors[extractor].record['sha256'])[:8]}"
        return extractor


def targets(protocol: Protocol, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the targets of a protocol with the reached values.

    Args:
        protocol: Protocol with targets.
        result: Result with scores.

    Returns:
        For every target whose scores exist its ``name``, the ``required`` and ``reached`` values, and whether it is
        ``met``.
    """
    scores, rows = scores_of(result), []

    def value(rule: TargetRule, change: Mapping[str, Any]) -> float:
        found = selected({"group": rule.group, **rule.score, **change}, scores)
        return found[0].value if len(found) == 1 else math.nan

    for rule in protocol.targets:
        reached = value(rule, {})
        if rule.divided_by:
            reached /= value(rule, rule.divided_by) or math.nan
        if rule.minus:
            reached -= value(rule, rule.minus)
        if math.isfinite(reached):
            met = reached >= rule.required
            rows.append({"name": rule.name, "required": rule.required, "reached": reached, "met": met})
    return rows


def remark_on(metric: str, scores: Sequence[Mapping[str, Any]]) -> str:
    """Returns the remark of a metric on its scores; empty if there is none."""
    remark = METRICS.spec(metric).remark
    values: dict[str, dict[str, float]] = {}
    for row in scores:
        if row["metric"] == metric and row["part"] is not None:
            values.setdefault(row["group"], {})[row["part"]] = row["value"]
    return str(remark(values)) if remark is not None and values else ""


def _finite(value: float) -> float:
    """Returns a score; raises `StatisticsError` if it is not finite, which a result file cannot hold."""
    if not math.isfinite(value):
        raise StatisticsError(f"the score is {value}, which is not finite")
    return value


def _estimate(computed: Any) -> float | Estimate:
    """Converts a computed value: a scalar to a number, a tensor (3,) to a number with its interval."""
    return Estimate(*computed.tolist()) if getattr(computed, "ndim", 0) else _finite(float(computed))


def _value(computed: float | Estimate) -> float:
    return computed.value if isinstance(computed, Estimate) else computed
