"""DALLE-pytorch's priors: every layout of every period gives the original's numbers; what is inferred; refusals."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dalle_zoo import DallePipeline, hub
from dalle_zoo.convert import WeightFileError, convert, find, recognise
from dalle_zoo.models.dalle_pytorch import DallePytorch
from dalle_zoo.models.dalle_pytorch_vae import DallePytorchVAE
from dalle_zoo.sampling import Sampler, decode_logits, sample_codes

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/dalle_pytorch.py"))
CASES = [f"{version} {name}" for version, cases in GOLDEN["CASES"].items() for name in cases]
SAME = {"atol": 1e-4, "rtol": 1e-4}
"""Float32 rounding of a few layers."""

every_case = pytest.mark.parametrize("case", CASES)


@cache
def layouts() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN["LAYOUTS"].read_text())
    return content


@cache
def golden(case: str) -> dict[str, Tensor]:
    version, name = case.split()
    stored = load_file(GOLDEN["file_of"](version))
    return {key.split(".", 1)[1]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}


def content_of(case: str) -> dict[str, Any]:
    """What train_dalle.py of that version saves."""
    version, name = case.split()
    weights = GOLDEN["state_dict"](layouts()[case], golden(case).get("angles"))
    saved = {
        "hparams": {**GOLDEN["SIZES"], "loss_img_weight": 7, **GOLDEN["CASES"][version][name]},
        "vae_params": GOLDEN["VAE"],
        "weights": weights,
        "epoch": 3,
        "opt_state": {"state": {0: {"step": 7, "exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 3e-4}]},
        "scheduler_state": None,
    }
    if version >= "1.1.6":
        saved |= {"version": version, "vae_class_name": "DiscreteVAE"}
    return saved


def save(case: str, folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    content = content_of(case)
    change(content)
    torch.save(content, folder / "dalle.pt")
    return folder / "dalle.pt"


def converted(path: Path, out: Path) -> tuple[DallePytorch, dict[str, Any]]:
    record = convert(find(path), out)
    prior = hub.load_prior(out / "prior")
    assert isinstance(prior, DallePytorch)
    return prior, record


def with_pads(prior: DallePytorch, text: Tensor) -> Tensor:
    """What `encode_captions` makes of the ids that the original's tokenizers give."""
    return text.where(text != 0, prior.null_text())


# ------------------------------------------------------------ results


@every_case
@torch.no_grad()
def test_equals_the_original(case: str, tmp_path: Path) -> None:
    prior, record = converted(save(case, tmp_path), tmp_path / "ours")
    expected = golden(case)
    text, codes = with_pads(prior, GOLDEN["TEXT"]), expected["codes"].view(-1, 8, 8)
    torch.testing.assert_close(prior.text_logits(text), expected["text_logits"], **SAME)
    torch.testing.assert_close(prior.image_logits(text, codes), expected["logits"], **SAME)
    torch.testing.assert_close(prior.image_logits(text[:1], codes[:1]), expected["logits"][:1], **SAME)
    steps = torch.stack(list(decode_logits(prior, text, codes[:, None])), 2)[:, 0]
    torch.testing.assert_close(steps, expected.get("cached", expected["logits"]), **SAME)
    drawn = sample_codes(prior, text, torch.zeros(3, 1, dtype=torch.long), sampler=Sampler(temperature=0))
    assert torch.equal(drawn.flatten(1), expected["greedy"])
    assert record["image_tokenizer"]["family"] == "dalle_pytorch_vae"
    assert record["missing"] == ["tokenizer"]


@pytest.mark.parametrize("kind", GOLDEN["VAES"])
@torch.no_grad()
def test_image_tokenizer_equals_the_original(kind: str, tmp_path: Path) -> None:
    hparams = GOLDEN["VAES"][kind]
    weights = GOLDEN["state_dict"](layouts()[f"vae {kind}"], None)
    torch.save({"hparams": hparams, "weights": weights}, tmp_path / "vae.pt")
    record = convert(find(tmp_path / "vae.pt"), tmp_path / "ours")
    vae = hub.load_image_tokenizer(tmp_path / "ours/dvae")
    assert isinstance(vae, DallePytorchVAE)
    assert record["notes"] == {"image_size": "hparams"}
    assert (vae.image_size, vae.factor, vae.codebook_size) == (16, 2 ** hparams["num_layers"], 9)
    version = max(GOLDEN["CASES"], key=lambda text: [int(part) for part in text.split(".")])
    stored = load_file(GOLDEN["file_of"](version))
    expected = {key: stored[f"vae {kind}.{key}"] for key in ("images", "codes", "pixels")}
    codes = vae.encode(expected["images"])
    assert torch.equal(codes.flatten(1), expected["codes"])
    torch.testing.assert_close(vae.decode(codes), (expected["pixels"] / 2 + 0.5).clamp(0, 1), **SAME)
