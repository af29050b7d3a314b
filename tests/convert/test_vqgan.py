"""VQGANs of other code bases: layouts, inferred options and their origin, results after conversion, errors."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from dalle_zoo.convert import FAMILIES, Source, WeightFileError, convert, find, recognize
from dalle_zoo.files import read_json
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.networks import load_image_tokenizer

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/vqgan.py"))
EmptyFile = Callable[[Mapping[str, Sequence[int]], Path], Path]
TWIN = {"atol": 1e-4, "rtol": 1e-4}
"""As in tests/models/external/test_vqgan.py."""

SMALL: dict[str, Any] = {
    "image_size": 16, "width": 32, "multipliers": (1, 2, 2), "blocks_per_level": 1, "attention_sizes": (8,),
    "code_channels": 16, "codebook_size": 48,
}  # fmt: skip
NEAREST = VQGANConfig(**SMALL, latent_channels=24)
GUMBEL = VQGANConfig(**SMALL, latent_channels=16, quantizer="gumbel")
F16 = VQGANConfig()
F8 = VQGANConfig(multipliers=(1, 1, 2, 4), attention_sizes=(32,), codebook_size=8192, quantizer="gumbel")


def shapes(config: VQGANConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in VQGAN(config).state_dict().items()}


def taming(config: VQGANConfig, folder: Path, name: str = "last.ckpt") -> Path:
    """A checkpoint of taming-transformers, with a discriminator and other training state."""
    loss = {"loss.discriminator.main.0.weight": torch.rand(8, 3, 4, 4), "loss.logvar": torch.zeros(())}
    state = {**GOLDEN["weights"](shapes(config)), **loss}
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: torch.rand(2)}}]}, folder / name)
    return folder / name


def rudalle_wavelet(folder: Path) -> Path:
    """A checkpoint of ruDALL-E's network of twice the size."""
    names = {}
    for name, shape in shapes(VQGANConfig(**SMALL | {"image_size": 32}, **WAVELET)).items():
        nested = name.removeprefix("decoder.")
        names[f"model.decoder.decoder.{nested}" if nested != name else f"model.{name}"] = shape
    for kind in ("weight", "bias"):
        names[f"model.decoder.post_quant_conv.{kind}"] = names[f"model.post_quant_conv.{kind}"]
    state = GOLDEN["weights"](names)
    for name, sign, shape in (
        ("g0_col", 1, (2, 1)),
        ("g1_col", -1, (2, 1)),
        ("g0_row", 1, (1, 2)),
        ("g1_row", -1, (1, 2)),
    ):
        state[f"model.decoder.idwt.{name}"] = torch.tensor([1.0, sign]).view(1, 1, *shape) * math.sqrt(0.5)
    torch.save({"state_dict": state}, folder / "dwt.ckpt")
    return folder / "dwt.ckpt"


WAVELET: dict[str, Any] = {"latent_channels": 16, "quantizer": "gumbel", "wavelet": True}


def describe(folder: Path, name: str = "model.yaml", **changes: Any) -> Path:
    """A configuration of taming-transformers."""
    network = GOLDEN["NEAREST"]["ddconfig"] | changes
    (folder / name).write_text(yaml.safe_dump({"model": {"params": {"embed_dim": 16, "ddconfig": network}}}))
    return folder / name


def converted(location: Path, out: Path) -> tuple[VQGAN, dict[str, Any]]:
    source = find(location)
    record = convert(source, out)
    net = load_image_tokenizer(out / "dvae")
    assert isinstance(net, VQGAN)
    return net, record


# ------------------------------------------------------------ results


@torch.no_grad()
def test_taming_with_its_configuration(tmp_path: Path) -> None:
    taming(NEAREST, tmp_path)
    describe(tmp_path)
    net, record = converted(tmp_path, tmp_path / "ours")
    assert net.config == NEAREST
    golden = load_file(GOLDEN["FILES"]["nearest"])
    assert torch.equal(net.encode(golden["images"]), golden["codes"])
    torch.testing.assert_close(net.decode(golden["codes"]), ((golden["pixels"] + 1) / 2).clamp(0, 1), **TWIN)
    assert record["family"] == "vqgan"
    assert record["unused"] == {"loss": 2}
    assert record["notes"] == {"image_size": "model.yaml"}
    assert record == read_json(tmp_path / "ours/record.json") | {"inferred": record["inferred"]}


@torch.no_grad()
def test_gumbel_without_a_configuration(tmp_path: Path) -> None:
    net, record = converted(taming(GUMBEL, tmp_path), tmp_path / "ours")
    # 256 pixels are assumed, so the level in the middle has 128; the network is the same.
    assert asdict(net.config) == asdict(GUMBEL) | {"image_size": 256, "attention_sizes": (128,)}
    assert record["notes"] == {"image_size": "assumed, as no configuration was found"}
    golden = load_file(GOLDEN["FILES"]["gumbel"])
    assert torch.equal(net.encode(golden["images"]), golden["codes"])
    torch.testing.assert_close(net.decode(golden["codes"]), ((golden["pixels"] + 1) / 2).clamp(0, 1), **TWIN)


@torch.no_grad()
def test_rudalle_of_twice_the_size(tmp_path: Path) -> None:
    net, record = converted(rudalle_wavelet(tmp_path), tmp_path / "ours")
    assert (net.image_size, net.factor, net.config.wavelet) == (512, 8, True)
    golden = load_file(GOLDEN["FILES"]["wavelet"])
    twice = golden["images"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(net.encode(twice), golden["codes"])
    torch.testing.assert_close(net.decode(golden["codes"]), golden["pixels"], **TWIN)
    assert record["unused"] == {"decoder.idwt": 4, "post_quant_conv": 2}


def test_min_dalle_has_only_a_decoder(tmp_path: Path) -> None:
    config = VQGANConfig(**SMALL, latent_channels=24, decoder_only=True, signed_pixels=False)
    state = GOLDEN["weights"](shapes(config))
    state["embedding.weight"] = state.pop("quantize.embedding.weight")
    torch.save(state, tmp_path / "detoker.pt")
    net, record = converted(tmp_path / "detoker.pt", tmp_path / "ours")
    assert asdict(net.config) == asdict(config) | {"image_size": 256, "attention_sizes": (128,)}
    assert torch.equal(net.quantize.embedding.weight, state["embedding.weight"])
    assert "it cannot encode" in record["description"]


# ------------------------------------------------------------ inferred options


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("f16-16384", asdict(F16)),
        ("gumbel-f8-8192", asdict(F8)),
        ("rudalle", asdict(F8)),
        ("rudalle-wavelet", asdict(F8) | {"image_size": 512, "wavelet": True}),
        ("min-dalle", asdict(F16) | {"decoder_only": True, "signed_pixels": False}),
    ],
)
def test_published_sizes(kind: str, expected: dict[str, Any], empty_safetensors: EmptyFile, tmp_path: Path) -> None:
    layout = json.loads(GOLDEN["LAYOUTS"].read_text())[kind]
    source = recognize(empty_safetensors(layout, tmp_path / "model.safetensors"))
    assert source is not None
    assert asdict(VQGANConfig(**source.config)) == expected
    native = shapes(VQGANConfig(**source.config))
    tensors = FAMILIES["vqgan"]("vqgan").translate(source, VQGANConfig(**source.config))
    assert {name: t.shape for name, t in tensors.items()} == native


def size_note(source: Source | None) -> tuple[int, str]:
    assert source is not None
    return source.config["image_size"], source.notes["image_size"]


def test_a_configuration_is_found_in_the_folder_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/configs").mkdir()
    describe(tmp_path / "run/configs", "2021-project.yaml")
    (tmp_path / "run/configs/2021-lightning.yaml").write_text("lightning: {trainer: {gpus: 8}}\n")
    path = taming(NEAREST, tmp_path / "run/checkpoints")
    assert size_note(recognize(path)) == (16, "configs/2021-project.yaml")
    describe(path.parent, "last.yaml", resolution=32, attn_resolutions=[16])
    with pytest.raises(WeightFileError, match=r"disagree on the resolution .*32.*16|16.*32"):
        recognize(path)


def test_the_configuration_of_mindalle(tmp_path: Path) -> None:
    taming(NEAREST, tmp_path, "stage1_last.ckpt")
    stage = {"type": "vqgan", "embed_dim": 16, "n_embed": 48, "hparams": GOLDEN["NEAREST"]["ddconfig"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": {}, "stage1": stage}))
    assert size_note(recognize(tmp_path)) == (16, "config.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 64}, "model.yaml does not describe this network: ch is 64, the tensors have 32"),
        ({"ch_mult": [1, 2]}, r"ch_mult is \[1, 2\], the tensors have \[1, 2, 2\]"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, the tensors have 1"),
        ({"attn_resolutions": [4]}, r"attn_resolutions is \[4\], the tensors have \[8\]"),
        ({"resolution": 32}, r"attn_resolutions is \[8\], the tensors have \[16\]"),
        ({"double_z": True}, "double_z is True"),
        ({"attn_resolutions": "8"}, "attn_resolutions is '8'"),
    ],
)
def test_a_configuration_of_another_network_raises(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    taming(NEAREST, tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(WeightFileError, match=message):
        recognize(tmp_path)


# ------------------------------------------------------------ errors


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"state_dict": state}, path)
    return path


def test_other_networks_are_not_recognized(tmp_path: Path) -> None:
    state = GOLDEN["weights"](shapes(NEAREST))
    del state["quantize.embedding.weight"]  # an autoencoder without codes
    assert recognize(save(state, tmp_path / "kl.ckpt"), "vqgan") is None


def test_several_vqgans_raise(tmp_path: Path) -> None:
    taming(NEAREST, tmp_path, "epoch=1.ckpt")
    taming(NEAREST, tmp_path, "last.ckpt")
    with pytest.raises(
        WeightFileError,
        match=r"several image tokenizers of VQGAN \(epoch=1.ckpt, last.ckpt\): name the files of one with --files",
    ):
        recognize(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.conv_out.weight"), "has no decoder.conv_out.weight"),
        (lambda s: s.pop("encoder.mid.attn_1.q.weight"), "missing encoder.mid.attn_1.q.weight"),
        (lambda s: s.update({"quantize.used": torch.rand(3)}), "unexpected quantize.used"),
        (
            lambda s: s.update({"quantize.embedding.weight": torch.rand(48, 12)}),
            r"shape \(48, 12\), expected \(48, 16\)",
        ),
        (lambda s: s["quant_conv.bias"].fill_(math.nan), "quant_conv.bias has values that are not finite"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("decoder.up.1.")], "levels decoder.up.0, decoder.up.1"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.rand(48, 3, 3, 3)}), "multiples of the first 48"),
        (lambda s: s.update({"decoder.up.2.block.0.conv1.weight": torch.rand(())}), "expected more dimensions"),
    ],
)
def test_tensors_that_do_not_fit_raise(change: Any, message: str, tmp_path: Path) -> None:
    state = GOLDEN["weights"](shapes(NEAREST))
    change(state)
    path = save(state, tmp_path / "last.ckpt")
    with pytest.raises(WeightFileError, match=message):
        convert(find(path), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_another_wavelet_raises(tmp_path: Path) -> None:
    path = rudalle_wavelet(tmp_path)
    state = torch.load(path)["state_dict"]
    state["model.decoder.idwt.g0_col"] = torch.rand(1, 1, 4, 1)
    with pytest.raises(WeightFileError, match="must end in a Haar wavelet"):
        recognize(save(state, path))
