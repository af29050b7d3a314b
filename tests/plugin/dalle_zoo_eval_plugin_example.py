"""A metric, an extractor and a dataset that makes its own prompts, from outside dalle-zoo."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dalle_zoo_eval.datasets import EvalDataset, Item
from dalle_zoo_eval.metrics import METRICS
from PIL import Image
from torch import Tensor

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def read_colors(root: Path | None, split: str) -> EvalDataset:
    """Prompts for plain images, with what each must show."""
    items = []
    for number, (name, color) in enumerate(COLORS.items()):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), color).save(file, "PNG")
        items.append(
            Item(
                key=f"{name}_{number}", image=file.getvalue(), captions=(f"a {name} image",), concept=name,
                targets={"color": color},
            )
        )  # fmt: skip
    return EvalDataset(name=f"colors:{split}", root=root or split, items=tuple(items))


@METRICS.register("color_error", lower_is_better=True, label="color error", format=".1f", images=("real", "generated"))
def color_error(images: Tensor, targets: Sequence[Mapping[str, Any]]) -> float:
    """Mean distance of the pixels from the color of the prompt."""
    wanted = torch.tensor([target["color"] for target in targets])
    return float((images.float().mean((2, 3)) - wanted).norm(dim=1).mean())


@dataclass(frozen=True)
class ChannelMeans:
    """Means of the color channels as features."""

    name: str = "channel_means"
    record: Mapping[str, Any] = field(default_factory=lambda: {"name": "channel_means", "sha256": "0" * 64})

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": images.float().mean((2, 3)) / 255}


def open_channel_means(location: Path, device: torch.device, expected_sha256: str | None = None) -> ChannelMeans:
    """Opens it; there is no file."""
    del location, device, expected_sha256
    return ChannelMeans()
