"""DINOv2 ViT-L/14 as in torch-fidelity: the class token of images of 224 x 224 pixels.

Weights are read from a folder of transformers (facebook/dinov2-large), or from the file of the authors,
``dinov2_vitl14_pretrain.pth``. Position embeddings are interpolated as in the code of the authors; transformers
interpolates them to slightly different positions, which changes the features by a few per mille.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.files import sha256_file
from dalle_zoo.model_folder import WEIGHTS
from dalle_zoo.weights import index_path, read_headers
from dalle_zoo_eval.extractors.base import EXTRACTORS, ExtractorFileError, check_images, exact_float32
from dalle_zoo_eval.extractors.clip import digest_of_weights
from dalle_zoo_eval.extractors.inception import check_finite, read_tensors

# B images, H W pixels, d features, M side of the grid of positions, L layers

SIDE, PATCH = 224, 14
"""Sides of the network's input and of a patch, pixels."""
OFFSET = 0.1
"""Offset of the side of the new grid when positions are scaled, as in the code of the authors."""
FILE = "dinov2_vitl14_pretrain.pth"
HEAD_WIDTH = 64
"""Width of an attention head in all networks of the authors."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

POSITIONS = "embeddings.position_embeddings"

_RENAMED = {
    r"^(cls_token|mask_token)$": r"embeddings.\1",
    r"^pos_embed$": POSITIONS,
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.attn\.": ".attention.",
    r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.": r".attention.\1_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.ls([12])\.gamma$": r".layer_scale\1.lambda1",
}
"""Patterns of the names of the authors and of transformers before version 5, with their replacements."""


@dataclass(frozen=True, kw_only=True)
class Dinov2Extractor:
    """The network, ready to use."""

    name: str
    record: Mapping[str, Any]
    device: torch.device
    net: nn.Module

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images unchanged: scaling happens on the device."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to ``features``, the normalized class token (B, d)."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        check_images(images)
        with exact_float32(self.device):
            pixels = images.to(self.device).float()
            pixels = interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(SIDE, SIDE), align_corners=False)
            mean, std = (255 * pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
            features: Tensor = self.net((pixels - mean) / std).pooler_output
            return {"features": features.cpu()}


@EXTRACTORS.register(
    "dinov2", obtain=f"dinov2, the folder facebook/dinov2-large of transformers, or {FILE} of the authors"
)
def load_dinov2(location: Path, device: torch.device, expected_sha256: str | None = None) -> Dinov2Extractor:
    """Opens DINOv2; nothing is downloaded, and nothing but tensors is unpickled.

    Args:
        location: Folder of transformers, or a file of the authors.
        device: Device of the network.
        expected_sha256: Digest that the weights must have. Defaults to any.

    Raises:
        ExtractorFileError: The weights are missing, are those of another network, or have another digest.
        ImportError: torch-fidelity, whose resizing is used, is not installed.
    """
    try:
        import torch_fidelity  # noqa: F401 (before any work)

        tensors, digest = _read(location)
        if expected_sha256 and digest != expected_sha256:
            raise ValueError(f"the weights have sha256 {digest}, expected {expected_sha256}")
        net = _network(tensors)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise ExtractorFileError(f"{location} cannot be opened as DINOv2: {str(error)[:500]}") from None
    _fix_positions(net.embeddings)
    config = net.config
    record = {
        "name": "dinov2",
        "title": f"DINOv2 of width {config.hidden_size} and depth {config.num_hidden_layers}",
        "sha256": digest,
        "pixels": SIDE,
        "resize": "bilinear as TensorFlow 1",
    }
    net = net.to(device).eval().requires_grad_(False)
    return Dinov2Extractor(name="dinov2", record=record, device=device, net=net)


def _read(location: Path) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors of a folder or file under the names of transformers, and the digest of the weights."""
    original = location / FILE if (location / FILE).is_file() else location
    if original.is_file():
        return _translated(read_tensors(original)), sha256_file(original)
    weights = location / WEIGHTS
    if not weights.is_file() and not index_path(weights).is_file():
        raise FileNotFoundError(f"there is neither {WEIGHTS} nor {FILE}: copy the folder facebook/dinov2-large")
    tensors = {}
    for name, header in read_headers(weights).items():
        with safe_open(header.file, "pt") as shard:
            tensors[name] = shard.get_tensor(name)
    check_finite(tensors, weights)
    return _translated(tensors), digest_of_weights(weights)


def _translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of the authors and of older transformers, and splits query, key and value."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        if ".attention.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{letter}_proj")] = part
        else:
            found[name] = tensor
    return found


def _network(tensors: Mapping[str, Tensor]) -> Any:
    """Returns the network with sizes inferred from its tensors."""
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    positions = tensors.get(POSITIONS)
    if positions is None or positions.ndim != 3:
        raise ValueError(f"the weights have no {POSITIONS} (1, n, d): they are of another network")
    width, grid = positions.shape[2], math.isqrt(positions.shape[1] - 1)
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": grid * PATCH,
        "patch_size": PATCH,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):  # initial weights are sampled and replaced
        net = Dinov2Model(Dinov2Config(**fields))
    net.load_state_dict(tensors)
    return net


def _fix_positions(embeddings: Any) -> None:
    """Replaces the positions by those of the network's input, so that transformers does not interpolate them."""
    positions, side = embeddings.position_embeddings.detach(), SIDE // PATCH
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid != side:
        cells = positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = (side + OFFSET) / grid
        cells = F.interpolate(cells, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        positions = torch.cat([positions[:, :1], cells.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    embeddings.position_embeddings = nn.Parameter(positions)
