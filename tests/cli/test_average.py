"""``dalle-zoo average``: the mean of the weights of priors is a prior."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle_zoo.cli.main import main
from dalle_zoo.networks import load_prior

WEIGHTS = "model.safetensors"


@pytest.fixture
def moved(model: Path, scratch: Path) -> Path:
    """The prior of the model, with 1 added to all of its weights, as a finished run."""
    folder = scratch / "run" / "model" / "prior"
    shutil.copytree(model / "prior", folder)
    save_file({name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return scratch / "run"


@pytest.mark.parametrize(("weights", "share"), [([], 0.5), (["1", "3"], 0.75), (["1e308", "1e308"], 0.5)])
def test_mean_of_two_priors(model: Path, moved: Path, scratch: Path, weights: list[str], share: float) -> None:
    options = ["--weights", *weights] if weights else []
    assert main(["average", str(model), str(moved), "--out", "mean", *options]) == 0
    first, mean = load_file(model / "prior" / WEIGHTS), load_file(scratch / "mean" / WEIGHTS)
    assert first.keys() == mean.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, first[name] + share)
    assert load_prior(scratch / "mean").config == load_prior(model / "prior").config
    assert main(["export", "--dvae", str(model), "--prior", "mean", "--tokenizer", str(model), "--out", "mine"]) == 0
    assert main(["generate", "a cat", "--model", "mine", "-n", "1"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected two priors or more, and a weight for each, got 1 and 1"),
        (["run", "--weights", "1"], "expected two priors or more, and a weight for each, got 2 and 1"),
        (["run", "--weights", "1", "0"], "--weights must be finite and above 0"),
        (["run", "--weights", "1", "nan"], "--weights must be finite"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_explained_before_work(
    model: Path, moved: Path, scratch: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    try:
        status = main(["average", str(model), *options, "--out", "mean"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (scratch / "mean").exists()


def test_other_networks_have_no_mean(
    model: Path, moved: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = moved / "model" / "prior" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"masks": "full"}))
    assert main(["average", str(model), str(moved), "--out", "mean"]) == 2
    assert "differ in masks row, full: only equal networks have a mean" in capsys.readouterr().err
    assert not (scratch / "mean").exists()
