"""A network that is not used in generation: MobileNet v1 trained on ImageNet.

Its weights are not part of the project. The file ``mobilenet_v1_025_224.safetensors`` holds Google's
(Apache-2.0) of width 0.25 under the names used here. Distances between its features are not FID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.files import sha256_file
from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.weights import load_weights
from dalle_zoo_eval.extractors.base import EXTRACTORS, ExtractorFileError, check_images, exact_float32
from dalle_zoo_eval.moments import in_batches

# B images, H W pixels

CPU = torch.device("cpu")
WEIGHTS_FILE = "mobilenet_v1_025_224.safetensors"
NAME = "MobileNet v1 0.25, ImageNet-1k"
SIZE = 128
"""Side to which images are scaled, pixels: 64-pixel images gain nothing from the 224 of training."""

_WIDTHS = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
_HALVING = (0, 2, 4, 6, 12)
"""Stages that halve the image."""


class Convolution(nn.Module):
    """Convolution without bias, batch normalization, ReLU6."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        # Padding of TensorFlow for an even side: on all sides or, when halving, one row and column at the end.
        around = kernel // 2
        self.padding = (0, 1, 0, 1) if stride == 2 else (around,) * 4
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H, W), with half the sides for a stride of 2."""
        return F.relu6(self.norm(self.conv(F.pad(x, self.padding))))


class MobileNet(nn.Module):
    """MobileNet v1 of width 0.25, 256 features.

    Reference: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications
    (Howard et al., 2017), table 1.
    """

    def __init__(self) -> None:
        super().__init__()
        body: list[nn.Module] = [Convolution(3, _WIDTHS[0], 3, stride=2)]
        for stage in range(1, len(_WIDTHS)):
            before, after = _WIDTHS[stage - 1], _WIDTHS[stage]
            stride = 2 if stage in _HALVING else 1
            body.append(Convolution(before, before, 3, stride, groups=before))
            body.append(Convolution(before, after, 1))
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(_WIDTHS[-1], 1000)

    @torch.inference_mode()
    def features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Returns the means of the last feature maps.

        Args:
            images: Pixels in [0, 1] or uint8, (B, 3, H, W).
            batch_size: Number of images processed at once. Defaults to 64.

        Returns:
            Features of at least 0, float32 (B, 256) on the CPU.
        """
        parts = [self._features(part.to(self.head.weight.device)) for part in in_batches(images, batch_size)]
        return torch.cat(parts).cpu()

    def _features(self, images: Tensor) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        maps: Tensor = self.body(x * 2 - 1)
        return maps.mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class MobileNetExtractor:
    """MobileNet, ready to use."""

    name: str
    record: Mapping[str, str | int]
    device: torch.device
    net: MobileNet

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images unchanged: scaling happens on the device."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to ``features`` (B, 256)."""
        check_images(images)
        with exact_float32(self.device):
            return {"features": self.net.features(images)}


@EXTRACTORS.register(
    "mobilenet", file=WEIGHTS_FILE, obtain=f"{WEIGHTS_FILE}, MobileNet v1 of width 0.25 trained on ImageNet"
)
def load_mobilenet(
    location: Path, device: torch.device = CPU, expected_sha256: str | None = None
) -> MobileNetExtractor:
    """Opens MobileNet.

    Args:
        location: Its weights file, or the folder of ``mobilenet_v1_025_224.safetensors``.
        device: Device of the network.
        expected_sha256: Digest that the file must have. Defaults to any.

    Raises:
        ExtractorFileError: The file is missing or holds another network.
    """
    path = location / WEIGHTS_FILE if location.is_dir() else location
    if not path.is_file():
        raise ExtractorFileError(f"{path} is missing: expected {WEIGHTS_FILE} or its folder")
    net, digest = MobileNet(), sha256_file(path)
    if expected_sha256 and digest != expected_sha256:
        raise ExtractorFileError(f"{path} has sha256 {digest}, expected {expected_sha256}")
    try:
        load_weights(net, path)
    except ModelFolderError as error:
        raise ExtractorFileError(str(error)) from None
    record: dict[str, str | int] = {
        "name": "mobilenet", "title": NAME, "sha256": digest, "pixels": SIZE, "resize": "bilinear with antialias"
    }  # fmt: skip
    net.eval().requires_grad_(False)
    return MobileNetExtractor(name="mobilenet", record=record, device=device, net=net.to(device))
