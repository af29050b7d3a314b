"""The ranker of a dalle-zoo model as a judge: where no Inception is at hand, under its own name.

It has chosen the images that it judges here, if they were reranked: a reason to trust another network more.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dalle_zoo_eval.networks.base import NETWORKS
from dalle_zoo_eval.networks.clip import ContrastiveNetwork, open_contrastive


@NETWORKS.register("ranker")
def load_ranker(location: Path, device: torch.device, expected_sha256: str | None = None) -> ContrastiveNetwork:
    """Opens a ranker.

    Args:
        location: Folder of a model, whose ``ranker`` is taken, or of a ranker.
        device: Where it computes.
        expected_sha256: Digest that its ``model.safetensors`` must have. Defaults to any.
    """
    inner = location / "ranker"
    return open_contrastive("ranker", inner if inner.is_dir() else location, device, expected_sha256)
