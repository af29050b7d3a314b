"""Losses and gradients of external priors equal those of the original training code, where it was published."""

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
from torch import Tensor

from dalle_zoo.convert import convert, find
from dalle_zoo.models.external.dalle_mini import DalleMini, DalleMiniConfig
from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.networks import load_prior

FOLDER = Path(__file__).parents[2] / "golden"
GRADIENTS = runpy.run_path(str(FOLDER / "gradients.py"))
uniform = GRADIENTS["uniform"]
SAME = {"atol": 1e-4, "rtol": 1e-4}
"""Float32 rounding of a few layers. A product is a sum over the tensors, of up to 1 each."""


@cache
def stored(name: str) -> dict[str, Tensor]:
    return load_file(GRADIENTS["file_of"](name))


def expected(name: str, case: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{case}."): t for k, t in stored(name).items() if k.startswith(f"{case}.")}


def along(golden: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The direction of the golden file, as a state dict of the original."""
    return {
        name: GRADIENTS["direction"](name, golden[f"norm {name}"], tuple(tensor.shape))
        if f"norm {name}" in golden
        else tensor
        for name, tensor in weights.items()
    }


def opened(folder: Path, saved: Callable[[Path], Any]) -> ImagePrior:
    """The prior that conversion makes of a checkpoint."""
    folder.mkdir()
    saved(folder)
    convert(find(folder), folder / "ours")
    return load_prior(folder / "ours/prior")


def check(prior: ImagePrior, direction: ImagePrior, golden: dict[str, Tensor], text: Tensor, codes: Tensor) -> None:
    loss = prior.loss(text, codes)
    torch.testing.assert_close(loss.total, golden["loss"], **SAME)
    loss.total.backward()
    gradients = {name: p.grad for name, p in prior.named_parameters() if p.grad is not None}
    parts = [(gradients[name].double() * p.detach().double()).sum() for name, p in direction.named_parameters()]
    assert float(torch.stack(parts).sum()) == pytest.approx(float(golden["product"]), abs=SAME["atol"])


CASES = [f"{version} {name}" for version, names in GRADIENTS["DALLE_PYTORCH"].items() for name in names]
SLOW = ("0.7.3 mixed", "1.6.6 mixed")
"""Cases whose options are also those of others."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_dalle_pytorch(case: str, tmp_path: Path) -> None:
    original = runpy.run_path(str(FOLDER / "dalle_pytorch.py"))
    layout = json.loads(original["LAYOUTS"].read_text())[case]
    version, name = case.split()
    angles = load_file(original["file_of"](version)).get(f"{name}.angles")
    options, golden = original["CASES"][version][name], expected("dalle_pytorch", case)

    def saved(directed: bool) -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            weights = original["state_dict"](layout, angles)
            if directed:
                weights |= along(golden, {n: t for n, t in weights.items() if n not in layout["same"]})
                weights |= {other: weights[first] for other, first in layout["same"].items()}
            hparams = {**original["SIZES"], **options}
            torch.save({"hparams": hparams, "vae_params": original["VAE"], "weights": weights}, folder / "dalle.pt")

        return save

    prior = opened(tmp_path / "prior", saved(False))
    text = original["captions"](options)
    text = text.where(text != 0, prior.null_text())
    codes = ((uniform("codes", (3, 64)) + 1) / 2 * 9).long().view(3, 8, 8)
    check(prior, opened(tmp_path / "direction", saved(True)), golden, text, codes)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_rudalle(version: str, tmp_path: Path) -> None:
    original, golden = runpy.run_path(str(FOLDER / "rudalle.py")), expected("rudalle", version)

    def saved(directed: bool) -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            weights = original["small_state"](version)
            torch.save(along(golden, weights) if directed else weights, folder / "pytorch_model.bin")
            (folder / "config.json").write_text('{"num_attention_heads": 4}')

        return save

    prior = opened(tmp_path / "prior", saved(False))
    text = torch.tensor([[2, 7, 39, 3, 0, 0], [2, 5, 111, 30, 17, 8]])
    text = text.where(text != 0, prior.config.text_vocab + torch.arange(6))
    codes = (uniform("codes", (2, 144)) * 24 + 24).long().view(2, 12, 12)
    loss = prior.loss(text, codes)
    torch.testing.assert_close(loss.text, golden["text"], **SAME)
    torch.testing.assert_close(loss.image, golden["image"], **SAME)
    check(prior, opened(tmp_path / "direction", saved(True)), golden, text, codes)


def test_mindalle(tmp_path: Path) -> None:
    original, golden = runpy.run_path(str(FOLDER / "mindalle.py")), expected("mindalle", "published")
    tokenized = json.loads(original["TOKENIZER"].read_text())
    stage = original["stage2"]("published")

    def saved(directed: bool) -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            weights = original["weights"](original["layout"](stage))
            weights = along(golden, weights) if directed else weights
            torch.save({"state_dict": weights}, folder / "stage2_last.ckpt")
            (folder / "config.yaml").write_text(json.dumps({"stage2": stage}))
            original["write_vocabulary"](folder / "tokenizer", tokenized["vocabulary"], tokenized["merges"])

        return save

    prior = opened(tmp_path / "prior", saved(False))
    text = ((uniform("text", (2, 12)) + 1) / 2 * original["VOCABULARY"]).long()
    text[0, 7:] = GRADIENTS["PADDING"]
    codes = ((uniform("codes", (2, 16)) + 1) / 2 * 48).long().view(2, 4, 4)
    check(prior, opened(tmp_path / "direction", saved(True)), golden, text, codes)


def test_dalle_mini_is_trained_on_all_rows_of_its_head() -> None:
    """The formula of its training code, which needs JAX: softmax cross-entropy over every row, a mean over images."""
    torch.manual_seed(0)
    prior = DalleMini(DalleMiniConfig(
        text_length=5, text_vocab=11, image_height=2, image_width=3, codebook_size=7, image_rows=9, start_token=8,
        width=16, encoder_layers=1, encoder_heads=2, encoder_hidden=24, decoder_layers=2, decoder_heads=2,
        decoder_hidden=24,
    ))  # fmt: skip
    text, codes = torch.tensor([[0, 5, 7, 2, 1], [0, 3, 2, 1, 1]]), torch.tensor([[[0, 1, 2], [3, 4, 5]]] * 2)
    rows: list[Tensor] = []
    prior.decoder.final_norm.register_forward_hook(lambda module, inputs, output: rows.append(output))
    loss = prior.loss(text, codes)
    logits = torch.einsum("b n d, v d -> b n v", rows[0], prior.image_head.weight)
    one_hot = torch.eye(9)[codes.flatten(1)]
    formula = -(one_hot * logits.log_softmax(-1)).sum(-1).mean()
    names, parameters = zip(*prior.named_parameters(), strict=True)
    own = torch.autograd.grad(loss.total, parameters, retain_graph=True)
    for name, ours, theirs in zip(names, own, torch.autograd.grad(formula, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, **SAME, msg=name)
    torch.testing.assert_close(loss.total, formula)
    assert (float(loss.text), loss.image) == (0.0, loss.total)
    assert prior.image_head.weight.grad is None
    assert not prior.is_text_target(text).any()
