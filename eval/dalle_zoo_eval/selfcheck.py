"""What must hold of the reference side before any model is scored."""

from __future__ import annotations

from typing import Any

import torch

from dalle_zoo.sampling import picture_seed
from dalle_zoo_eval.measures import frechet_distance
from dalle_zoo_eval.measuring import Measurement
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.statistics import Moments

ITSELF = 1e-6
"""Largest distance of the reference to itself, as a share of its total variance: rounding alone."""
HALVES = 0.5
"""Largest distance between two random halves of the reference, as a share of its total variance."""


class SelfCheckError(ValueError):
    """A reference that is not what it should be; the message names every check that failed."""


def check_reference(reference: Measurement, protocol: Protocol) -> tuple[list[dict[str, Any]], list[str]]:
    """Checks every network's features of the reference.

    - its distance to itself is 0;
    - that between two random halves is small, where they have at least four times as many samples as features;
    - norm of the mean and trace are those that the protocol has recorded, where it has.

    That the network is the known one, its sha256 has shown when it was opened.

    Returns:
        The checks, as the result file has them, and those that were not made, with the reason.

    Raises:
        SelfCheckError: One failed.
    """
    checks: list[dict[str, Any]] = []
    skipped = []

    def add(name: str, value: float, limit: float) -> None:
        checks.append({"name": name, "value": value, "limit": limit, "passed": abs(value) <= limit})

    for network in reference.networks:
        features = reference.all(network, "0/1/features")
        whole = Moments.of(features)
        spread = float(whole.covariance.trace())
        add(
            f"{network}: reference against itself, share of its variance",
            frechet_distance(whole, whole) / spread,
            ITSELF,
        )
        generator = torch.Generator().manual_seed(picture_seed(protocol.name, network))
        order = torch.randperm(len(features), generator=generator)
        if len(order) >= 8 * features.shape[1]:  # smaller halves are far apart for lack of samples alone
            first, second = (Moments.of(features[half]) for half in order.chunk(2))
            add(
                f"{network}: reference against its other half, share of its variance",
                frechet_distance(first, second) / spread,
                HALVES,
            )
        else:
            skipped.append(
                f"self-check of {network} by halves: too few pictures, {len(order)} for {features.shape[1]} features"
            )
        if all(record.family != network for record in protocol.reference):
            skipped.append(f"self-check of {network} by record: {protocol.name} has no statistics of it on record")
        for record in protocol.reference:
            if record.family != network:
                continue
            if record.tolerance is None:
                continue
            for name, recorded, found in (
                ("norm of the mean", record.mean_norm, float(whole.mean.norm())),
                ("trace of the covariance", record.trace, spread),
            ):
                if recorded is not None:
                    add(f"{network}: {name}, relative to that recorded", found / recorded - 1, record.tolerance)
    failed = [f"{c['name']}: {c['value']:.4g}, expected at most {c['limit']:.4g}" for c in checks if not c["passed"]]
    if failed:
        raise SelfCheckError(
            f"the reference fails its self-check, so nothing was scored: {'; '.join(failed)}. "
            "Is it the data set, the split and the crop that the protocol means?"
        )
    return checks, skipped
