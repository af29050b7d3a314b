"""DINOv2 against torch-fidelity, with random weights under the names of the authors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.extractors import ExtractorFileError, load_extractor
from dalle_zoo_eval.extractors.dinov2 import FILE
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS, GRID = 128, 2, 37
CLOSE = 1e-4  # float32, two ways to the same numbers


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a small DINOv2 under the names of the authors."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.05, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    tensors = {
        "cls_token": noise(1, 1, WIDTH), "mask_token": noise(1, WIDTH),
        "pos_embed": noise(1, GRID**2 + 1, WIDTH, scale=1.0),
        "patch_embed.proj.weight": noise(WIDTH, 3, 14, 14), "patch_embed.proj.bias": noise(WIDTH),
        "norm.weight": noise(WIDTH, mean=1.0), "norm.bias": noise(WIDTH),
    }  # fmt: skip
    for number in range(LAYERS):
        for name, shape in {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():  # fmt: skip
            tensors[f"blocks.{number}.{name}.weight"] = noise(*shape, scale=0.1)
            tensors[f"blocks.{number}.{name}.bias"] = noise(shape[0])
        for name in ("norm1.weight", "norm2.weight", "ls1.gamma", "ls2.gamma"):
            tensors[f"blocks.{number}.{name}"] = noise(WIDTH, mean=1.0)
        for name in ("norm1.bias", "norm2.bias"):
            tensors[f"blocks.{number}.{name}"] = noise(WIDTH)
    return tensors


class Plain(nn.Module):
    """The forward pass of the paper, written plainly, on the tensors of the authors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, pixels: Tensor) -> Tensor:
        t, side = self.tensors, pixels.shape[-1] // 14
        x = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=14)
        x = x.flatten(2).transpose(1, 2)
        cells = t["pos_embed"][:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        # The authors scale by a factor a little above the one that gives the new side.
        cells = F.interpolate(cells, scale_factor=(side + 0.1) / GRID, mode="bicubic")
        x = x + cells.permute(0, 2, 3, 1).reshape(1, side**2, WIDTH)
        first = (t["cls_token"] + t["pos_embed"][:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        for number in range(LAYERS):
            x = self.block(x, f"blocks.{number}.")
        return F.layer_norm(x, (WIDTH,), t["norm.weight"], t["norm.bias"], eps=1e-6)[:, 0]

    def block(self, x: Tensor, at: str) -> Tensor:
        t, heads = self.tensors, WIDTH // 64

        def linear(y: Tensor, name: str) -> Tensor:
            return F.linear(y, t[f"{at}{name}.weight"], t[f"{at}{name}.bias"])

        y = F.layer_norm(x, (WIDTH,), t[f"{at}norm1.weight"], t[f"{at}norm1.bias"], eps=1e-6)
        query, key, value = linear(y, "attn.qkv").reshape(*y.shape[:2], 3, heads, 64).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(64)).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(y.shape)
        x = x + t[f"{at}ls1.gamma"] * linear(mixed, "attn.proj")
        y = F.layer_norm(x, (WIDTH,), t[f"{at}norm2.weight"], t[f"{at}norm2.bias"], eps=1e-6)
        return x + t[f"{at}ls2.gamma"] * linear(F.gelu(linear(y, "mlp.fc1")), "mlp.fc2")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(random_weights(), tmp_path / FILE)
    return tmp_path / FILE


IMAGES = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_equal_torch_fidelity(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    monkeypatch.setattr(torch.hub, "load", lambda *_: Plain(random_weights()))
    monkeypatch.setenv("XFORMERS_DISABLED", "1")  # torch-fidelity sets it
    theirs = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    with torch.inference_mode():
        (expected,) = theirs(IMAGES)
    found = load_extractor("dinov2", weights)(IMAGES)["features"]
    assert float(expected.std()) > 0.5
    assert torch.allclose(found, expected, atol=CLOSE)


def test_transformers_folder_gives_equal_features(weights: Path, tmp_path: Path) -> None:
    """In the names of transformers before version 5, which the published folder has."""
    folder, renamed = tmp_path / "folder", {}
    for name, tensor in random_weights().items():
        name = name.replace("blocks.", "encoder.layer.").replace("ls1.gamma", "layer_scale1.lambda1")
        name = name.replace("ls2.gamma", "layer_scale2.lambda1").replace("attn.proj", "attention.output.dense")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        name = f"embeddings.{name}" if name.endswith("_token") else name
        name = "embeddings.position_embeddings" if name == "pos_embed" else name
        if "attn.qkv" in name:
            for own, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{own}")] = part.contiguous()
        else:
            renamed[name] = tensor
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    one, other = (load_extractor("dinov2", place)(IMAGES)["features"] for place in (weights, folder))
    assert torch.equal(one, other)


def test_other_files_raise(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ExtractorFileError, match=r"neither model\.safetensors nor dinov2_vitl14_pretrain"):
        load_extractor("dinov2", tmp_path / "nowhere")
    with pytest.raises(ExtractorFileError, match="expected 000"):
        load_extractor("dinov2", weights, expected_sha256="0" * 64)
    torch.save({"x": torch.zeros(2)}, weights)
    with pytest.raises(ExtractorFileError, match=r"no embeddings\.position_embeddings"):
        load_extractor("dinov2", weights)
    broken = random_weights()
    del broken["blocks.0.mlp.fc1.weight"]
    torch.save(broken, weights)
    with pytest.raises(ExtractorFileError, match=r"Missing key.*mlp\.fc1\.weight"):
        load_extractor("dinov2", weights)
