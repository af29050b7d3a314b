"""Votes to numbers: who is excluded, how the votes of each caption are divided, agreement, and the bias of sides."""

# C captions, V votes per caption; columns of counts are votes for the first system, for the second one, and neither

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dalle_zoo_eval.metrics.estimates import LEVEL, SEED, Estimate
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.votes import LEFT, NEITHER, RIGHT, Vote

Counts = NDArray[np.int64]

MAX_FAILED = 0.2
"""Largest share of control questions in which a rater may prefer the scrambled image."""
ONE_SIDED = 0.95
"""Share of answers for one side from which a rater is excluded."""
MIN_ANSWERS = 20
"""Number of answers from which the previous rule applies."""
RULE = (
    f"A rater is excluded who prefers the scrambled image in more than {MAX_FAILED:.0%} of the answered control "
    "questions, who answered no control question of a study that has control pairs, or who gives the same side in at "
    f"least {ONE_SIDED:.0%} of {MIN_ANSWERS} or more answers. Of more votes than needed, those of the raters with the "
    "lowest numbers count."
)
FIRST, SECOND = 0, 1
"""Columns of counts."""
ROUNDS = 2000
"""Rounds of the bootstrap; with 1,000, intervals of simulated studies are slightly too narrow."""


def chosen_image(study: Study, vote: Vote) -> int | None:
    """Returns which image of the pair a vote prefers, 0 or 1; None for neither."""
    if vote.answer == NEITHER:
        return None
    return int((vote.answer == RIGHT) != study.flips[vote.rater][vote.pair])


def excluded_raters(study: Study, votes: Sequence[Vote]) -> dict[int, str]:
    """Returns the raters whose votes do not count, by `RULE`, with the reason."""
    has_controls = any(pair.is_control for pair in study.pairs)
    by_rater: dict[int, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    excluded = {}
    for rater, own in sorted(by_rater.items()):
        controls = [vote for vote in own if study.pairs[vote.pair].is_control]
        choices = [(study.pairs[vote.pair].systems, chosen_image(study, vote)) for vote in controls]
        failed = sum(choice is not None and systems[choice] is None for systems, choice in choices)
        sides = [vote.answer for vote in own if vote.answer != NEITHER]
        most = max(sides.count(LEFT), sides.count(RIGHT))
        if has_controls and not controls:
            excluded[rater] = "answered no control question"
        elif controls and failed > MAX_FAILED * len(controls):
            excluded[rater] = f"preferred the scrambled image in {failed} of {len(controls)} control questions"
        elif len(sides) >= MIN_ANSWERS and most >= ONE_SIDED * len(sides):
            excluded[rater] = f"gave the same side in {most} of {len(sides)} answers"
    return excluded


def tally(study: Study, votes: Sequence[Vote], question: str, one: int, other: int) -> tuple[Counts, int]:
    """Counts the votes of each caption for a question and two systems.

    Args:
        study: The study.
        votes: Votes of the raters that are not excluded.
        question: Id of the question.
        one: Number of the first system.
        other: Number of the second system.

    Returns:
        Counts (C, 3) of the captions that have all votes, and the number of captions that have fewer.
    """
    own: dict[int, list[Vote]] = {n: [] for n, pair in enumerate(study.pairs) if set(pair.systems) == {one, other}}
    for vote in votes:
        if vote.question == question and vote.pair in own:
            own[vote.pair].append(vote)
    rows = []
    for number, cast in own.items():
        counted = sorted(cast, key=lambda vote: vote.rater)[: study.votes]
        if len(counted) == study.votes:
            choices = [chosen_image(study, vote) for vote in counted]
            systems = [None if choice is None else study.pairs[number].systems[choice] for choice in choices]
            rows.append([systems.count(one), systems.count(other), systems.count(None)])
    return np.array(rows, dtype=np.int64).reshape(-1, 3), len(own) - len(rows)


def levels(votes: int) -> dict[str, int]:
    """Returns the levels of agreement of figure 7, each with the votes that it needs, from all to a majority.

    Example:
        >>> levels(5)
        {'5 of 5': 5, 'at least 4 of 5': 4, 'at least 3 of 5': 3}
    """
    least = votes // 2 + 1
    return {f"{'' if n == votes else 'at least '}{n} of {votes}": n for n in range(votes, least - 1, -1)}


def shares(counts: Counts, votes: int, system: int) -> dict[str, Estimate]:
    """Returns the shares of captions that a system wins, each with a bootstrap interval over captions.

    Args:
        counts: Votes per caption, (C, 3).
        votes: Votes per caption.
        system: `FIRST` or `SECOND`.

    Returns:
        ``majority of V``, the `levels`, and ``share of votes``.
    """
    own = counts[:, system]
    needed = {f"majority of {votes}": votes // 2 + 1, **levels(votes)}
    # In votes, which are integers: equal captions then give equal rounds.
    columns = [votes * (own >= least) for least in needed.values()] + [own]
    values = np.stack(columns, axis=1).astype(np.float32)
    rounds = (appearances(len(own)) @ values).astype(np.float64) / (votes * len(own))
    means = values.sum(axis=0, dtype=np.float64) / (votes * len(own))
    names = [*needed, "share of votes"]
    return {name: with_interval(float(means[k]), rounds[:, k].tolist()) for k, name in enumerate(names)}


def resampled(count: int) -> Iterator[NDArray[np.int64]]:
    """Yields the captions of each round of the bootstrap, (C,)."""
    rng = np.random.default_rng(SEED)
    for _ in range(ROUNDS):
        yield rng.integers(count, size=count)


@lru_cache(maxsize=2)
def appearances(count: int) -> NDArray[np.float32]:
    """Returns how often each caption is in each round of the bootstrap, (rounds, C).

    Sums of votes are integers below 2^24, which are exact in float32.
    """
    return np.stack([np.bincount(rows, minlength=count).astype(np.float32) for rows in resampled(count)])


def with_interval(value: float, values: Sequence[float]) -> Estimate:
    """Returns a score with the interval of its bootstrap values."""
    tail = (1 - LEVEL) / 2
    # This definition of a quantile does not make the interval too narrow for the number of rounds.
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [tail, 1 - tail], method="weibull")
    return Estimate(value, float(low), float(high))


def agreement(counts: Counts) -> Estimate | None:
    """Returns Krippendorff's alpha of nominal answers, with a bootstrap interval over captions.

    Args:
        counts: Votes per caption, (C, 3).

    Returns:
        The agreement; None where it is undefined, because all votes are equal or captions have a single vote.
    """
    alpha = alpha_function()
    value = alpha(counts)
    if value is None:
        return None
    rounds = [alpha(counts[rows]) for rows in resampled(len(counts))]
    return with_interval(value, [each for each in rounds if each is not None])


def alpha_function() -> Callable[[Counts], float | None]:
    """Returns the function that computes Krippendorff's alpha from counts; it returns None where alpha is undefined.

    Raises:
        ImportError: The package krippendorff is not installed.
    """
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError(f"a study report needs krippendorff ({error}): pip install 'dalle-zoo[study]'") from None

    def alpha(counts: Counts) -> float | None:
        used = counts[:, counts.any(axis=0)]
        if used.shape[1] < 2 or used.sum(axis=1).max() < 2:
            return None
        return float(krippendorff.alpha(value_counts=used, level_of_measurement="nominal"))

    return alpha


def side_bias(study: Study, votes: Sequence[Vote], question: str) -> Estimate | None:
    """Returns the share of answers for the left image, with a bootstrap interval over captions.

    Control pairs and the answer "neither" do not count. Without a bias, the share is 0.5 because sides are random.

    Returns:
        The share; None if there is no such answer.
    """
    sides: Mapping[int, list[int]] = defaultdict(lambda: [0, 0])
    for vote in votes:
        if vote.question == question and vote.answer != NEITHER and not study.pairs[vote.pair].is_control:
            sides[study.pairs[vote.pair].caption][vote.answer == RIGHT] += 1
    if not sides:
        return None
    counts = np.array(list(sides.values()), dtype=np.float32)
    sums = (appearances(len(counts)) @ counts).astype(np.float64)
    return with_interval(float(counts[:, 0].sum() / counts.sum()), (sums[:, 0] / sums.sum(axis=1)).tolist())


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a question shows about two systems."""

    question: str
    """Id of the question."""
    systems: tuple[int, int]
    """Numbers of the systems."""
    counts: Counts
    """Votes per caption, (C, 3)."""
    incomplete: int
    """Captions with too few votes."""
