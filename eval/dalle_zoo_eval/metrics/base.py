"""Registry and specs of metrics, and the torchmetrics class of metrics that are pure functions."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dalle_zoo.registry import Registry
from dalle_zoo_eval.moments import StatisticsError

ANNOTATIONS = ("std", "low", "high", "at_infinity", "rank_deficient")
"""Keys of a computed dict that annotate its ``value`` and are not parts of the score."""
TEXTS = ("keys", "concepts", "captions")
"""Inputs that are lists of texts, one per image."""
TARGETS = "targets"
"""Input with one dict per image, which is not gathered across ranks."""
REAL = "real_"
"""Prefix of function parameters that are rows of the reference side."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """Inputs of a metric and the presentation of its scores.

    Example:
        >>> from dalle_zoo_eval.metrics import METRICS
        >>> spec = METRICS.spec("kid")
        >>> spec.lower_is_better, sorted(spec.inputs)
        (True, ['features', 'real'])
    """

    name: str
    """Name in `METRICS`."""
    label: str
    """Name in reports; empty if the labels of the parts suffice."""
    extractor: tuple[str, ...] = ()
    """Extractors whose features define it; empty if a protocol may name any extractor."""
    lower_is_better: bool = False
    """Whether lower scores are better."""
    unit: str = ""
    """Unit, appended to labels. Scores with unit "%" are shares in [0, 1], displayed times 100."""
    format: str = ".4f"
    """Format of a displayed score."""
    section: str = ""
    """Heading of its table. Defaults to the label."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Labels of the parts that `compute` returns, in order. Defaults to the name of each part."""
    sweep: bool = False
    """Whether it is computed at every blur radius and number of candidates, and compared with published scores."""
    paired: bool = False
    """Whether real and reconstructed images are limited to those of the prompts."""
    reference: Literal["group", "all"] = "group"
    """Real images of the reference side (``real=True``): those of the group, or those of all groups."""
    images: tuple[str, ...] = ("generated",)
    """Default image sets, from `dalle_zoo.results.IMAGE_SETS`."""
    every: bool = False
    """Whether a row is a prompt with all its images: tensors (B, N, ...), where N = 1 except for ``candidates``."""
    by_group: bool = False
    """Whether each part has its own table, with a row per group and a column per image set."""
    relative_to: str = ""
    """Image set whose score is the maximum; tables by group then also show the share of it that was reached."""
    bars: bool = False
    """Whether reports with several groups show it as a bar chart."""
    inputs: frozenset[str] = frozenset()
    """Names of the arguments of `update`."""
    source: str = ""
    """Paper that defines it; empty for metrics of this project."""
    least: int = 0
    """Minimum number of samples per side for comparable scores; with fewer, they vary or are biased too much."""
    interval: str = ""
    """Method that estimates its interval or deviation; empty if it has none."""
    check: Callable[..., None] | None = None
    """Checks keys and concepts of the reference of all groups, and the options, before any work begins."""
    remark: Callable[[Mapping[str, Mapping[str, float]]], str] | None = None
    """Returns a remark for reports, given scores by group and part; empty for none."""

    def record(self) -> dict[str, Any]:
        """Returns the entry of the result file, from which reports are rendered without the registry."""
        left_out = {"name", "paired", "every", "reference", "images", "inputs", "check", "remark"}
        of_document = {"source", "least", "interval"}  # the documentation's table of metrics
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out | of_document}
        return shown | {"parts": dict(self.parts)}


class MetricRegistry(Registry[type[Metric]]):
    """`Registry` of torchmetrics classes, each with a `MetricSpec`."""

    def register(
        self, name: str, *, label: str | None = None, extractor: str | Sequence[str] = (), **fields: Any
    ) -> Callable[[Any], Any]:
        """Returns a decorator that adds a torchmetrics class, or a pure function as a `RowsMetric`.

        The decorated function also raises `StatisticsError` for features with NaN or infinity.

        Args:
            name: Name in protocols and results.
            label: Name in reports. Defaults to ``name``.
            extractor: Extractor, or several alternatives, of its features. Defaults to any.
            **fields: Further fields of `MetricSpec`.
        """
        extractors = (extractor,) if isinstance(extractor, str) else tuple(extractor)

        def add(given: Any) -> Any:
            if isinstance(given, type):
                metric: Any = given
                inputs = frozenset(inspect.signature(metric.update).parameters) - {"self"}
            else:
                given = _of_finite_rows(given)
                body = {"function": staticmethod(given), "__doc__": given.__doc__, "__module__": given.__module__}
                metric = type(given.__name__, (RowsMetric,), body)
                inputs = metric.inputs()
            shown = name if label is None else label
            metric.spec = MetricSpec(name=name, label=shown, extractor=extractors, inputs=inputs, **fields)
            self._add(name, metric)
            return given

        return add

    def __getitem__(self, name: str) -> type[Metric]:
        if name not in self._members and name in self._external():
            self._load(name)  # its decorator adds it
        return super().__getitem__(name)

    def spec(self, name: str) -> MetricSpec:
        """Returns the spec of a metric.

        Raises:
            UnknownNameError: There is no such metric.
            TypeError: The metric of another distribution is not decorated.
        """
        found = getattr(self[name], "spec", None)
        if not isinstance(found, MetricSpec):
            raise TypeError(f"metric {name!r} has no spec: decorate it with @METRICS.register({name!r}, ...)")
        return found


def check_sides(features: Tensor, real_features: Tensor) -> None:
    """Raises `ValueError` unless both sides are features (n, d) with the same d."""
    a, b = features, real_features
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {tuple(a.shape)} and {tuple(b.shape)}")


def _of_finite_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function raise an error for NaN and infinity, which may result in plausible scores."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        for name, values in signature.bind(*arguments, **options).arguments.items():
            if isinstance(values, Tensor) and values.is_floating_point() and not bool(values.isfinite().all()):
                raise StatisticsError(f"{name} hold NaN or infinity: the network or its input is broken")
        return function(*arguments, **options)

    return checked


METRICS = MetricRegistry("metric", group="dalle_zoo.metrics", base=Metric)


class RowsMetric(Metric):
    """A pure function as a metric: retains rows until it computes, and concatenates those of all ranks.

    The positional parameters of the function are rows: tensors, texts (`TEXTS`), or dicts (`TARGETS`, which are not
    gathered from other ranks). A parameter ``real_features`` takes the rows ``features`` of the reference side.
    Keyword-only parameters are options: counts or increasing lists of counts, and optionally a ``seed``.

    Args:
        reset_real_features: Whether `reset` also removes the reference side, as in torchmetrics. Defaults to True.
        **options: Options of the function.

    Raises:
        TypeError: An option is unknown.

    Example:
        >>> from dalle_zoo_eval.metrics import METRICS
        >>> vendi = METRICS["vendi"]()
        >>> vendi.update(features=torch.eye(3))
        >>> vendi.update(features=torch.eye(3))  # the same images again
        >>> round(vendi.compute()["value"].item(), 3)
        3.0
    """

    is_differentiable = False
    full_state_update = False
    function: Callable[..., Any]
    spec: MetricSpec

    def __init__(self, reset_real_features: bool = True, **options: Any) -> None:
        super().__init__()
        known = [p.name for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}: known are {', '.join(known) or 'none'}")
        for name, value in options.items():
            counts = [*value] if isinstance(value, list | tuple) else [value]
            if name != "seed" and not (counts and all(type(n) is int for n in counts) and min(counts) >= 1):
                raise ValueError(f"{name} must be a number of at least 1, or rising ones, got {value!r}")
            if counts != sorted({*counts}):
                raise ValueError(f"{name} must be rising numbers of at least 1, got {value!r}")
        self.reset_real_features, self.options = reset_real_features, options
        self.texts: dict[tuple[int, int], str] = {}
        for name in self._rows():
            self.add_state(f"rows_{name}", default=[], dist_reduce_fx=None if name.endswith(TARGETS) else "cat")

    @classmethod
    def _rows(cls) -> list[str]:
        return [p.name for p in inspect.signature(cls.function).parameters.values() if p.kind is not p.KEYWORD_ONLY]

    @classmethod
    def inputs(cls) -> frozenset[str]:
        """Returns the arguments of `update`: the rows, and ``real`` if the function has a reference side."""
        names = cls._rows()
        sides = {"real"} if any(name.startswith(REAL) for name in names) else set()
        return frozenset({name.removeprefix(REAL) for name in names} | sides)

    def update(self, *, real: bool = False, **rows: Any) -> None:
        """Adds B rows of one side, by name."""
        prefix = REAL if real else ""
        for name, values in rows.items():
            if f"{prefix}{name}" in self._rows():
                state = getattr(self, f"rows_{prefix}{name}")
                state.extend(values) if name == TARGETS else state.append(self._tensor(name, values))

    def compute(self) -> dict[str, Tensor]:
        """Returns the values of the function: a pair as ``value`` and ``std``, an `Estimate` as a tensor (3,)."""
        found = self.function(*(self._gathered(name) for name in self._rows()), **self.options)
        if isinstance(found, tuple):
            found = {"value": found[0], "std": found[1]}
        elif not isinstance(found, Mapping):
            found = {"value": found}
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}

    def reset(self) -> None:
        """Removes the rows; those of the reference side only with ``reset_real_features``."""
        # Copies: `Metric.reset` empties lists in place.
        real = {name: [*getattr(self, name)] for name in self._defaults if name.startswith(f"rows_{REAL}")}
        super().reset()
        for name, state in {} if self.reset_real_features else real.items():
            setattr(self, name, state)

    def _tensor(self, name: str, values: Any) -> Tensor:
        """Returns rows as a tensor that ranks can gather; a text as two int64, the first 16 bytes of its SHA-256."""
        if name not in TEXTS:
            return values  # type: ignore[no-any-return]
        rows = []
        for text in values:
            digest = hashlib.sha256(text.encode()).digest()
            first, second = (int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8))
            self.texts[first, second] = text
            rows.append([first, second])
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(-1, 2)

    def _gathered(self, name: str) -> Any:
        state = getattr(self, f"rows_{name}")
        if name.endswith(TARGETS):
            return state
        if isinstance(state, list) and not state:
            raise ValueError(f"{self.spec.name} has no {name}: call update first")
        rows = dim_zero_cat(state)
        # Texts added on another rank are represented by their digest.
        return [self.texts.get((a, b), f"{a:x}{b:x}") for a, b in rows.tolist()] if name.endswith(TEXTS) else rows
