"""An untrained model and a few images for commands to work on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dalle_zoo import DallePipeline
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.tokenizers import ByteTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a ranker: images of 16 pixels, 4 x 4 codes of 8, bytes as text."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    nn.init.normal_(dvae.decoder.input.weight)  # stands for training: codes that look different
    prior = Prior(
        PriorConfig(
            text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8, width=16, num_layers=1,
            num_heads=2, masks="row",
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return DallePipeline(dvae, prior, ByteTokenizer()).save_pretrained(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five images with captions in text files."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"an image of number {number}\n")
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to an empty folder, in which commands write by default."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
