"""Bradley-Terry strengths of more than two systems, by `choix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_zoo_eval.metrics.estimates import Estimate
from dalle_zoo_eval.study.analysis import FIRST, SECOND, Answers, appearances, with_interval

PRIOR = 0.5
"""Votes that are added to each side of each pair, so that a system that never loses has a finite strength."""


def strengths(answers: Sequence[Answers], systems: int) -> list[Estimate]:
    """Returns the Bradley-Terry strength of each system with a bootstrap interval.

    The probability that a vote prefers system i to system j is 1 / (1 + exp(s_j - s_i)); the mean of all strengths is
    0. Answers "neither" do not count. The captions of each pair of systems are resampled.

    Args:
        answers: Votes on each pair of systems for one question.
        systems: Number of systems.

    Raises:
        ImportError: The package choix is not installed.
    """
    choix = _choix()
    wins = [answer.counts[:, [FIRST, SECOND]] for answer in answers]
    value = _fit(choix, answers, [each.sum(axis=0) for each in wins], systems)
    sums = [appearances(len(each)) @ each for each in wins]
    rounds = np.array([_fit(choix, answers, list(each), systems) for each in zip(*sums, strict=True)])
    return [with_interval(float(value[n]), rounds[:, n].tolist()) for n in range(systems)]


def _fit(
    choix: Any, answers: Sequence[Answers], wins: Sequence[NDArray[np.int64]], systems: int
) -> NDArray[np.float64]:
    matrix = np.zeros((systems, systems))
    for answer, (first, second) in zip(answers, wins, strict=True):
        one, other = answer.systems
        matrix[one, other], matrix[other, one] = first, second
    found = np.asarray(choix.ilsr_pairwise_dense(matrix, alpha=PRIOR), dtype=np.float64)
    centered: NDArray[np.float64] = found - found.mean()
    return centered


def _choix() -> Any:
    try:
        import choix
    except ImportError as error:
        raise ImportError(f"more than two systems need choix ({error}): pip install 'dalle-zoo[study]'") from None
    return choix
