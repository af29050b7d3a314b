"""A converted VQGAN as image tokenizer: reconstruct, encode, training of a prior, pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dalle_zoo import DallePipeline
from dalle_zoo.cli.main import main
from dalle_zoo.data import CodeDataset
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.networks import load_image_tokenizer
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.training.prior_module import PriorModule

CONFIG = VQGANConfig(
    image_size=16, width=32, multipliers=(1, 1, 1), blocks_per_level=1, attention_sizes=(4,), latent_channels=8,
    code_channels=4, codebook_size=8,
)  # fmt: skip
PRIOR = PriorConfig(
    text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8, width=16, num_layers=1,
    num_heads=2, masks="row",
)  # fmt: skip


@pytest.fixture
def checkpoint(scratch: Path) -> Path:
    """A checkpoint of taming-transformers with its configuration next to it."""
    torch.manual_seed(0)
    net = VQGAN(CONFIG)
    nn.init.normal_(net.quantize.embedding.weight)  # stands for training: codes that look different
    torch.save({"state_dict": net.state_dict() | {"loss.logvar": torch.zeros(1)}}, scratch / "flowers.ckpt")
    network = {
        "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "resolution": 16,
        "z_channels": 8,
    }  # fmt: skip
    (scratch / "flowers.yaml").write_text(yaml.safe_dump({"model": {"params": {"ddconfig": network}}}))
    return scratch / "flowers.ckpt"


@torch.no_grad()
def test_from_checkpoint_to_images(checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "--out", "ours"]) == 0
    out = capsys.readouterr().out
    assert "VQGAN (vqgan)" in out
    assert "  image_size: 16 (flowers.yaml)\n" in out
    assert "left out: 1 tensors of loss\n" in out

    assert main(["reconstruct", str(images / "0.png"), "--model", "./ours"]) == 0
    assert " dB" in capsys.readouterr().out

    assert main(["encode", str(images), "--model", "./ours", "--out", "codes"]) == 0
    codes = CodeDataset(checkpoint.parent / "codes")
    assert (len(codes), codes.grid, codes.codebook_size) == (5, (4, 4), 8)

    stage = PriorModule(PRIOR, image_tokenizer="./ours")
    pixels = torch.rand(2, 3, 16, 16)
    tokenizer = load_image_tokenizer(checkpoint.parent / "ours/dvae")
    assert torch.equal(stage.codes({"image": pixels}), tokenizer.encode(pixels))

    folder = DallePipeline(tokenizer, Prior(PRIOR), ByteTokenizer()).save_pretrained(checkpoint.parent / "model")
    pipe = DallePipeline.from_pretrained(folder)
    assert isinstance(pipe.image_tokenizer, VQGAN)
    assert pipe("a flower", num_images_per_prompt=2, output_type="pt").images.shape == (2, 3, 16, 16)


def test_decoder_only_model_is_reported(scratch: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {n: t for n, t in VQGAN(CONFIG).state_dict().items() if not n.startswith(("encoder.", "quant_conv."))}
    state["embedding.weight"] = state.pop("quantize.embedding.weight")
    torch.save(state, scratch / "detoker.pt")
    assert main(["convert", "detoker.pt", "--out", "ours"]) == 0
    assert "  image_size: 256 (assumed" in capsys.readouterr().out
    assert main(["encode", str(images), "--model", "./ours", "--out", "codes"]) == 2
    assert "only a decoder and cannot encode images" in capsys.readouterr().err
