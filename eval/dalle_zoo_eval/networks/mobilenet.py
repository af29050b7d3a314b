"""MobileNet of `dalle_zoo_eval.evaluator` behind the interface of networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo_eval.evaluator import SIZE, MobileNet, load_evaluator
from dalle_zoo_eval.networks.base import NETWORKS, NetworkFileError, check_images, exact_float32

# B images, H W pixels


@dataclass(frozen=True, kw_only=True)
class MobileNetwork:
    """MobileNet, ready to use."""

    name: str
    record: Mapping[str, str | int]
    device: torch.device
    net: MobileNet

    def prepare(self, images: Tensor) -> Tensor:
        """The images as they are: all is done where the network computes."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) to ``features`` (B, 256)."""
        check_images(images)
        with exact_float32(self.device):
            return {"features": self.net.features(images, batch_size=len(images))}


@NETWORKS.register("mobilenet")
def load_mobilenet(location: Path, device: torch.device, expected_sha256: str | None = None) -> MobileNetwork:
    """Opens MobileNet.

    Args:
        location: Its weights file or folder.
        device: Where it computes.
        expected_sha256: Digest that the file must have. Defaults to any.
    """
    try:
        net, found = load_evaluator(location)
    except ModelFolderError as error:
        raise NetworkFileError(str(error)) from None
    if expected_sha256 and found["sha256"] != expected_sha256:
        raise NetworkFileError(f"{location} has sha256 {found['sha256']}, expected {expected_sha256}")
    record: dict[str, str | int] = {
        "name": "mobilenet",
        "sha256": found["sha256"],
        "pixels": SIZE,
        "resize": "bilinear with antialias",
    }
    return MobileNetwork(name="mobilenet", record=record, device=device, net=net.to(device))
