"""Reports on protocols of kind ``concepts``, as Markdown, HTML and figures, from the result file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle_zoo.cards import CAPTIONS, figure_tables, kinds_of_images, target_status
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.documents import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    field_table,
    field_text,
    to_markdown,
    write_document,
)
from dalle_zoo_eval.plots import bar_figure
from dalle_zoo_eval.protocol import ProtocolError
from dalle_zoo_eval.report import read_sheet
from dalle_zoo_eval.results import ResultError, read_data

PARTS = {
    "protocol": dict, "model": dict, "splits": dict, "targets": list, "left_out": list, "code_version": str,
    "versions": dict, "device": str, "date": str,
}  # fmt: skip
"""What a result file holds, besides the record of the evaluator, which may be null."""
FIGURES = ("samples", "captions", "keys_sha256", "captions_sha256", "psnr", "codebook", "bits")
"""What it holds of every split, besides what needs a ranker or an evaluator."""


def report_folder(result_file: Path) -> Path:
    """Folder of report and sheets: beside the result file, with its name."""
    return result_file.with_suffix("")


def sheet_file(result_file: Path, split: str) -> Path:
    """Sheet of a split: what was sampled beside what is real."""
    return report_folder(result_file) / f"samples-{split}.png"


def write_concept_report(result_file: Path, out: Path | None = None) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and the images of both.

    The sheets lie where the evaluation has put them; one that is no longer there is left out.

    Args:
        result_file: Result file of a protocol of kind ``concepts``.
        out: Folder (default: `report_folder`); files of these names are replaced.

    Returns:
        The files that were written, the two reports first.

    Raises:
        ResultError: The result file or a sheet cannot be used.
    """
    return write_report_of(read_concept_result(result_file), result_file, out)


def write_report_of(result: Mapping[str, Any], result_file: Path, out: Path | None = None) -> list[Path]:
    """Likewise of what a result file holds, or will hold: an evaluation writes it after the report."""
    files = [path for split in result["splits"] if (path := sheet_file(result_file, split)).is_file()]
    sheets = [read_sheet(path, path.parent, number) for number, path in enumerate(files, 1)]
    return write_document(report_blocks(result, sheets), out or report_folder(result_file))


def read_concept_result(path: Path) -> dict[str, Any]:
    """Reads a result file of kind ``concepts``.

    Raises:
        ResultError: It is not there, or is none; the message names file and part.
    """
    data = read_data(path)
    for part, kind in PARTS.items():
        if not isinstance(data, dict) or not isinstance(data.get(part), kind):
            raise ResultError(f"{path} has no {part}: expected a result file of kind 'concepts' of dalle-zoo eval")
    try:
        protocol = ConceptProtocol.from_dict(data["protocol"])
    except ProtocolError as error:
        raise ResultError(f"{path}: {error}") from None
    if list(data["splits"]) != list(protocol.splits):
        raise ResultError(f"{path}: splits must be {', '.join(protocol.splits)}, got {', '.join(data['splits'])}")
    for split, figures in data["splits"].items():
        missing = [name for name in FIGURES if name not in figures]
        if missing:
            raise ResultError(f"{path}: split {split} has no {', '.join(missing)}: measure again")
    return dict(data)


def concept_summary(result: Mapping[str, Any]) -> str:
    """Targets and figures as Markdown, for the screen."""
    blocks = [*_targets(result), *_figures(result)]
    return to_markdown([block for block in blocks if not isinstance(block, Figure)])


def report_blocks(result: Mapping[str, Any], sheets: list[Figure]) -> list[Block]:
    """The report as a document.

    Args:
        result: Contents of the result file.
        sheets: Images of samples.
    """
    protocol = result["protocol"]
    blocks: list[Block] = [
        Heading(1, protocol["title"]),
        Paragraph(f"Protocol {protocol['name']}, model {result['model']['name']}. What the figures mean:"),
        Bullets(protocol["notes"]),
        *_targets(result),
        *_figures(result),
    ]
    if result["left_out"]:
        blocks += [Heading(2, "Left out"), Bullets(result["left_out"])]
    if sheets:
        side = "Of every pair the generated images is left, the real one right"
        chosen = "the sampled one is the candidate that the ranker prefers, or the first one without a ranker"
        blocks += [Heading(2, "Sampled and real"), Paragraph(f"{side}; {chosen}."), *sheets]
    return [*blocks, *_provenance(result)]


def _targets(result: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        [t["name"], field_text(t["required"]), f"{t['reached']:.3f}", target_status(result, t["met"])]
        for t in result["targets"]
    ]
    if rows:
        yield Heading(2, "Targets")
        yield Table(["to reach", "at least", "measured", "verdict"], rows)
    if overridden := result["protocol"].get("overridden"):
        yield Paragraph(f"Measured with other values than those of {result['protocol']['name']}:")
        yield Bullets(overridden)


def _figures(result: Mapping[str, Any]) -> Iterator[Block]:
    """A table of every subject, and figures of those that say most."""
    figures = {"Bits per image token": _bits_figures, "Concept accuracy": _accuracy_figures}
    for subject, rows in figure_tables(result).items():
        yield Heading(2, subject)
        yield Table(["", *result["splits"]], rows)
        if subject in figures:
            yield from figures[subject](result)


def _bits_figures(result: Mapping[str, Any]) -> Iterator[Block]:
    bits = {split: figures["bits"] for split, figures in result["splits"].items()}
    worse = [split for split, of in bits.items() if of["none"] < of["right"]]
    if worse:
        yield Paragraph(
            f"On {' and '.join(worse)} the right captions cost bits: the model predicts these images better "
            "without a caption."
        )
    bars = {label: {split: of[name] for split, of in bits.items()} for name, label in CAPTIONS.items()}
    text = "Bits per image token"
    yield Figure("bits.png", bar_figure(bars, title=text, score="bits, lower is better"), text)


def _accuracy_figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    accuracy = {split: figures["concept_accuracy"] for split, figures in result["splits"].items()}
    for k in result["protocol"]["ks"]:
        bars = {
            label: {split: 100 * of[kind][f"top{k}"] for split, of in accuracy.items()}
            for kind, label in kinds_of_images(result["protocol"]["candidates"]).items()
            if all(kind in of for of in accuracy.values())
        }
        text = f"Concept accuracy, top {k}"
        png = bar_figure(bars, title=text, score="images, %, higher is better")
        yield Figure(f"concept-accuracy-top{k}.png", png, text)


def _provenance(result: Mapping[str, Any]) -> Iterator[Block]:
    """Everything that fixes the numbers."""
    digests = ("keys_sha256", "captions_sha256")
    splits = {split: {name: figures[name] for name in digests} for split, figures in result["splits"].items()}
    parts = {name: result[name] for name in ("model", "code_version", "versions", "device", "date")}
    yield Heading(2, "What was measured")
    yield field_table({"model": parts.pop("model"), "evaluator": result["evaluator"], "splits": splits, **parts})
    yield Heading(2, "Protocol")
    shown_above = ("notes", "targets", "overridden")
    yield field_table({name: value for name, value in result["protocol"].items() if name not in shown_above})
