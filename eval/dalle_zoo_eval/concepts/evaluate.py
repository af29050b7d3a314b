"""Runs a protocol of kind ``concepts``: from a model to result file, sheets and report."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.files import check_ending, write_json
from dalle_zoo.images import save_png
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import SamplingOptions
from dalle_zoo_eval.concepts.figures import Gallery, Generated, left_out, measure_split, targets
from dalle_zoo_eval.concepts.protocol import EVALUATOR, ConceptProtocol
from dalle_zoo_eval.concepts.report import sheet_file, write_report_of
from dalle_zoo_eval.concepts.sampling import plan, sample
from dalle_zoo_eval.concepts.splits import Split, load_samples
from dalle_zoo_eval.evaluator import MobileNet, load_evaluator
from dalle_zoo_eval.measuring import Share
from dalle_zoo_eval.networks.base import exact_float32
from dalle_zoo_eval.provenance import code_version, package_versions
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.subjects import model_sha256

log = logging.getLogger(__name__)

SHEET = 24
"""Captions on a sheet."""
PACKAGES = ("torch", "transformers", "tokenizers")
"""What numbers depend on."""


def evaluate_concepts(
    protocol: ConceptProtocol,
    model: str,
    evaluator: str | None,
    out: Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    share: Share | None = None,
) -> dict[str, Any] | None:
    """Evaluates a model and writes the result file, and beside it a folder of its name with report and sheets.

    generated images are kept as codes in ``.cache`` beside the result file; a killed run goes on from them. The result
    file is written last, so the same call continues until it is there, whenever the last one was killed. All that
    processes share is that folder, so they may be on several machines with a common disk.

    Args:
        protocol: What fixes the numbers.
        model: Bundled name or folder.
        evaluator: Folder of `evaluator.WEIGHTS_FILE`; without it concept accuracy is left out.
        out: Result file, ``.json``.
        device: Where the networks run.
        overwrite: Whether an existing result file is replaced; files of a report without one always are.
        share: Which images this process begins with. Defaults to all.

    Returns:
        What the result file holds; None in a process other than the first, whose work ends with its share.

    Raises:
        ValueError: The protocol, the model, the data or a file does not fit; before anything is sampled.
        FileExistsError: The result is there, and ``overwrite`` is not asked for.
    """
    check_ending("out", out, (".json",))
    share = share or Share()
    if share.rank == 0 and not overwrite and out.exists():
        raise FileExistsError(f"{out}: already there; choose another --out or pass --overwrite")
    SamplingOptions(
        temperature=protocol.temperature, top_k=protocol.top_k, top_p=protocol.top_p
    )  # which checks its own
    net, net_record = _open_evaluator(evaluator, protocol) if evaluator is not None else (None, None)
    pipe = DallePipeline.from_pretrained(model, device=device)
    weights = {name: sha256 for name, sha256 in model_sha256(pipe).items() if name.endswith(".safetensors")}
    splits = load_samples(protocol, pipe.image_tokenizer.image_size)
    plans = [plan(pipe, split.asked, protocol, out.parent / ".cache", weights) for split in splits]
    figures: dict[str, Any] = {}
    with exact_float32(pipe.device):
        sample(pipe, [chunk for chunks in plans for chunk in chunks], share)
        if share.rank != 0:
            log.warning("process %d of %d has done its share", share.rank, share.world)
            return None
        gallery = Gallery.of(net.to(device), [s.complete for s in splits], protocol.ks) if net is not None else None
        sheets = {}
        for split, chunks in zip(splits, plans, strict=True):
            name = split.complete.name
            log.warning("%s: %s", protocol.name, name)
            codes = torch.cat([chunk.codes() for chunk in chunks])
            figures[name], generated = measure_split(pipe, split, codes, gallery, protocol.seed)
            sheets[name] = _sheet(generated, split.asked)
    assert pipe.folder is not None  # or its digests could not have been read
    result: dict[str, Any] = {
        "protocol": asdict(protocol),
        "model": {"name": pipe.folder.name, "weights_sha256": weights},
        "evaluator": net_record,
        "splits": figures,
        "targets": targets(protocol, figures),
        "left_out": left_out(pipe, gallery),
        "code_version": code_version(),
        "versions": {"python": platform.python_version(), **package_versions(PACKAGES)},
        "device": pipe.device.type,  # without a number, which is the process's
        "date": datetime.now(UTC).date().isoformat(),
    }
    result = json.loads(json.dumps(result))  # as those will read it who render the report again
    # The result file last: while it is missing, whatever else is there is from a killed run, and is replaced.
    for name, sheet in sheets.items():
        save_png(sheet, sheet_file(out, name))
    write_report_of(result, out)
    write_json(out, result)
    return result


def _open_evaluator(location: str, protocol: ConceptProtocol) -> tuple[MobileNet, dict[str, Any]]:
    net, record = load_evaluator(location)
    rule = protocol.networks.get(EVALUATOR)
    if rule is not None and rule.sha256 != record["sha256"]:
        raise ValueError(
            f"evaluator {location} has sha256 {record['sha256']}, {protocol.name} means {rule.sha256}: "
            "concept accuracy by other weights does not compare"
        )
    return net, record


def _sheet(generated: Generated, asked: Split) -> Any:
    """The generated images left, the real one right."""
    pairs = (generated.shown[:SHEET].float() / 255, asked.images[:SHEET].float() / 255)
    return comparison_sheet(*pairs, captions=asked.captions[:SHEET])
