"""The two Inception networks of published FIDs, which must never share a column.

`inception-2015` is the TensorFlow graph with which the FID was defined, as run by torch-fidelity, torchmetrics and
today's pytorch-fid. `dmgan` is the network of the DM-GAN code, which DF-GAN, CogView and the DALL-E paper also use:
torchvision's weights, with an input that is scaled twice.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dalle_zoo_eval.extractors.base import (
    EXTRACTORS,
    ExtractorFileError,
    WeightsFile,
    check_images,
    exact_float32,
    find_weights,
)

# B images, H W pixels

SIDE = 299
"""Side of the network's input, pixels."""

WEIGHTS_2015 = WeightsFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    url="https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
)
# The second file has the same weights as the first, in torch's current format.
WEIGHTS_DMGAN = (
    WeightsFile(
        name="inception_v3_google-1a9a5a14.pth",
        sha256="1a9a5a14f40645a370184bd54f4e8e631351e71399112b43ad0294a79da290c8",
        url="https://docs.pytorch.org/vision/stable/models/inception.html",
    ),
    WeightsFile(
        name="inception_v3_google-0cc3c7bd.pth",
        sha256="0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef",
        url="https://docs.pytorch.org/vision/stable/models/inception.html",
    ),
)


@dataclass(frozen=True, kw_only=True)
class InceptionExtractor:
    """One of the two networks, ready to use."""

    name: str
    record: Mapping[str, str | int]
    device: torch.device
    run: Callable[[Tensor], dict[str, Tensor]]
    """uint8 images on the device to the outputs of the network."""
    resize: Callable[[Tensor], Tensor] = lambda images: images
    """Scales uint8 images on the CPU first; idempotent."""

    def prepare(self, images: Tensor) -> Tensor:
        """Returns uint8 (B, 3, H, W), scaled if the network requires images scaled on the CPU."""
        check_images(images)
        return self.resize(images)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, 3, H, W) to ``features`` (B, 2048) and, for `inception-2015`, unbiased ``logits``, (B, 1008)."""
        check_images(images)
        with exact_float32(self.device):
            found = self.run(self.resize(images).to(self.device))
        return {kind: values.float().cpu() for kind, values in found.items()}


@EXTRACTORS.register("inception-2015", weights=(WEIGHTS_2015,), fid=True)
def load_inception_2015(
    location: Path, device: torch.device, expected_sha256: str | None = None
) -> InceptionExtractor:
    """Opens the Inception of TensorFlow: torch-fidelity's network, which includes its resize (TensorFlow 1 bilinear).

    Args:
        location: The weights file or its folder.
        device: Device of the network.
        expected_sha256: Digest of another file to accept instead of the published one. Defaults to none.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise _missing("torch-fidelity", error) from error
    path, digest = find_weights(location, [WEIGHTS_2015], expected_sha256)
    # torch-fidelity unpickles any file. It gets bytes that were written here from checked tensors.
    checked = io.BytesIO()
    torch.save(read_tensors(path), checked)
    checked.seek(0)
    kinds = {"features": "2048", "logits": "logits_unbiased"}
    with torch.random.fork_rng(devices=[]):  # initial weights are sampled and discarded
        try:
            net = FeatureExtractorInceptionV3(
                "inception-v3-compat", list(kinds.values()), feature_extractor_weights_path=checked
            )
        except RuntimeError as error:
            raise _wrong_weights(path, WEIGHTS_2015, error) from None
    net = net.to(device)

    def run(images: Tensor) -> dict[str, Tensor]:
        return dict(zip(kinds, net(images), strict=True))

    record: dict[str, str | int] = {
        "name": "inception-2015",
        "sha256": digest,
        "pixels": SIDE,
        "resize": "bilinear as TensorFlow 1",
    }
    return InceptionExtractor(name="inception-2015", record=record, device=device, run=run)


@EXTRACTORS.register("dmgan", weights=WEIGHTS_DMGAN, fid=True)
def load_dmgan(location: Path, device: torch.device, expected_sha256: str | None = None) -> InceptionExtractor:
    """Opens torchvision's Inception up to the average pool, with the input of the DM-GAN code.

    Args:
        location: The weights file or its folder.
        device: Device of the network.
        expected_sha256: Digest of another file to accept instead of the published ones. Defaults to none.
    """
    try:
        from torchvision.models.inception import Inception3
    except (ImportError, RuntimeError) as error:
        raise _missing("torchvision", error) from error
    path, digest = find_weights(location, WEIGHTS_DMGAN, expected_sha256)
    with torch.random.fork_rng(devices=[]):
        net = Inception3(transform_input=False, init_weights=False)
    try:
        net.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise _wrong_weights(path, WEIGHTS_DMGAN[0], error) from None
    net.fc = nn.Identity()
    net = net.to(device).eval().requires_grad_(False)

    def run(images: Tensor) -> dict[str, Tensor]:
        return {"features": net(dmgan_input(images))}

    record: dict[str, str | int] = {
        "name": "dmgan",
        "sha256": digest,
        "pixels": SIDE,
        "resize": "Pillow bilinear, aspect not kept",
    }
    return InceptionExtractor(name="dmgan", record=record, device=device, run=run, resize=dmgan_resize)


def dmgan_resize(images: Tensor) -> Tensor:
    """Scales uint8 (B, 3, H, W) to (B, 3, 299, 299) with Pillow's bilinear filter; skips images of that size."""
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    # Pillow releases the GIL, so threads help.
    with ThreadPoolExecutor() as threads:
        return torch.stack(list(threads.map(_resize, images.cpu().permute(0, 2, 3, 1).numpy())))


def dmgan_input(images: Tensor) -> Tensor:
    """Scales uint8 pixels like the DM-GAN code.

    Pixels are scaled to [0, 1] and then again, in a way meant for pixels normalized with ImageNet's mean and standard
    deviation. The network, trained on [-1, 1], gets values in about [-0.19, 0.43]. Published numbers depend on this.
    """
    mean, std = torch.tensor([_MEAN, _STD])[..., None, None].to(images.device, non_blocking=True).unbind(0)
    return images.float() / 255 * (std / 0.5) + (mean - 0.5) / 0.5


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _resize(pixels: np.ndarray) -> Tensor:
    scaled = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict; raises `ExtractorFileError` for a file with anything but tensors, without running it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the reader raises nearly anything
        raise ExtractorFileError(f"{path} is not a readable file of weights: {str(error)[:300]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ExtractorFileError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises `ExtractorFileError` for weights that are NaN or infinite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ExtractorFileError(f"{path} holds NaN or infinity in {str(name)[:100]}: the weights are unusable")


def _wrong_weights(path: Path, file: WeightsFile, error: RuntimeError) -> ExtractorFileError:
    details = str(error)[:300]  # torch lists all of about 500 tensors
    return ExtractorFileError(f"{path} does not hold the weights of {file.name}: {details}")


def _missing(package: str, error: Exception) -> ImportError:
    return ImportError(f"{package} cannot be imported ({error}): pip install dalle-zoo[eval]")
