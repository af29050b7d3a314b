"""The command ``dalle-zoo study``: ``make``, ``serve`` and ``report``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.outputs import check_folder
from dalle_zoo.cli.parser import parser
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo.values import as_integer

HELP = """\
Compare the images of two or more systems by votes of people, as in figure 7 of the paper.

  dalle-zoo study make A B --captions F --votes 5 --out FOLDER   the page for raters
  dalle-zoo study serve FOLDER                                   serve the page and collect votes
  dalle-zoo study report VOTES...                                shares, agreement, result files
"""


def main(arguments: list[str]) -> None:
    """Runs a part of a study: the entry point of ``dalle-zoo study``.

    Args:
        arguments: Command line after ``dalle-zoo study``.
    """
    parts = {"make": make, "serve": serve, "report": report}
    if not arguments or arguments[0].startswith("-"):
        p = parser("study", HELP)
        p.add_argument("part", choices=list(parts), help="what to do; must be the first argument")
        p.parse_args(arguments)
    if arguments[0] not in parts:
        raise UnknownNameError(suggest("part of dalle-zoo study", arguments[0], parts))
    parts[arguments[0]](arguments[1:])


def make(arguments: list[str]) -> None:
    """Makes a study: ``dalle-zoo study make``.

    Args:
        arguments: Command line after ``dalle-zoo study make``.
    """
    p = parser(
        "study make",
        "Make a study: a page for raters, which opens without a server, and study.json, which the organizer keeps.",
    )
    p.add_argument(
        "systems", type=Path, nargs="+", metavar="SYSTEM", help="folder of images, or manifest.jsonl of generate"
    )
    p.add_argument("--captions", type=Path, required=True, help="captions: one per line, or JSONL with prompt")
    p.add_argument("--out", type=Path, required=True, help="folder to make")
    p.add_argument(
        "--name", action="append", default=[], help="name of a system, once per system [the name of its folder]"
    )
    p.add_argument("--votes", type=int, default=5, help="votes per pair and question [5]")
    p.add_argument("--questions", type=Path, help="YAML file with questions [those of the paper]")
    p.add_argument("--title", default="Which image is better?", help="title of the page [Which image is better?]")
    p.add_argument("--controls", type=int, default=10, help="control pairs per rater, with a scrambled image [10]")
    p.add_argument("--num-captions", type=int, help="number of captions to choose at random [all]")
    p.add_argument("--per-rater", type=int, help="largest number of pairs per rater, without controls [all]")
    p.add_argument("--spare", type=int, default=0, help="raters who replace excluded ones [0]")
    p.add_argument("--seed", type=int, default=0, help="seed of sheets, order, sides and controls [0]")
    options = p.parse_args(arguments)
    check_folder("--out", options.out, overwrite=None)
    from dalle_zoo_eval.study.design import PAGE, RATERS
    from dalle_zoo_eval.study.make import Plan, make_study
    from dalle_zoo_eval.study.questions import read_questions

    plan = Plan(
        systems=tuple(zip(_names(options), options.systems, strict=True)),
        captions=options.captions,
        questions=read_questions(options.questions),
        title=options.title,
        votes=options.votes,
        controls=options.controls,
        num_captions=options.num_captions,
        per_rater=options.per_rater,
        spare=options.spare,
        seed=options.seed,
    )
    study = make_study(plan, options.out)
    answers = max(len(rater.order) for rater in study.raters) * len(study.questions)
    print(f"{len(study.raters)} raters, at most {answers} answers each")  # noqa: T201 (what a command is for)
    print(f"page for raters: {options.out / PAGE / 'index.html'}")  # noqa: T201
    print(f"their codes: {options.out / RATERS}")  # noqa: T201


def _names(options: argparse.Namespace) -> list[str]:
    if options.name:
        if len(options.name) != len(options.systems):
            raise UserError(
                f"--name is given {len(options.name)} times for {len(options.systems)} systems: give it once per "
                "system, in their order, or not at all"
            )
        return list(options.name)
    return [(path.parent if path.suffix == ".jsonl" else path).resolve().name for path in options.systems]


def serve(arguments: list[str]) -> None:
    """Serves a study: ``dalle-zoo study serve``.

    Args:
        arguments: Command line after ``dalle-zoo study serve``.
    """
    p = parser("study serve", "Serve the page of a study, and append the votes to FOLDER/votes/server.jsonl.")
    p.add_argument("folder", type=Path, help="folder of the study")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all [127.0.0.1]")
    p.add_argument("--port", type=int, default=8000, help="port, 0 for any free one [8000]")
    options = p.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must be 0..65535, got {options.port}")
    from dalle_zoo_eval.study.design import RATERS
    from dalle_zoo_eval.study.server import StudyServer

    with StudyServer(options.folder, options.host, options.port) as server:
        address = f"http://{options.host}:{server.server_port}/#CODE"
        print(f"{address}, with the codes of {options.folder / RATERS}", flush=True)  # noqa: T201
        print(f"{server.votes.count} votes in {server.votes.path}; stop with Ctrl-C", flush=True)  # noqa: T201
        server.serve_forever()


def report(arguments: list[str]) -> None:
    """Reports a study: ``dalle-zoo study report``.

    Args:
        arguments: Command line after ``dalle-zoo study report``.
    """
    p = parser("study report", "Compute shares, agreement and biases from votes; write a report and result files.")
    p.add_argument(
        "votes", type=Path, nargs="+", help="exported votes, server.jsonl, folders of them, or the study's folder"
    )
    p.add_argument("--study", type=Path, help="folder of the study [the one that the votes are in]")
    p.add_argument(
        "--votes", dest="counted", type=int, metavar="N",
        help="votes per caption that count, fewer if raters are excluded and none is spare [those of the study]",
    )  # fmt: skip
    p.add_argument("--out", type=Path, help="folder of the report [report in the folder of the study]")
    options = p.parse_args(arguments)
    from dalle_zoo_eval.study.analysis import alpha_function
    from dalle_zoo_eval.study.design import Study
    from dalle_zoo_eval.study.report import write_study_report
    from dalle_zoo_eval.study.results import study_results
    from dalle_zoo_eval.study.votes import read_votes, study_folder

    alpha_function()  # raises an error before any work if its package is missing
    folder = options.study or study_folder(options.votes)
    out = options.out or folder / "report"
    check_folder("--out", out)
    study = Study.read(folder)
    votes = read_votes(study, options.votes)
    if options.counted is not None:
        as_integer("--votes", options.counted, least=1, most=study.votes)
        study = replace(study, votes=options.counted)
    results = study_results(study, votes)
    print(write_study_report(results, out)[1])  # noqa: T201
