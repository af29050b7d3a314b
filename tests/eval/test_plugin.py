"""Another distribution adds a metric, an extractor and a dataset, which a protocol names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOCOL = """
name: colors
title: Plain images
dataset: {colors: all}
captions: {rule: first}
image: {size: null}
sampling: {chunk: 2}
metrics:
- color_error
- frechet: {extractor: channel_means, interval: false}
selfcheck: false
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plugin installed, without the network."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"),
        *("--no-build-isolation", "--no-index", "--target", str(folder), str(ROOT / "tests/plugin")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def run(site: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "eval")])
    done = subprocess.run(
        [sys.executable, "-m", "dalle_zoo", *arguments], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # four processes that import everything; tests/test_plugins.py has the registries
def test_plugin_metric_extractor_and_dataset_work_by_name(site: Path, model: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "colors.yaml", tmp_path / "out"
    path.write_text(PROTOCOL)
    assert "color_error, frechet" in run(site, "eval", str(path), "--help")
    network = f"--network=channel_means={tmp_path}"
    said = run(site, "eval", str(path), "--model", str(model), network, "--out", str(out))
    result = json.loads((out / "result.json").read_text())
    errors = {row["images"]: row["value"] for row in result["scores"] if row["metric"] == "color_error"}
    assert errors["real"] == 0
    assert errors["generated"] > 10
    (distance,) = [row for row in result["scores"] if row["metric"] == "frechet"]
    assert distance["family"] == "channel_means"
    assert "| color error, generated images |" in said
    # The report is rendered from the result file alone, by a Python that does not have the plugin.
    rendered = run(tmp_path, "report", str(out / "result.json"), "--out", str(tmp_path / "again"))
    assert rendered.strip().endswith("report.html")
    assert "| color error, real images (ceiling) | 0.0 |" in (tmp_path / "again/report.md").read_text()
