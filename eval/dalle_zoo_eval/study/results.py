"""Result files of a study: one per system, in the form of `dalle_zoo.results`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from dalle_zoo.inspection import code_version
from dalle_zoo.results import Score, check_result
from dalle_zoo_eval.metrics.base import MetricSpec
from dalle_zoo_eval.metrics.estimates import Estimate
from dalle_zoo_eval.provenance import package_versions
from dalle_zoo_eval.study.analysis import (
    FIRST,
    RULE,
    SECOND,
    Answers,
    agreement,
    excluded_raters,
    shares,
    side_bias,
    tally,
)
from dalle_zoo_eval.study.design import Study, system_pairs
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.strengths import strengths
from dalle_zoo_eval.study.votes import Votes

FAMILY = "human"
"""Family of all scores, as in the published tables."""
FEW = 30
"""Number of captions below which bootstrap intervals are too narrow."""
PACKAGES = ("numpy", "torch", "krippendorff", "choix")


def metric_name(question: str) -> str:
    """Returns the metric of a question, named as in the published tables: ``human_realism``."""
    return f"human_{question}"


@dataclass
class _Scores:
    """Scores of one question, by system."""

    study: Study
    question: str
    of: list[list[Score]]
    left_out: list[str] = field(default_factory=list)

    def add(self, system: int, metric: str, part: str | None, estimate: Estimate, captions: int) -> None:
        interval: tuple[float, float] | None = (estimate.low, estimate.high)
        if estimate.low == estimate.high:
            interval = None  # all captions are equal: the bootstrap cannot show how others would be
            self.left_out.append(
                f"interval of {metric}{f', {part}' if part else ''} for {self.study.systems[system]}: all "
                f"{captions} captions have the same value"
            )
        score = Score(
            metric=metric,
            part=part,
            family=FAMILY,
            value=estimate.value,
            interval=interval,
            samples=captions,
            reference_samples=captions,
        )
        self.of[system].append(score)


def study_results(study: Study, votes: Votes) -> list[dict[str, Any]]:
    """Computes the result of each system.

    Args:
        study: The study.
        votes: Its votes.

    Raises:
        StudyError: No caption has all votes of the raters that are not excluded.
    """
    excluded = excluded_raters(study, votes.votes)
    counted = [vote for vote in votes.votes if vote.rater not in excluded]
    left_out = [f"rater {rater + 1}: {reason}" for rater, reason in excluded.items()]
    if votes.repeated:
        left_out.append(f"{votes.repeated} later votes that differ from the first one of rater, pair and question")
    scores: list[list[Score]] = [[] for _ in study.systems]
    complete = 0
    for question in study.questions:
        found = _Scores(study, question.id, scores)
        answers = []
        for pair in system_pairs(len(study.systems)):
            counts, incomplete = tally(study, counted, question.id, *pair)
            answers.append(Answers(question=question.id, systems=pair, counts=counts, incomplete=incomplete))
        complete = max(complete, *(len(each.counts) for each in answers))
        left_out += _notes(study, answers)
        _add_scores(found, [answer for answer in answers if len(answer.counts)])
        bias = side_bias(study, counted, question.id)
        if bias is not None:
            for system in range(len(study.systems)):
                found.add(system, f"side_bias_{question.id}", None, bias, len(study.captions))
        left_out += found.left_out
    if not complete:
        raise StudyError(
            f"no caption has {study.votes} votes of raters that are not excluded: there are {len(votes.votes)} votes, "
            f"and {len(excluded)} of {len({vote.rater for vote in votes.votes})} raters are excluded. Collect more, "
            "or count fewer votes per caption with --votes"
        )
    raters = {"voted": len({vote.rater for vote in votes.votes}), "excluded": len(excluded)}
    results = [_result(study, n, own, raters, left_out) for n, own in enumerate(scores) if own]
    for result in results:
        check_result(result)
    return results


def _add_scores(found: _Scores, answers: Sequence[Answers]) -> None:
    """Adds the shares, agreement and strengths of one question."""
    study, metric = found.study, metric_name(found.question)
    for answer in answers:
        captions = len(answer.counts)
        for system, against, side in ((*answer.systems, FIRST), (*reversed(answer.systems), SECOND)):
            for name, estimate in shares(answer.counts, study.votes, side).items():
                found.add(system, metric, f"against {study.systems[against]}, {name}", estimate, captions)
        alpha = agreement(answer.counts)
        if alpha is None:
            pair = " and ".join(study.systems[n] for n in answer.systems)
            found.left_out.append(f"agreement on {found.question}, {pair}: undefined for equal or single votes")
            continue
        for system, against in (answer.systems, answer.systems[::-1]):
            part = f"against {study.systems[against]}"
            found.add(system, f"agreement_{found.question}", part, alpha, captions)
    if len(study.systems) > 2 and len(answers) == len(system_pairs(len(study.systems))):
        captions = min(len(answer.counts) for answer in answers)
        for system, estimate in enumerate(strengths(answers, len(study.systems))):
            found.add(system, f"strength_{found.question}", None, estimate, captions)


def _notes(study: Study, answers: Sequence[Answers]) -> Iterator[str]:
    for answer in answers:
        pair = " and ".join(study.systems[n] for n in answer.systems)
        if answer.incomplete:
            yield f"{answer.incomplete} captions with fewer than {study.votes} votes: {answer.question}, {pair}"
        if 0 < len(answer.counts) < FEW:
            yield f"{answer.question}, {pair}: with {len(answer.counts)} captions, intervals are too narrow"


def _metrics(study: Study) -> dict[str, dict[str, Any]]:
    """Returns what a report needs to know of each metric."""
    specs = []
    for question in study.questions:
        section = question.text
        common: dict[str, Any] = {"extractor": (FAMILY,), "section": section}
        unit: dict[str, Any] = {"unit": "%", "format": ".1f"}
        specs += [
            MetricSpec(name=metric_name(question.id), label=f"preferred, {question.id}", **unit, **common),
            MetricSpec(name=f"agreement_{question.id}", label="Krippendorff's alpha", format=".3f", **common),
            MetricSpec(name=f"side_bias_{question.id}", label="answers for the left image", **unit, **common),
        ]
        if len(study.systems) > 2:
            label = "Bradley-Terry strength"
            specs.append(MetricSpec(name=f"strength_{question.id}", label=label, format=".3f", **common))
    return {spec.name: spec.record() for spec in specs}


def _result(
    study: Study, system: int, scores: Sequence[Score], raters: dict[str, int], left_out: Sequence[str]
) -> dict[str, Any]:
    captions = len(study.captions)
    dataset = {"name": "study", "sha256": study.id, "items": captions}
    return {
        "protocol": {
            "name": "study",
            "title": study.title,
            "votes": study.votes,
            "systems": list(study.systems),
            "questions": [asdict(question) for question in study.questions],
            "rule": RULE,
            "seed": study.seed,
        },
        "source": {"kind": "images", "name": study.systems[system], "raters": raters},
        "groups": {"all": {"samples": captions, "captions": captions, "dataset": dataset}},
        "extractors": {},
        "metrics": {name: spec for name, spec in _metrics(study).items() if any(s.metric == name for s in scores)},
        "scores": [asdict(score) for score in scores],
        "left_out": list(left_out),
        "code_version": code_version(),
        "versions": package_versions(PACKAGES),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
