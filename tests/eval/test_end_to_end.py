"""Evaluation from command line to result file, with small networks and synthetic data in the published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.files import sha256_file

PROTOCOL = """
name: {name}
title: made-up images
dataset: {{coco: val2014, attngan: test}}
captions: {{rule: one, count: {count}, exclusions: {exclusions}}}
image: {{crop: {crop}, size: 16}}
sampling: {{chunk: 3}}
blur: [0, 2]
metrics: [r_precision, frechet]
extractors: {{mobilenet: {{sha256: {sha256}}}}}
"""


@pytest.fixture
def protocol(tmp_path: Path, mobilenet: Path) -> Any:
    def write(name: str, *, count: int, exclusions: str = "false", crop: str = "center", sha256: str = "") -> str:
        path = tmp_path / f"{name}.yaml"
        digest = sha256 or sha256_file(mobilenet)
        path.write_text(PROTOCOL.format(name=name, count=count, exclusions=exclusions, crop=crop, sha256=digest))
        return str(path)

    return write


def run(protocol: str, model: Path, mobilenet: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    arguments = ["--model", str(model), "--data", str(data), f"--network=mobilenet={mobilenet}", f"--out={out}"]
    assert main(["eval", protocol, *arguments, *options]) == 0
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def chosen(out: Path) -> list[tuple[str, str]]:
    """Keys and captions from which images were generated, in order."""
    _, *entries = (json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines())
    return [(key, caption) for key, caption in entries]


def distances(result: dict[str, Any], network: str) -> list[tuple[int, int, int]]:
    rows = [row for row in result["scores"] if row["metric"] == "frechet" and row["family"].startswith(network)]
    return [(row["blur"], row["samples"], row["reference_samples"]) for row in rows]


def test_attngan_layout_of_coco(make: Any, protocol: Any, model: Path, mobilenet: Path, tmp_path: Path) -> None:
    data = make.attngan(birds=False, text=False, test=range(2, 10))
    out = tmp_path / "out"
    result = run(protocol("toy", count=6), model, mobilenet, data, out, "--layout", "attngan")
    dataset = result["groups"]["all"]["dataset"]
    assert (dataset["name"], dataset["items"]) == ("attngan:test", 8)
    assert {caption for _, caption in chosen(out)} == {"a bird", "two bird"}  # as captions.pickle spells them
    for network in ("mobilenet", "ranker"):
        assert distances(result, network) == [(0, 6, 8), (2, 6, 8)]
    assert result["extractors"]["mobilenet"]["sha256"] == sha256_file(mobilenet)
    assert (out / "report.html").is_file()


def test_attngan_layout_of_birds(make: Any, protocol: Any, model: Path, mobilenet: Path, tmp_path: Path) -> None:
    data = make.attngan(birds=True)
    out = tmp_path / "out"
    result = run(protocol("toy", count=2, crop="box"), model, mobilenet, data, out, "--layout", "attngan")
    assert {key for key, _ in chosen(out)} == {"003.Crow/Crow_0001_31", "003.Crow/Crow_0002_32"}
    assert distances(result, "mobilenet") == [(0, 2, 2), (2, 2, 2)]


def test_deduplicated_protocol_excludes_overlaps(
    make: Any, protocol: Any, model: Path, mobilenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make.coco("val2014", {i: [f"caption {c} of {i}" for c in range(2)] for i in range(1, 9)})
    training, names = tmp_path / "training", [f"COCO_val2014_{i:012d}" for i in (2, 5)]
    training.mkdir()
    for name in names:
        (training / f"copy of {name}.jpg").write_bytes((data / "val2014" / f"{name}.jpg").read_bytes())
    overlaps, plain, clean = tmp_path / "overlaps.txt", protocol("toy", count=6), tmp_path / "clean"
    search = ["overlap", plain, "--data", str(data), "--training", str(training), f"--network=mobilenet={mobilenet}"]
    assert main([*search, "--threshold", "0.999999", "--out", str(overlaps)]) == 0
    deduplicated = protocol("toy-dedup", count=6, exclusions="true")
    arguments = ["--model", str(model), "--data", str(data), f"--network=mobilenet={mobilenet}", f"--out={clean}"]
    assert main(["eval", deduplicated, *arguments]) == 2
    assert "toy-dedup excludes images that overlap" in capsys.readouterr().err
    result = run(deduplicated, model, mobilenet, data, clean, "--exclusions", str(overlaps))
    assert result["groups"]["all"]["dataset"]["excluded"] == 2
    assert result["groups"]["all"]["dataset"]["exclusions"] == "overlaps.txt"
    assert distances(result, "mobilenet") == [(0, 6, 6), (2, 6, 6)]
    complete = run(plain, model, mobilenet, data, tmp_path / "complete")
    assert distances(complete, "mobilenet") == [(0, 6, 8), (2, 6, 8)]
    retained = {key for key, _ in chosen(clean)}
    assert len(retained) == 6
    assert not retained & set(names)


def test_weights_other_than_pinned_raise(
    make: Any, protocol: Any, model: Path, mobilenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = protocol("toy", count=2, sha256="f" * 64)
    arguments = ["--model", str(model), "--data", str(make.coco()), f"--network=mobilenet={mobilenet}"]
    assert main(["eval", pinned, *arguments, f"--out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert f"sha256 {sha256_file(mobilenet)}, expected {'f' * 64}" in message
    assert not (tmp_path / "out").exists()
