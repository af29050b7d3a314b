"""From features on disk to rows of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dalle_zoo_eval.measures import (
    Reference,
    bootstrap_interval,
    clip_score,
    frechet_extrapolated,
    inception_score,
    kernel_distance,
    precision_recall,
    r_precision,
)
from dalle_zoo_eval.measuring import Measurement
from dalle_zoo_eval.networks.base import TextNetwork
from dalle_zoo_eval.protocol import FID_FAMILIES, Protocol
from dalle_zoo_eval.statistics import Moments, StatisticsError
from dalle_zoo_eval.subjects import GeneratedImages

# n samples, d features

INCEPTION = "inception-2015"
"""Network of the inception score, of KID, and of precision and recall."""
CLIP = "clip"
"""Network of the CLIP score."""
RANKER = "ranker"
"""Network of R-precision."""
KID_SUBSET = 1000
"""Samples of a subset of the KID; fewer samples than that have no KID."""
NEIGHBORS = 3
"""k of precision and recall."""

Row = dict[str, Any]


class Scorer:
    """Works out the rows of a protocol.

    Args:
        protocol: What is asked for.
        generated: Features of the images that are judged.
        reference: Features of the benchmark's images.
        captions: Caption of every judged image; None where they have none.
        groups: Class, or else name, of what every caption describes.
    """

    def __init__(
        self,
        protocol: Protocol,
        generated: Measurement,
        reference: Measurement,
        *,
        captions: Sequence[str] | None,
        groups: Sequence[str],
    ) -> None:
        self.protocol, self.generated, self.reference = protocol, generated, reference
        self.counts, self.captions, self.groups = generated.counts, captions, list(groups)
        self.generates = isinstance(generated.subject, GeneratedImages)
        self._real: tuple[str, int, Reference] | None = None
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def score(self) -> list[Row]:
        """All rows; what could not be worked out is in ``left_out``, with its reason."""
        steps: list[tuple[str, Callable[[], None]]] = []
        for network in self.generated.networks:
            metric = "fid" if network in FID_FAMILIES else "frechet"
            if metric == "fid" and "fid" not in self.protocol.metrics:
                continue
            for radius, count in self._places():
                name = f"{metric} of {network}, blur {radius}, {count} candidates"
                steps.append((name, partial(self._frechet, metric, network, radius, count)))
        asked = set(self.protocol.metrics)
        for names, network, step in (
            ({"is"}, INCEPTION, self._inception),
            ({"kid"}, INCEPTION, self._kid),
            ({"precision", "recall"}, INCEPTION, self._manifold),
            ({"clip_score"}, CLIP, self._clip),
            ({"r_precision"}, RANKER, self._retrieval),
        ):
            if asked & names and network in self.generated.networks:
                steps.append((", ".join(sorted(asked & names)), step))
        for name, step in tqdm(steps, desc="score", unit="score"):
            try:
                step()
            except StatisticsError as error:
                self._leave_out(f"{name}: {error}")
        return self.rows

    def _places(self) -> list[tuple[int, int]]:
        """Radius and number of candidates of every point of the figures; one radius after the other."""
        most = self.counts[-1]
        return [*((0, count) for count in reversed(self.counts)), *((r, most) for r in self.protocol.blur if r)]

    def _leave_out(self, line: str) -> None:
        if line not in self.left_out:  # the points of a figure lack the same for the same reason
            self.left_out.append(line)

    def _row(
        self, metric: str, family: str, value: float, *, radius: int = 0, count: int | None = None, **more: Any
    ) -> Row:
        if family == RANKER:  # models bring their own
            family = f"{RANKER} {str(self.generated.networks[RANKER].record['sha256'])[:8]}"
        row: Row = {
            "metric": metric,
            "family": family,
            "blur": radius,
            "candidates": (self.counts[-1] if count is None else count) if self.generates else None,
            "value": value,
            "samples": len(self.generated.subject),
            "reference_samples": len(self.reference.subject),
            **more,
        }
        self.rows.append(row)
        return row

    def _frechet(self, metric: str, network: str, radius: int, count: int) -> None:
        real, name = self._reference(network, radius), f"{radius}/{count}/features"
        generated = Moments.of_parts(self.generated.read(network, name))
        row = self._row(metric, network, real.distance(generated), radius=radius, count=count)
        if generated.rank_deficient or real.moments.rank_deficient:
            row["rank_deficient"] = True
        try:
            features = self.generated.all(network, name)
            row["interval"] = list(bootstrap_interval(features, generated, real))
            row["at_infinity"] = frechet_extrapolated(features, generated, real).value
        except StatisticsError as error:
            self._leave_out(f"interval or value at infinity of {metric} of {network}: {error}")

    def _reference(self, network: str, radius: int) -> Reference:
        """The benchmark's side; the last one is kept, for all numbers of candidates."""
        if self._real is None or self._real[:2] != (network, radius):
            moments = Moments.of_parts(self.reference.read(network, f"{radius}/1/features"))
            self._real = network, radius, Reference.of(moments)
        return self._real[2]

    def _features(self, network: str) -> Tensor:
        return self.generated.all(network, f"0/{self.counts[-1]}/features")

    def _inception(self) -> None:
        for radius, count in self._places():
            logits = self.generated.all(INCEPTION, f"{radius}/{count}/logits")
            if len(logits) < self.protocol.is_splits:
                raise StatisticsError(f"{self.protocol.is_splits} splits need as many samples, got {len(logits)}")
            mean, std = inception_score(logits, self.protocol.is_splits)
            self._row("is", INCEPTION, mean, radius=radius, count=count, std=std)

    def _kid(self) -> None:
        generated, real = self._features(INCEPTION), self.reference.all(INCEPTION, "0/1/features")
        if min(len(generated), len(real)) < KID_SUBSET:
            raise StatisticsError(
                f"subsets of {KID_SUBSET} need as many samples, got {min(len(generated), len(real))}"
            )
        mean, std = kernel_distance(generated, real, subset_size=KID_SUBSET)
        self._row("kid", INCEPTION, mean, std=std)

    def _manifold(self) -> None:
        generated, real = self._features(INCEPTION), self.reference.all(INCEPTION, "0/1/features")
        if min(len(generated), len(real)) <= NEIGHBORS:
            raise StatisticsError(f"{NEIGHBORS} neighbors need more samples, got {min(len(generated), len(real))}")
        precision, recall = precision_recall(real, generated, NEIGHBORS)
        for name, value in (("precision", precision), ("recall", recall)):
            if name in self.protocol.metrics:
                self._row(name, INCEPTION, value)

    def _texts(self, network: str) -> Tensor:
        if self.captions is None:
            raise StatisticsError("the images have no captions")
        reader = self.generated.networks[network]
        assert isinstance(reader, TextNetwork)
        return reader.text_features(self.captions)

    def _clip(self) -> None:
        self._row("clip_score", CLIP, clip_score(self._features(CLIP), self._texts(CLIP)))

    def _retrieval(self) -> None:
        try:
            mean, std = r_precision(self._features(RANKER), self._texts(RANKER), self.groups)
        except ValueError as error:
            raise StatisticsError(str(error)) from None
        self._row("r_precision", RANKER, mean, std=std)
