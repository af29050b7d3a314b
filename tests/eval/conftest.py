"""A model of a few thousand weights, and splits of drawn noise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Installed, the package is found by itself; in a checkout it lies in eval/.
sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from dalle_zoo_eval.emoji64 import Split

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.tokenizers import ByteTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained model."""
    torch.manual_seed(0)
    dvae = DVAE(
        DVAEConfig(
            image_size=16, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8
        )
    )
    prior = Prior(
        PriorConfig(
            text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8,
            width=16, num_layers=1, num_heads=2, masks="full",
        )  # fmt: skip
    )
    ranker = Ranker.create(
        RankerConfig(
            image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=1,
            text_width=8, text_layers=1, text_heads=1, embed_dim=8, text_length=12, text_vocab=256,
        ),
        ByteTokenizer(),
    )  # fmt: skip
    pipe = DallePipeline(dvae, prior, ByteTokenizer(), ranker)
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "toy")


def toy_split(name: str, size: int) -> Split:
    """Six samples of three concepts in two styles."""
    draw = torch.Generator().manual_seed(len(name))
    keys = [f"{name}{concept}_{style}" for concept in "abc" for style in ("flat", "blob")]
    images = torch.randint(0, 256, (6, 3, size, size), generator=draw, dtype=torch.uint8)
    return Split(name, keys, [f"a {key}" for key in keys], images)
