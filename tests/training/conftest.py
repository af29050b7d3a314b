"""Shards, codes and untrained networks, small enough for runs of a second."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_zoo.cli.main import main
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.networks import save_network
from dalle_zoo.tokenizers import BPETokenizer

SIZE, COUNT = 16, 22
"""Side of the images the networks take, and number of samples."""
CONFIG = DVAEConfig(image_size=SIZE, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8)


def caption(number: int, style: str) -> str:
    return f"a {style} of a {('red', 'green', 'blue')[number % 3]} {('apple', 'car')[number % 2]}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of images with two captions each."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (24, 28, 3), np.uint8)).save(image, "PNG")
                captions = f"{caption(number, 'photo')}\n{caption(number, 'drawing')}\n".encode()
                for name, data in ((f"{number:03d}.png", image.getvalue()), (f"{number:03d}.txt", captions)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained dVAE of 8 codes on a 4 x 4 grid, and a BPE tokenizer of 280 entries."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    (folder / "dvae").mkdir()
    save_network(DVAE(CONFIG), "dvae", folder / "dvae")
    captions = [caption(number, style) for number in range(COUNT) for style in ("photo", "drawing")]
    BPETokenizer.train(captions, vocab_size=280).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def codes(shards: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two crops of every image as code shards, written by the command."""
    folder = tmp_path_factory.mktemp("codes") / "train"
    arguments = ["encode", str(shards), "--model", str(parts), "--variants", "2", "--out", str(folder)]
    assert main(arguments) == 0
    return folder
