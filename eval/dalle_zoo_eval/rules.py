"""Parts of a protocol: rules of captions, metrics, groups, images, sampling, extractors, references and targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from dalle_zoo.results import IMAGE_SETS
from dalle_zoo_eval.choices import Choice, Crop, Seeds
from dalle_zoo_eval.data_files import (
    DataFileError,
    build,
    check_bool,
    check_choice,
    check_choices,
    check_integer,
    check_keys,
    check_rising,
    is_number,
    mapping,
    sequence,
)

if TYPE_CHECKING:  # listing protocols does not import torch
    from dalle_zoo.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """Captions from which images are generated."""

    rule: Choice
    """``one``: one caption per image, chosen by seed. ``unique``: all captions of the split, each text once.
    ``first``: the first caption of each sample of the group, in their order."""
    count: int | None = None
    """Number of captions; None takes all that the rule selects. Fewer captions than this are an error."""
    seed: int | None = None
    """Seed of the choice. Defaults to the seed of the protocol."""
    exclusions: bool = False
    """Whether a list of excluded images must be given, as for the deduplicated variant."""

    def __post_init__(self) -> None:
        check_choice("captions.rule", self.rule, get_args(Choice))
        if self.count is not None:
            check_integer("captions.count", self.count, 2)
        if self.seed is not None:
            check_integer("captions.seed", self.seed, 0)
        check_bool("captions.exclusions", self.exclusions)


@dataclass(frozen=True, kw_only=True)
class MetricRule:
    """A metric of a group, with its options."""

    name: str
    """Name in `METRICS`."""
    extractor: tuple[str, ...] = ()
    """Extractors of its features. Defaults to those of the metric, or to every available extractor outside the FID
    families."""
    images: tuple[str, ...] = ()
    """Image sets, of `IMAGE_SETS`. Defaults to the image sets of the metric."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the metric's class."""

    def __post_init__(self) -> None:
        from dalle_zoo_eval.metrics import METRICS  # imports torch, which listing protocols does not need

        check_choice("metrics", self.name, METRICS)
        spec = METRICS.spec(self.name)
        check_choices(f"metrics.{self.name}.images", self.images, IMAGE_SETS)
        if spec.extractor:
            check_choices(f"metrics.{self.name}.extractor", self.extractor, spec.extractor)
        object.__setattr__(self, "images", self.images or spec.images)
        object.__setattr__(self, "extractor", self.extractor or spec.extractor)
        try:
            METRICS[self.name](**self.options)
        except (TypeError, ValueError) as error:
            raise DataFileError(f"metrics.{self.name}: {error}") from None

    @classmethod
    def read(cls, value: object) -> MetricRule:
        """Builds a rule from an entry of a protocol or a result file: a name, or ``{name: {field: value, ...}}``."""
        if isinstance(value, str):
            return cls(name=value)
        given = mapping(value, "metrics")
        if "name" not in given:
            if len(given) != 1:
                raise DataFileError(f"metrics: expected a name or {{name: options}}, got {value!r}")
            ((name, options),) = given.items()
            given = {"name": name, "options": mapping(options, f"metrics.{name}")}
            for key in ("extractor", "images"):
                if key in given["options"]:
                    given[key] = given["options"].pop(key)
        for key in ("extractor", "images"):
            if isinstance(given.get(key), str):
                given[key] = [given[key]]
        return build(cls, given, "metrics")


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Prompts with their real images, and the metrics computed on them."""

    dataset: dict[str, str]
    """Split by layout, for every layout (name in `DATASETS`) in which the dataset may be stored; the first one is the
    default."""
    captions: CaptionRule
    """Captions from which images are generated."""
    metrics: tuple[MetricRule, ...]
    """Metrics of the group."""
    num_images: dict[str, int] = field(default_factory=dict)
    """Number of captioned images of the split by layout, if the dataset is known: another number stops the run."""
    samples: int | None = None
    """Maximum number of real images, in a seeded order; None takes all, which only ``first`` captions reorder."""
    prime: float = 0.0
    """Share of the rows of codes, from the top, that generation is given of the caption's real image (section 3.3 of
    the paper). Defaults to none."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise DataFileError("dataset is empty: give a split for at least one layout")
        from dalle_zoo_eval.datasets import DATASETS

        for layout, split in self.dataset.items():
            check_choice("dataset", layout, DATASETS)
            if not isinstance(split, str) or not split:
                raise DataFileError(f"dataset.{layout} must be the name of a split, got {split!r}")
        for layout, count in self.num_images.items():
            check_choice("num_images", layout, self.dataset)
            check_integer(f"num_images.{layout}", count, 2)
        if self.samples is not None:
            check_integer("samples", self.samples, 2)
        if not is_number(self.prime) or not 0 <= self.prime < 1:
            raise DataFileError(f"prime must be a share of rows, at least 0 and below 1, got {self.prime!r}")
        if not self.metrics:
            raise DataFileError("metrics is empty: name at least one")
        twice = [rule.name for number, rule in enumerate(self.metrics) if rule in self.metrics[:number]]
        if twice:
            raise DataFileError(f"metrics has a rule twice: {', '.join(twice)}")

    @property
    def layout(self) -> str:
        """The default layout."""
        return next(iter(self.dataset))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> GroupRule:
        """Builds a rule from plain data."""
        values = dict(values)
        if "captions" in values:
            values["captions"] = build(CaptionRule, values["captions"], "captions")
        for name in ("dataset", "num_images"):
            if name in values:
                values[name] = mapping(values[name], name)
        if "metrics" in values:
            values["metrics"] = [MetricRule.read(entry) for entry in sequence("metrics", values["metrics"])]
        return build(cls, values, where)


@dataclass(frozen=True, kw_only=True)
class ImageRule:
    """How real images are cropped and scaled."""

    crop: Crop = "center"
    """``none``; ``center``: the largest centered square; ``box``: a square around the bounding box (CUB)."""
    size: int | None = 256
    """Side of the images, pixels; None takes that of the model."""
    chunk: int | None = None
    """Number of real images processed and stored together. Defaults to the chunk of the generated ones."""

    def __post_init__(self) -> None:
        check_choice("image.crop", self.crop, get_args(Crop))
        for name in ("size", "chunk"):
            if getattr(self, name) is not None:
                check_integer(f"image.{name}", getattr(self, name), 1)

    @property
    def external_crop(self) -> Crop:
        """Crop of images that are not from the dataset and therefore have no bounding boxes."""
        return "center" if self.crop == "box" else self.crop


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How images are generated."""

    candidates: int = 1
    """Number of images N per caption, of which the model's ranker chooses one; 1 needs no ranker."""
    curve: tuple[int, ...] = ()
    """Numbers of candidates on the axis of figure 9(c); those above ``candidates`` are skipped."""
    chunk: int = 50
    """Number of captions whose images are processed and stored together; it affects the last bits of the numbers."""
    seeds: Seeds = "prompt"
    """``prompt``: the noise of an image depends on the number of its caption. ``chunk``: it depends on the group, the
    first caption of the chunk, and the place in the chunk."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample among the most likely tokens that reach this probability."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", check_integer("candidates", self.candidates, 1))
        check_rising("sampling.curve", self.curve, 1)
        check_integer("sampling.chunk", self.chunk, 1)
        check_choice("sampling.seeds", self.seeds, get_args(Seeds))
        for name, value in asdict(self.options).items():
            object.__setattr__(self, name, value)

    @property
    def options(self) -> SamplingOptions:
        """Distribution from which tokens are sampled; raises `DataFileError` for values that it rejects."""
        from dalle_zoo.sampling import SamplingOptions

        try:
            return SamplingOptions(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                guidance_scale=self.guidance_scale,
            )
        except (TypeError, ValueError) as error:
            raise DataFileError(str(error)) from None

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of candidates to evaluate, smallest first.

        Example:
            >>> SamplingRule(candidates=5, curve=(1, 2, 4, 8)).counts
            (1, 2, 4, 5)
        """
        return tuple(sorted({self.candidates, *(n for n in self.curve if n < self.candidates)}))


@dataclass(frozen=True, kw_only=True)
class ExtractorRule:
    """Weights that an extractor must have, and whether it is required."""

    sha256: str | None = None
    """Digest of the weights file, in hexadecimal; None accepts any file."""
    optional: bool = False
    """Whether its metrics are left out if it is not given."""

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise DataFileError(f"extractors: sha256 must be 64 digits of 0-9 and a-f, got {self.sha256!r}")
        check_bool("extractors.optional", self.optional)


@dataclass(frozen=True, kw_only=True)
class ReferenceRecord:
    """Recorded statistics of the real images under one extractor, for the self-check.

    Values that are None are not checked.
    """

    family: str
    """Name of the extractor."""
    mean_norm: float | None = None
    """Euclidean norm of the mean of the features."""
    trace: float | None = None
    """Trace of their covariance."""
    tolerance: float | None = None
    """Maximum relative difference of ``mean_norm`` and ``trace``."""

    def __post_init__(self) -> None:
        for name in ("mean_norm", "trace", "tolerance"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise DataFileError(f"reference.{name} must be a number above 0 or null, got {value!r}")
        if self.tolerance is None and (self.mean_norm, self.trace) != (None, None):
            raise DataFileError("reference.tolerance is missing: it is required with mean_norm or trace")


@dataclass(frozen=True, kw_only=True)
class TargetRule:
    """A value that a model is to reach, made of one score or of two."""

    name: str
    """Name for people."""
    group: str
    """Name of the group."""
    score: dict[str, Any]
    """Fields of the score, such as ``{metric: concept_accuracy, part: top5, images: generated}``."""
    required: float
    """Minimum value."""
    divided_by: dict[str, Any] = field(default_factory=dict)
    """Fields of another score, where they differ, by which it is divided; also a ``group``."""
    minus: dict[str, Any] = field(default_factory=dict)
    """Fields in which a second score differs, which is subtracted from the first."""

    def __post_init__(self) -> None:
        known = ("metric", "part", "images", "family", "blur", "candidates")
        for name, more in (("score", ()), ("divided_by", ("group",)), ("minus", ("group",))):
            check_keys(mapping(getattr(self, name), f"targets.{name}"), (*known, *more), f"targets.{name}")
        if not is_number(self.required):
            raise DataFileError(f"required must be a number, got {self.required!r}")
