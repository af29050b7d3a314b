"""Renders the report of any result file again, where the evaluation has put it or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dalle_zoo_eval.concepts.report import write_concept_report
from dalle_zoo_eval.protocol import BENCHMARK, CONCEPTS
from dalle_zoo_eval.report import SHEETS, write_report
from dalle_zoo_eval.results import ResultError, read_data


def render(results: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes the report of one result, or of several of one benchmark, with the sheets that lie beside them.

    Args:
        results: Result files.
        out: Folder. Defaults to that of the evaluation.

    Returns:
        The files that were written, ``report.md`` and ``report.html`` first.

    Raises:
        ResultError: A file cannot be used, the results do not belong together, or the folder of several is missing.
    """
    several = len(results) > 1
    if CONCEPTS in {_kind(path) for path in results}:
        if several:
            raise ResultError(f"results of kind {CONCEPTS!r} stand alone: make a report of each")
        return write_concept_report(results[0], out)
    if several and out is None:
        raise ResultError("a report of several results needs a folder: give --out DIR")
    sheets = [path.parent / name for path in results for name in SHEETS]
    return write_report(results, out or results[0].parent, sheets=[sheet for sheet in sheets if sheet.is_file()])


def _kind(path: Path) -> str:
    data = read_data(path)
    protocol = data.get("protocol") if isinstance(data, dict) else None
    return str(protocol.get("kind", BENCHMARK)) if isinstance(protocol, dict) else BENCHMARK
