"""docs/generate: every block of the first pages runs, in their order; the table of inpainting is stored."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main
from dalle_zoo.image_settings import read_settings
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.tokenizers import ByteTokenizer

ROOT = Path(__file__).parents[1]
PAGES = ("prompts", "regions", "reproduce", "rank", "memory-and-speed")
"""Each page continues with the files and the names of those before it."""
PAGE = "\n".join((ROOT / f"docs/generate/{name}.md").read_text(encoding="utf-8") for name in PAGES)
FIRST = (ROOT / "docs/first-ten-minutes.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks/results/inpainting.json").read_text(encoding="utf-8"))
INSTALLING = ("make ", ". .venv")
"""Beginnings of lines that install, which the tests leave out."""


def test_the_table_is_the_stored_one() -> None:
    rows = []
    for region, figures in RESULT["regions"].items():
        gain = figures["gain_likelihood"]
        means = {name: f"{figures[f'psnr_{name}']['mean']:.1f}" for name in ("chance", "likelihood", "ranker", "best")}
        rows.append(
            f"| {region} | {means['chance']} | {means['likelihood']} | {gain['mean']:+.2f} ({gain['low']:+.2f} to "
            f"{gain['high']:+.2f}) | {means['ranker']} | {means['best']} |"
        )
    table = "\n".join(rows)
    assert table in PAGE, f"expected:\n{table}"
    assert RESULT["command"].startswith("python benchmarks/inpainting.py")
    assert f"--images {RESULT['images']} --candidates {RESULT['candidates']}" in PAGE


def test_likelihood_beats_chance_for_masked_regions() -> None:
    gains = [figures["gain_likelihood"] for figures in RESULT["regions"].values()]
    assert all(gain["low"] > 0 for gain in gains), "with 95% confidence"
    for figures in RESULT["regions"].values():
        assert figures["best_chosen_by_likelihood"] > 1.4 * figures["best_chosen_by_chance"], "as the page says"


class Brightness(nn.Module):
    """A ranker that prefers bright images."""

    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh model of the size of the bundled one's images, under its name, so that the page takes a second."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=64, width=4, num_groups=4, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    nn.init.normal_(dvae.decoder.input.weight)  # stands for training: codes that look different
    prior = Prior(
        PriorConfig(
            text_length=12, text_vocab=256, image_height=8, image_width=8, codebook_size=8, width=16, num_layers=1,
            num_heads=2, masks="row",
        )
    )  # fmt: skip
    DallePipeline(dvae, prior, ByteTokenizer()).save_pretrained(tmp_path / "bundled/composition")
    monkeypatch.setattr("dalle_zoo.zoo.BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(DallePipeline, "ranker", Brightness())


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs all blocks of a page in a folder; returns the names that the Python blocks define."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(python|sh)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for number, (language, block) in enumerate(blocks):
        if language == "python":
            exec(compile(block, f"page, block {number}", "exec"), names)
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.startswith("dalle-zoo "):
                assert main(shlex.split(line)[1:]) == 0, line
            elif not line.startswith(INSTALLING):
                subprocess.run(["bash", "-c", line], check=True)
    return names


def check_page(folder: Path, names: dict[str, Any]) -> None:
    """Checks what the page says about its files and values."""
    with Image.open(folder / "again.png") as again, Image.open(folder / "dogs/000-000.png") as first:
        assert again.convert("RGB").tobytes() == first.convert("RGB").tobytes()
    assert len(list((folder / "dogs").glob("*.png"))) == 2
    lines = [json.loads(line) for line in (folder / "from-file/manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a red apple", "a blue heart"]
    assert read_settings(names["paths"][0]) == names["output"].settings[0]
    kept = names["inpainted"].settings[0].given_codes()
    assert (kept >= 0).sum() == kept.numel() // 2, "the mask is the right half"
    assert (names["continued"].settings[0].given_codes() >= 0).sum() == kept.numel() * 3 // 4


def test_every_block_runs(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_page(PAGE, tmp_path, monkeypatch)
    check_page(tmp_path, names)
    assert "64 of 64 (1, 3, 64, 64)" in capsys.readouterr().out


@pytest.mark.slow  # half a minute with the bundled model
def test_every_block_runs_with_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_page(tmp_path, run_page(PAGE, tmp_path, monkeypatch))


@pytest.mark.slow  # a minute: it trains two small networks
@pytest.mark.filterwarnings("ignore:.*(does not have many workers|log_every_n_steps|treespec, LeafSpec).*")
def test_the_first_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    run_page(FIRST, tmp_path, monkeypatch)
    assert {"grid.png", "changed.png", "apple-again.png"} <= {path.name for path in tmp_path.iterdir()}
    assert sorted(path.name for path in (tmp_path / "runs/mine/checkpoints").iterdir())[-1] == "00000020.ckpt"
    assert (tmp_path / "compared/report.md").is_file()
