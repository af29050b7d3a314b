"""A model of a few thousand weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Installed, the package is found by itself; in a checkout it lies in eval/.
sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.tokenizers import ByteTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained model."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    prior = PriorConfig(
        text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8, width=16,
        num_layers=1, num_heads=2, masks="full",
    )  # fmt: skip
    ranker = RankerConfig(
        image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=1, text_width=8,
        text_layers=1, text_heads=1, embed_dim=8, text_length=12, text_vocab=256,
    )  # fmt: skip
    tokenizer = ByteTokenizer()
    pipe = DallePipeline(dvae, Prior(prior), tokenizer, Ranker.create(ranker, tokenizer))
    return pipe.save_pretrained(tmp_path_factory.mktemp("models") / "toy")
