"""Votes to results: known cases, exclusions, and scripted raters of known preference that must be recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dalle_zoo_eval.report import write_report
from dalle_zoo_eval.study import analysis
from dalle_zoo_eval.study.analysis import FIRST, SECOND, Answers, agreement, excluded_raters, levels, shares, tally
from dalle_zoo_eval.study.command import main
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.results import study_results
from dalle_zoo_eval.study.strengths import strengths
from dalle_zoo_eval.study.votes import Votes, parse_votes, read_votes

from dalle_zoo.results import check_result, scores_of
from tests.eval.study.conftest import exported, vote_for

RUNS = 200
LEAST_COVERED = 182
"""Of 200 intervals of 95 %, fewer than 182 hold the true value with a probability of 0.6 %."""
FEW_ROUNDS = 50


def votes_of(study: Study, prefer: Any) -> Votes:
    """Votes of all raters; ``prefer(rater, pair, question)`` names a system, or None for the scrambled image."""
    votes = []
    for rater, plan in enumerate(study.raters):
        own = [vote_for(study, rater, n, q.id, prefer(rater, n, q.id)) for n in plan.order for q in study.questions]
        votes += parse_votes(study, exported(study, rater, own))
    return Votes(votes=tuple(votes), repeated=0)


def few_rounds(monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    analysis.appearances.cache_clear()
    monkeypatch.setattr(analysis, "ROUNDS", rounds)


@pytest.fixture(autouse=True)
def _all_rounds() -> None:
    analysis.appearances.cache_clear()


def intact(study: Study, pair: int) -> int:
    return next(system for system in study.pairs[pair].systems if system is not None)


def test_levels_match_figure_7() -> None:
    assert levels(5) == {"5 of 5": 5, "at least 4 of 5": 4, "at least 3 of 5": 3}
    assert levels(4) == {"4 of 4": 4, "at least 3 of 4": 3}
    assert levels(1) == {"1 of 1": 1}


def test_shares_of_counted_votes() -> None:
    counts = np.array([[5, 0, 0], [4, 1, 0], [3, 2, 0], [2, 2, 1]])
    first, second = shares(counts, 5, FIRST), shares(counts, 5, SECOND)
    expected = {"majority of 5": 0.75, "5 of 5": 0.25, "at least 4 of 5": 0.5, "at least 3 of 5": 0.75}
    assert {name: each.value for name, each in first.items()} == {**expected, "share of votes": 0.7}
    assert second["majority of 5"].value == 0
    assert second["share of votes"].value == pytest.approx(0.25)


def test_votes_are_counted_by_system_regardless_of_side(made: Any) -> None:
    study = made(controls=0)
    votes = votes_of(study, lambda rater, pair, question: 0 if rater < 4 or question == "match" else 1).votes
    assert {vote.answer for vote in votes} == {1, 2}
    assert tally(study, votes, "realism", 0, 1)[0].tolist() == [[4, 1, 0]] * 3
    assert tally(study, votes, "match", 0, 1)[0].tolist() == [[5, 0, 0]] * 3
    counts, incomplete = tally(study, [v for v in votes if (v.rater, v.pair) != (0, 0)], "realism", 0, 1)
    assert (counts.tolist(), incomplete) == ([[4, 1, 0]] * 2, 1)


def test_raters_are_excluded_by_the_stated_rule(made: Any) -> None:
    captions = tuple(f"caption {number}" for number in range(20))
    study = made(captions=captions, controls=10, spare=1)

    def prefer(rater: int, pair: int, question: str) -> int | None:
        control = study.pairs[pair].is_control
        if rater == 0:  # does not see what is in the images
            return None if control and question == "realism" else intact(study, pair)
        if rater == 1:  # always the left image
            return study.pairs[pair].systems[int(study.flips[1][pair])]
        return intact(study, pair) if control else 1

    votes = votes_of(study, prefer).votes
    votes = tuple(v for v in votes if v.rater != 2 or not study.pairs[v.pair].is_control)
    excluded = excluded_raters(study, votes)
    assert list(excluded) == [0, 1, 2]
    assert excluded[0] == "preferred the scrambled image in 10 of 20 control questions"
    assert "control" in excluded[1] or "same side" in excluded[1]
    assert excluded[2] == "answered no control question"
    without = tuple(v for v in votes if not study.pairs[v.pair].is_control or v.rater != 1)
    no_controls = made_without_controls(study)
    assert excluded_raters(no_controls, [v for v in without if v.rater == 1]) == {
        1: "gave the same side in 40 of 40 answers"
    }


def made_without_controls(study: Study) -> Study:
    """The same study, in which control pairs are not known as such."""
    from dataclasses import replace

    return replace(study, pairs=tuple(p if not p.is_control else replace(p, systems=(0, 1)) for p in study.pairs))


def test_alpha_equals_a_direct_computation() -> None:
    counts = np.array([[4, 1, 0], [5, 0, 0], [2, 2, 1], [0, 5, 0], [1, 0, 4]])
    per, total = counts.sum(1), counts.sum()
    observed = sum((n * n - (row**2).sum()) / (n - 1) for n, row in zip(per, counts, strict=True)) / total
    expected = (total**2 - (counts.sum(0) ** 2).sum()) / (total * (total - 1))
    found = agreement(counts)
    assert found is not None
    assert found.value == pytest.approx(1 - observed / expected)
    assert found.low < found.value < found.high
    assert agreement(np.array([[5, 0, 0], [5, 0, 0]])) is None
    assert agreement(np.array([[1, 0, 0], [0, 1, 0]])) is None


def test_scripted_raters_are_recovered_within_the_interval() -> None:
    """Each caption has its own clarity; raters prefer the first system, and answer at random with some noise."""
    rng = np.random.default_rng(0)
    captions, votes, noise, sides = 1000, 5, 0.1, 0.06
    # The true share; the error of 400,000 captions is negligible.
    truth_of = votes_for_first(rng, 400_000, votes, noise, sides)
    truth = {"majority of 5": (truth_of >= 3).mean(), "5 of 5": (truth_of == 5).mean(),
             "at least 4 of 5": (truth_of >= 4).mean(), "share of votes": truth_of.mean() / 5}  # fmt: skip
    covered = dict.fromkeys(truth, 0)
    widths = []
    for _ in range(RUNS):
        own = votes_for_first(rng, captions, votes, noise, sides)
        counts = np.stack([own, votes - own, np.zeros_like(own)], axis=1)
        found = shares(counts, votes, FIRST)
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
        widths.append(found["majority of 5"].high - found["majority of 5"].low)
    assert min(covered.values()) >= LEAST_COVERED, covered
    assert sum(covered.values()) >= 0.94 * RUNS * len(covered), covered
    # The intervals are not wider than those of a binomial share.
    p = truth["majority of 5"]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / captions), rel=0.1)


def votes_for_first(
    rng: np.random.Generator, captions: int, votes: int, noise: float, sides: float
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns the votes for the first system per caption; raters with a bias of sides see it on random sides."""
    clarity = rng.beta(4, 2, size=(captions, 1))
    left = rng.random((captions, votes)) < 0.5
    chance = (1 - noise) * clarity + noise / 2 + np.where(left, sides, -sides)
    return (rng.random((captions, votes)) < chance).sum(axis=1).astype(np.int64)


@pytest.mark.slow
def test_strengths_of_scripted_raters_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rounds(monkeypatch, 200)
    rng = np.random.default_rng(3)
    truth, pairs, runs, covered = np.array([0.8, 0.1, -0.9]), [(0, 1), (0, 2), (1, 2)], 20, 0
    for _ in range(runs):
        answers = []
        for one, other in pairs:
            wins = rng.binomial(5, 1 / (1 + np.exp(truth[other] - truth[one])), size=80)
            counts = np.stack([wins, 5 - wins, np.zeros_like(wins)], axis=1)
            answers.append(Answers(question="realism", systems=(one, other), counts=counts, incomplete=0))
        found = strengths(answers, 3)
        assert sum(each.value for each in found) == pytest.approx(0, abs=1e-9)
        covered += sum(each.low <= value <= each.high for each, value in zip(found, truth, strict=True))
    assert covered >= 0.88 * 3 * runs


def test_system_that_never_wins_has_finite_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rounds(monkeypatch, FEW_ROUNDS)
    counts, pairs = np.array([[5, 0, 0]] * 4), [(0, 1), (0, 2), (1, 2)]
    beaten = [Answers(question="q", systems=pair, counts=counts, incomplete=0) for pair in pairs]
    values = [each.value for each in strengths(beaten, 3)]
    assert values == sorted(values, reverse=True)
    assert np.isfinite(values).all()


# ---------------------------------------------------------------- results and the command


def test_results_and_report_of_three_systems(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = made(names=("a", "b", "c"), controls=1, votes=3)
    few_rounds(monkeypatch, FEW_ROUNDS)

    def prefer(rater: int, pair: int, question: str) -> int:
        systems = [system for system in study.pairs[pair].systems if system is not None]
        return max(systems)

    votes = votes_of(study, prefer)
    (tmp_path / "study/votes").mkdir()
    for rater in range(3):
        own = [{"pair": v.pair, "question": v.question, "answer": v.answer, "seconds": 1} for v in votes.votes
               if v.rater == rater]  # fmt: skip
        (tmp_path / f"study/votes/{rater}.json").write_text(json.dumps(exported(study, rater, own)))
    main(["report", str(tmp_path / "study")])
    assert capsys.readouterr().out.strip().endswith("report.html")
    files = sorted((tmp_path / "study/report").glob("result-*.json"))
    assert [path.name for path in files] == ["result-1-a.json", "result-2-b.json", "result-3-c.json"]
    scores = {(s.metric, s.part): s for s in check_result(json.loads(files[1].read_text()))}
    assert scores["human_realism", "against a, majority of 3"].value == 1
    assert scores["human_realism", "against c, 3 of 3"].value == 0
    assert scores["human_match", "against a, share of votes"].samples == 3
    strength = [json.loads(path.read_text()) for path in files]
    values = [s.value for r in strength for s in scores_of(r) if s.metric == "strength_realism"]
    assert values == sorted(values)
    text = (tmp_path / "study/report/report.md").read_text()
    for expected in ("90.0", "93.3", "against DF-GAN, majority of 5", "with 3 captions, intervals are too narrow"):
        assert expected in text
    assert write_report(files, tmp_path / "together")[0].is_file()


def test_fewer_votes_can_count(made: Any, tmp_path: Path) -> None:
    """A study without spare raters, one of whom did not vote."""
    study = made(controls=0)
    for rater in range(4):
        own = [vote_for(study, rater, pair, "realism", 0) for pair in range(len(study.pairs))]
        folder = tmp_path / "study/votes"
        folder.mkdir(exist_ok=True)
        (folder / f"votes-{rater + 1}.json").write_text(json.dumps(exported(study, rater, own)))
    report = ["report", str(tmp_path / "study")]
    with pytest.raises(StudyError, match="count fewer votes per caption with --votes"):
        main(report)
    with pytest.raises(ValueError, match=r"--votes must be an integer in 1\.\.5"):
        main([*report, "--votes", "6"])
    main([*report, "--votes", "4"])
    assert "4 of 4" in (tmp_path / "study/report/report.md").read_text()


def test_too_few_votes_raise(made: Any) -> None:
    study = made(controls=0)
    votes = votes_of(study, lambda *_: 0)
    few = Votes(votes=tuple(v for v in votes.votes if v.rater < 4), repeated=0)
    with pytest.raises(StudyError, match=r"no caption has 5 votes .* 24 votes, and 0 of 4 raters"):
        study_results(study, few)


def test_files_of_votes_are_checked(made: Any, tmp_path: Path) -> None:
    study = made(controls=0)
    own = [vote_for(study, 0, 0, "realism", 0)]
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text(json.dumps(exported(study, 0, own)))
    two.write_text(json.dumps(exported(study, 0, [vote_for(study, 0, 0, "realism", 1)])))
    found = read_votes(study, [one, two, one])
    assert (len(found.votes), found.repeated, found.votes[0].answer) == (1, 1, own[0]["answer"])
    two.write_text(json.dumps({**exported(study, 0, own), "rater": "2-guess"}))
    with pytest.raises(StudyError, match=r"2\.json: the code of the rater is not one of this study"):
        read_votes(study, [one, two])
    two.write_text(json.dumps({**exported(study, 0, own), "study": "other"}))
    with pytest.raises(StudyError, match=r"2\.json: the votes are from another study"):
        read_votes(study, [two])
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"there are no votes in .*: put the files .*votes-N\.json"):
        read_votes(study, [tmp_path / "empty"])
    with pytest.raises(StudyError, match="does not exist"):
        read_votes(study, [tmp_path / "none"])
