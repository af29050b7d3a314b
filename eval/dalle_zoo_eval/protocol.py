"""Protocols: everything besides the model that fixes a score, read from YAML.

The files lie in ``eval/protocols``; a file of one's own works as well. There are two kinds, told apart by the key
``kind``: a benchmark, read here, and ``concepts`` (`dalle_zoo_eval.concepts`), of which ``emoji64`` is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.shipped import DataFileError, check_keys, mapping, read_yaml, shipped_folder

LAYOUTS = ("coco", "cub", "attngan", "folder")
"""Layouts in which a benchmark may lie on disk."""
METRICS = ("fid", "is", "kid", "precision", "recall", "clip_score", "r_precision")
"""Metrics that a protocol may ask for."""
FID_FAMILIES = ("inception-2015", "dmgan")
"""Kinds of FID. Their scores differ by several points for the same images, so they never share a column."""
PUBLISHED = ("coco", "cub")
"""Tables of published scores."""

PINNED = ("clip", "ranker", "mobilenet")
"""Networks whose weights a protocol may fix by sha256; those of a FID are fixed by its family."""

Choice = Literal["one", "unique"]
"""How captions are chosen."""
Crop = Literal["none", "center", "box"]
"""Part of an image that is taken."""

BENCHMARK, CONCEPTS = KINDS = ("benchmark", "concepts")
"""What a protocol measures; a file without the key ``kind`` is of the first."""
COPY = 0.95
"""Cosine of features from which one image counts as a copy of another: a guess, which depends on the network."""

C = TypeVar("C")


class ProtocolError(DataFileError):
    """A protocol that cannot be used; the message names the field, what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """Which captions are asked for."""

    rule: Choice
    """``one``: one caption of each image, sampled by seed. ``unique``: all captions of the split, each text once."""
    count: int | None = None
    """Captions in all; None takes as many as the rule gives. Fewer than the count is an error, never a smaller run."""
    seed: int = 0
    """Seed of the choice."""
    exclusions: bool = False
    """Whether a list of images to leave out must be given, as for the de-duplicated variant."""

    def __post_init__(self) -> None:
        check_choice("captions.rule", self.rule, get_args(Choice))
        if self.count is not None:
            check_integer("captions.count", self.count, 2)
        check_integer("captions.seed", self.seed, 0)
        if not isinstance(self.exclusions, bool):
            raise ProtocolError(f"captions.exclusions must be true or false, got {self.exclusions!r}")


@dataclass(frozen=True, kw_only=True)
class ImageRule:
    """How the images of the benchmark are cropped and scaled before they are measured."""

    crop: Crop = "center"
    """``none``; ``center``: the largest centered square; ``box``: a square around the bounding box (CUB)."""
    size: int = 256
    """Side in pixels."""

    def __post_init__(self) -> None:
        check_choice("image.crop", self.crop, get_args(Crop))
        check_integer("image.size", self.size, 1)


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How many images a model generates."""

    candidates: int = 1
    """Images N of a caption, of which the model's ranker chooses one; 1 needs no ranker."""
    curve: tuple[int, ...] = ()
    """Numbers of candidates on the axis of figure 9(c); those above ``candidates`` are passed over."""
    chunk: int = 50
    """Captions that are sampled, measured and stored together; part of the numbers in their last bits."""

    def __post_init__(self) -> None:
        check_integer("sampling.candidates", self.candidates, 1)
        check_rising("sampling.curve", self.curve, 1)
        check_integer("sampling.chunk", self.chunk, 1)

    def counts(self, candidates: int | None = None) -> tuple[int, ...]:
        """Numbers of candidates that are measured, smallest first.

        Args:
            candidates: Instead of the protocol's own.

        Example:
            >>> SamplingRule(candidates=1, curve=(1, 2, 4, 8)).counts(5)
            (1, 2, 4, 5)
        """
        most = self.candidates if candidates is None else candidates
        return tuple(sorted({most, *(n for n in self.curve if n < most)}))


@dataclass(frozen=True, kw_only=True)
class NetworkRule:
    """Which weights a network must have."""

    sha256: str
    """Digest of their file, in hexadecimal."""

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ProtocolError(f"networks: sha256 must be 64 digits of 0-9 and a-f, got {self.sha256!r}")


@dataclass(frozen=True, kw_only=True)
class ReferenceRecord:
    """Statistics of the benchmark's own images under one network, as we measured them, for the self-check.

    A number that we have not measured is None and is not checked.
    """

    family: str
    """Network, one of the protocol's ``fid_families``."""
    mean_norm: float | None = None
    """Euclidean norm of the mean of the features."""
    trace: float | None = None
    """Trace of their covariance."""
    tolerance: float | None = None
    """Largest relative difference of ``mean_norm`` and ``trace`` that passes."""

    def __post_init__(self) -> None:
        check_choice("reference.family", self.family, FID_FAMILIES)
        for name in ("mean_norm", "trace", "tolerance"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ProtocolError(f"reference.{name} must be a number above 0 or null, got {value!r}")
        if self.tolerance is None and (self.mean_norm, self.trace) != (None, None):
            raise ProtocolError("reference.tolerance is missing: mean_norm and trace cannot be checked without it")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides the model that fixes a score; repeated in the result file.

    Raises:
        ProtocolError: A field has a value that is not allowed, or two fields do not go together.
    """

    name: str
    """Lower-case letters, digits and hyphens."""
    title: str
    """One line for people."""
    benchmark: dict[str, str]
    """Split by layout, for every layout in which the benchmark may lie on disk; the first one is the usual."""
    captions: CaptionRule
    """Which captions are asked for."""
    images: dict[str, int] = field(default_factory=dict)
    """Captioned images of the split by layout, where the data set is a known one: another number stops the run."""
    image: ImageRule = field(default_factory=ImageRule)
    """How the benchmark's images are cropped and scaled."""
    sampling: SamplingRule = field(default_factory=SamplingRule)
    """How many images a model generates."""
    blur: tuple[int, ...] = (0,)
    """Radii of the Gaussian blur that both sides get, in pixels, smallest first; 0 is none. Figure 9's are
    0, 1, 2, 4, 8."""
    metrics: tuple[str, ...] = ("fid",)
    """What is measured, of `METRICS`."""
    fid_families: tuple[str, ...] = ("inception-2015",)
    """Kinds of FID, of `FID_FAMILIES`."""
    networks: dict[str, NetworkRule] = field(default_factory=dict)
    """Weights of networks of `PINNED`; those of one that is not named here are free, and named in the result."""
    is_splits: int = 10
    """Parts over which the inception score is averaged."""
    published: tuple[str, ...] = ()
    """Tables of published scores, of `PUBLISHED`, that the measured ones may stand beside."""
    reference: tuple[ReferenceRecord, ...] = ()
    """Statistics that the self-check compares the benchmark's images with; empty where we have none."""
    notes: tuple[str, ...] = ()
    """Sentences that every report repeats: where the protocol departs from its model, and why."""

    def __post_init__(self) -> None:
        check_texts(self.name, self.title, self.notes)
        self._check_benchmark()
        self._check_images()
        check_rising("blur", self.blur, 0)
        if not self.blur or self.blur[0] != 0:
            raise ProtocolError(f"blur must begin with 0, the score without blur, got {list(self.blur)}")
        check_choices("metrics", self.metrics, METRICS)
        check_choices("fid_families", self.fid_families, FID_FAMILIES)
        check_choices("published", self.published, PUBLISHED)
        for name in self.networks:
            check_choice("networks", name, PINNED)
        check_choices("reference", [record.family for record in self.reference], self.fid_families)
        check_integer("is_splits", self.is_splits, 1)
        if not self.metrics:
            raise ProtocolError(f"metrics is empty: name at least one of {', '.join(METRICS)}")
        if ("fid" in self.metrics) != bool(self.fid_families):
            raise ProtocolError("fid_families must name at least one kind of FID where metrics has fid, else be empty")

    def _check_benchmark(self) -> None:
        if not self.benchmark:
            raise ProtocolError(f"benchmark is empty: give a split for at least one of {', '.join(LAYOUTS)}")
        for layout, split in self.benchmark.items():
            check_choice("benchmark", layout, LAYOUTS)
            if not isinstance(split, str) or not split:
                raise ProtocolError(f"benchmark.{layout} must be the name of a split, got {split!r}")

    def _check_images(self) -> None:
        for layout, count in self.images.items():
            check_choice("images", layout, self.benchmark)
            check_integer(f"images.{layout}", count, 2)

    @property
    def layout(self) -> str:
        """The usual layout."""
        return next(iter(self.benchmark))

    def split(self, layout: str) -> str:
        """Split to read in a layout.

        Raises:
            UnknownNameError: The benchmark does not lie in that layout.
        """
        if layout not in self.benchmark:
            raise UnknownNameError(f"{self.name}: {suggest('layout', layout, self.benchmark)}")
        return self.benchmark[layout]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "protocol") -> Protocol:
        """Builds a protocol from plain data, such as a result file holds.

        Args:
            values: Field to value.
            where: Where they come from, for messages.

        Raises:
            ProtocolError: A field is unknown, missing or wrong.
        """
        values = mapping(values, where)
        try:
            for name, kind in (("captions", CaptionRule), ("image", ImageRule), ("sampling", SamplingRule)):
                if name in values:
                    values[name] = build(kind, values[name], name)
            if "reference" in values:
                records = sequence("reference", values["reference"])
                values["reference"] = tuple(build(ReferenceRecord, record, "reference") for record in records)
            if "networks" in values:
                given = mapping(values["networks"], "networks")
                values["networks"] = {
                    name: build(NetworkRule, rule, f"networks.{name}") for name, rule in given.items()
                }
            for name in ("benchmark", "images"):
                if name in values:
                    values[name] = mapping(values[name], name)
            return build(cls, values, "protocol")
        except DataFileError as error:
            raise ProtocolError(f"{where}: {error}") from None


def external_crop(rule: ImageRule) -> Crop:
    """Crop of images that come from elsewhere than the benchmark and so have no bounding boxes."""
    return "center" if rule.crop == "box" else rule.crop


def list_protocols(kind: str | None = None) -> list[str]:
    """Names of the protocols that come with the package, all or those of a kind."""
    files = shipped_folder("protocols").glob("*.yaml")
    return sorted(path.stem for path in files if kind is None or read_fields(path)[0] == kind)


def protocol_file(name: str | Path) -> Path:
    """File of a protocol: a name from `list_protocols`, or a YAML file of one's own.

    Raises:
        UnknownNameError: Neither; the message has the nearest name.
    """
    if str(name) in list_protocols():
        return shipped_folder("protocols") / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError(f"{suggest('protocol', str(name), list_protocols())}. A YAML file works as well.")


def read_fields(path: Path) -> tuple[str, dict[str, Any]]:
    """Kind of a protocol, and its other fields as they stand in the file.

    Raises:
        ProtocolError: The kind is unknown.
        DataFileError: The file is none that `read_yaml` reads.
    """
    values = read_yaml(path)
    kind = values.pop("kind", BENCHMARK)
    if kind not in KINDS:
        raise ProtocolError(f"{path}: {suggest('kind', str(kind), KINDS)}")
    return kind, values


def read_protocol(path: Path) -> Protocol:
    """Reads the protocol of a benchmark.

    Raises:
        ProtocolError: It cannot be used; the message names file, field, what was expected and what came.
    """
    kind, values = read_fields(path)
    if kind != BENCHMARK:
        raise ProtocolError(f"{path} is a protocol of kind {kind!r}, which has no benchmark: use `dalle-zoo eval`")
    return Protocol.from_dict(values, str(path))


def find_protocol(name: str | Path) -> Protocol:
    """The protocol of a benchmark: a name from `list_protocols`, or a YAML file of one's own.

    Raises:
        UnknownNameError: Neither; the message has the nearest name.
        ProtocolError: It is there, but cannot be used.
    """
    return read_protocol(protocol_file(name))


# ---------------------------------------------------------------- checks


def check_texts(name: object, title: object, notes: Iterable[object]) -> None:
    """Checks what every protocol says of itself."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ProtocolError(f"name must be lower-case letters, digits and hyphens, got {name!r}")
    if not isinstance(title, str) or not title.strip() or "\n" in title:
        raise ProtocolError(f"title must be one line of text, got {title!r}")
    if not all(isinstance(note, str) for note in notes):
        raise ProtocolError(f"notes must be a list of sentences, got {list(notes)!r}")


def build(kind: type[C], values: object, where: str) -> C:
    """A native dataclass from a mapping; lists become tuples."""
    given = mapping(values, where)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    check_keys(given, known, where, required=required)
    lists = [n for n, f in known.items() if str(f.type).startswith("tuple")]
    return kind(**{n: tuple(sequence(n, v)) if n in lists else v for n, v in given.items()})


def sequence(name: str, value: object) -> list[Any]:
    """A value that must be a list."""
    if not isinstance(value, list | tuple):
        raise ProtocolError(f"{name} must be a list, got {value!r}")
    return list(value)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: object, least: int) -> None:
    """Checks an integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ProtocolError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_rising(name: str, values: tuple[int, ...], least: int) -> None:
    """Checks integers that rise."""
    for value in values:
        check_integer(name, value, least)
    if list(values) != sorted(set(values)):
        raise ProtocolError(f"{name} must rise, each number once, got {list(values)}")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Checks that a value is one of some names."""
    known = list(known)
    if value not in known:
        raise ProtocolError(suggest(name, str(value), known))


def check_choices(name: str, values: Iterable[str], known: Iterable[str]) -> None:
    """Checks that values are of some names, each at most once."""
    values = list(values)
    for value in values:
        check_choice(name, value, known)
    if len(set(values)) != len(values):
        raise ProtocolError(f"{name} has a name twice: {', '.join(values)}")
