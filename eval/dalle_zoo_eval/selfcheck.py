"""Checks of the real images before anything is generated.

**Identity.** The distance of the reference to itself is 0.

**Halves.** The distance between two halves of n images is not 0: means and covariances of few samples differ by
chance, and more so with more features. The images themselves show by how much. If their order carries no information,
the first and the second half are as far apart as two random halves, on average and with the same standard deviation.
If a part of the images was cropped, scaled or processed differently, the distance is many standard deviations larger.
With fewer images than features, the excess may be a small part of the distance, since any two halves are far apart by
chance. The limit is therefore the mean of `SPLITS` random splits plus `SPREADS` standard deviations, and at least
plus the share `ORDER` of the mean: the order of correct images may carry some information, and with many images the
standard deviation is smaller than that. Order carries much information across classes and folders, but none within
them, so each half contains half of every class and folder.

**Record.** The norm of the mean and the trace of the covariance match the values recorded in the protocol, if any.

**Weights.** The network's sha256 is one of those that its name or the protocol allows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from dalle_zoo.sampling import derive_seed
from dalle_zoo_eval.datasets import Item
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.metrics.frechet import FID_FAMILIES, frechet_distance
from dalle_zoo_eval.moments import Moments
from dalle_zoo_eval.opening import expected_digests
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.rules import ReferenceRecord
from dalle_zoo_eval.statistics import StoredReference

# n samples, d features

ITSELF = 1e-6
"""Maximum distance of the reference to itself, as a share of its total variance: only rounding."""
SPLITS = 16
"""Number of random splits with which the halves are compared."""
SPREADS = 5.0
"""Maximum excess of the distance between first and second half over the mean of those splits, in units of their
standard deviation. Correct images exceed it once in 10,000 times if splits are normally distributed; in simulations
with Gaussian features, 2 in 3000 times for 240 images of 5 features, whose splits are skewed, and never in 400 times
for 240 images of 64 features."""
ORDER = 0.1
"""Excess, as a share of that mean, that the order of correct images may always cause."""
FEWEST = 100
"""Minimum number of images: with fewer, splits vary too much to show anything."""
FEATURES = "0/1/features"
"""Name of the reference's features without blur."""
TOLERANCE = 1e-3
"""Tolerance suggested for a record: a guess, wider than the rounding of another machine."""


class SelfCheckError(ValueError):
    """The real images are not what they should be; the message lists every check that failed."""


@dataclass
class SelfCheck:
    """Results of the checks of a reference."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    """Every check: ``name``, the values ``found`` and ``expected``, and whether it ``passed``."""
    left_out: list[str] = field(default_factory=list)
    """Omitted checks, with the reason."""
    records: list[ReferenceRecord] = field(default_factory=list)
    """Statistics found for every extractor of a FID family."""

    def add(self, name: str, found: float | str, expected: str, passed: bool) -> None:
        """Adds a check."""
        self.checks.append({"name": name, "found": found, "expected": expected, "passed": passed})


def check_reference(
    reference: FeatureStore | StoredReference,
    protocol: Protocol,
    items: Sequence[Item],
    *,
    known: bool,
    exclusions: bool = False,
) -> SelfCheck:
    """Checks the features of the reference under every network, as described in the docstring of this module.

    Args:
        reference: Features of the real images.
        protocol: States what is expected.
        items: The images.
        known: Whether the protocol knows the dataset, by its number of images. Otherwise, halves that differ are
            reported but do not stop the run.
        exclusions: Whether the images depend on an exclusion list.

    Raises:
        SelfCheckError: A check failed.
    """
    found = SelfCheck()
    for network, opened in reference.extractors.items():
        _check_weights(found, network, str(opened.record["sha256"]), expected_digests(protocol, network))
        complete = reference.moments(network)
        spread = float(complete.covariance.trace())
        if not spread > 0:
            raise SelfCheckError(
                f"{network} has the same features for all {complete.count} images of the reference: check the dataset"
            )
        itself = frechet_distance(complete, complete) / spread
        found.add(
            f"{network}: reference against itself, share of its variance",
            itself, f"at most {ITSELF:g}", itself <= ITSELF,
        )  # fmt: skip
        if isinstance(reference, FeatureStore):
            _check_halves(found, reference, network, complete, protocol.name, items, known=known)
        else:
            found.left_out.append(f"self-check of {network} by halves: the reference is {reference.saved.path.name}")
        if network in FID_FAMILIES:
            mean_norm = float(complete.mean.norm())
            found.records.append(
                ReferenceRecord(family=network, mean_norm=mean_norm, trace=spread, tolerance=TOLERANCE)
            )
    _check_records(found, protocol, exclusions=exclusions)
    failed = [f"{c['name']}: {c['found']}, expected {c['expected']}" for c in found.checks if not c["passed"]]
    if failed:
        raise SelfCheckError(
            f"the reference fails its self-check, so nothing was scored: {'; '.join(failed)}. "
            "Check that dataset, split and crop are those of the protocol"
        )
    return found


def _check_weights(found: SelfCheck, network: str, sha256: str, allowed: Sequence[str]) -> None:
    found.add(
        f"{network}: sha256 of its weights", sha256, " or ".join(allowed) or "any", not allowed or sha256 in allowed
    )


def _check_halves(
    found: SelfCheck,
    reference: FeatureStore,
    network: str,
    complete: Moments,
    protocol: str,
    items: Sequence[Item],
    *,
    known: bool,
) -> None:
    if complete.count < FEWEST:
        found.left_out.append(f"self-check of {network} by halves: too few images, {complete.count} of {FEWEST}")
        return
    kinds = [item.concept or str(PurePosixPath(item.key).parent) for item in items]
    random = torch.Generator().manual_seed(derive_seed(protocol, network))
    orders = [torch.randperm(len(kinds), generator=random).tolist() for _ in range(SPLITS)]

    def apart(order: Sequence[int]) -> float:
        first = Moments.of_parts(_rows(reference.read(network, FEATURES), first_half(kinds, order)))
        return frechet_distance(first, complete - first)

    distance, splits = apart(range(len(kinds))), [apart(order) for order in orders]
    mean, spread = statistics.mean(splits), statistics.stdev(splits)
    limit = mean + max(SPREADS * spread, ORDER * mean)
    expected = f"at most {limit:.4g}, where {SPLITS} random splits have {mean:.4g} with a spread of {spread:.2g}"
    passed = distance <= limit
    if passed or known:
        found.add(f"{network}: first half of the reference against its second", distance, expected, passed)
    else:
        found.left_out.append(
            f"self-check of {network} by halves: the distance between the first and the second half is "
            f"{distance:.4g}, expected {expected}. Either the images are sorted, or one half was processed differently"
        )


def first_half(kinds: Sequence[str], order: Sequence[int]) -> Tensor:
    """Returns which samples are in the first half: of every kind, those that are first in an order.

    Args:
        kinds: Class or folder of each of n samples.
        order: All n samples.

    Returns:
        bool (n,), n // 2 of them true.
    """
    members: dict[str, list[int]] = {}
    for sample in order:
        members.setdefault(kinds[sample], []).append(sample)
    first, left_over = torch.zeros(len(kinds), dtype=torch.bool), 0
    for samples in members.values():  # of kinds with odd counts, every other one contributes the larger part
        count, left_over = divmod(len(samples) + left_over, 2)
        first[samples[:count]] = True
    return first


def _rows(parts: Iterator[Tensor], wanted: Tensor) -> Iterator[Tensor]:
    start = 0
    for part in parts:
        yield part[wanted[start : start + len(part)]]
        start += len(part)


def _check_records(found: SelfCheck, protocol: Protocol, *, exclusions: bool) -> None:
    """Compares with the record of the protocol; if it has none, explains how to make one."""
    recorded = {record.family: record for record in protocol.reference}
    for record in found.records:
        known = recorded.get(record.family)
        if known is None or known.tolerance is None:
            continue
        for name, text in (("mean_norm", "norm of the mean"), ("trace", "trace of the covariance")):
            value, expected = getattr(record, name), getattr(known, name)
            if expected is not None:
                passed = abs(value / expected - 1) <= known.tolerance
                allowed = f"{expected:.8g}, within {known.tolerance:g} of it"
                found.add(f"{record.family}: {text}, as on record", value, allowed, passed)
    missing = [record.family for record in found.records if record.family not in recorded]
    if missing and exclusions:
        found.left_out.append("self-check by record: the reference depends on the exclusion list")
    elif missing:
        found.left_out.append(
            f"self-check by record: {protocol.name} has no statistics of {', '.join(missing)}. If this dataset is "
            f"known to be correct, add to the protocol: {record_line(found.records, protocol)}"
        )


def record_line(records: Sequence[ReferenceRecord], protocol: Protocol) -> str:
    """Returns the line ``reference:`` of a protocol, with its own records and those found for other networks."""
    merged = {record.family: record for record in (*records, *protocol.reference)}
    plain = [
        {k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in asdict(r).items()} for r in merged.values()
    ]
    return f"reference: {yaml.safe_dump(plain, default_flow_style=True, width=math.inf, sort_keys=False).strip()}"
