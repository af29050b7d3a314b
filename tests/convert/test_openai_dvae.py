"""OpenAI's discrete VAE: pickled modules, state dicts and transformers' copy of the encoder give the same network."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo import load_model
from dalle_zoo.cli.main import main
from dalle_zoo.convert import WeightFileError, convert, find, inspect_files, recognize
from dalle_zoo.files import read_json
from dalle_zoo.models.dvae import DVAE, DVAEConfig, DVAEEncoder
from dalle_zoo.networks import load_image_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = runpy.run_path(str(ROOT / "tests/golden/openai_dvae.py"))
CONFIG = DVAEConfig(width=64, decoder_stem=8, codebook_size=512)
TWIN = {"atol": 1e-4, "rtol": 1e-5}
"""Float32 rounding: other convolution kernels sum up to 4,608 products in another order."""

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def native() -> DVAE:
    """The native network with the weights of the golden file."""
    dvae = DVAE(CONFIG).eval()
    GOLDEN["fill_native"](dvae.encoder, "encoder")
    GOLDEN["fill_native"](dvae.decoder, "decoder")
    return dvae


@pytest.fixture
def released(native: DVAE) -> dict[str, State]:
    """State dicts of the released modules."""
    return {
        part: {GOLDEN["released_name"](name): t.clone() for name, t in getattr(native, part).state_dict().items()}
        for part in ("encoder", "decoder")
    }


def flava_name(released: str) -> str:
    for old, new in (
        (".block_", ".group.block_"),
        ("res_path.", "res_path.path."),
        (".w", ".weight"),
        (".b", ".bias"),
    ):
        head, dot, tail = released.rpartition(".") if old in (".w", ".b") else ("", "", "")
        released = f"{head}{new}" if dot and f".{tail}" == old else released if dot else released.replace(old, new)
    return released


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(WeightFileError) as caught:
        call()
    return str(caught.value)


def same(net: nn.Module, other: nn.Module) -> bool:
    return net.state_dict().keys() == other.state_dict().keys() and all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items()
    )


# ------------------------------------------------------------ files of the release


@pytest.fixture(scope="module", params=["zip", pytest.param("legacy", marks=pytest.mark.slow)])
def pickled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pickled modules, made by another process in which their classes exist."""
    folder = tmp_path_factory.mktemp(request.param)
    script = Path(__file__).with_name("released_modules.py")
    subprocess.run(
        [sys.executable, str(script), str(folder), request.param],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    return folder


@torch.no_grad()
def test_pickled_modules(pickled: Path, tmp_path: Path, native: DVAE, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name for name in sys.modules if name.startswith("dall_e.")}
    names = {name for checkpoint in inspect_files(pickled).checkpoints for name in checkpoint.names}
    assert {"dall_e.encoder.Encoder", "dall_e.decoder.Decoder", "dall_e.utils.Conv2d"} <= names
    assert main(["convert", str(pickled), "--out", str(tmp_path / "out")]) == 0
    assert {name for name in sys.modules if name.startswith("dall_e.")} == before
    said = capsys.readouterr().out
    assert f"{pickled}: OpenAI's discrete VAE (openai_dvae)\n" in said
    assert "  type: dvae\n" in said
    assert "  codebook_size: 512\n" in said
    assert f"{tmp_path / 'out' / 'dvae'}: {sum(p.numel() for p in native.parameters()):,} parameters\n" in said
    net = load_image_tokenizer(tmp_path / "out/dvae")
    assert isinstance(net, DVAE)
    assert net.config == CONFIG
    assert same(net, native)
    golden = load_file(GOLDEN["FILE"])
    assert torch.equal(net.encode(golden["images"]), golden["codes"])
    torch.testing.assert_close(net.logits(golden["images"]), golden["logits"], **TWIN)
    torch.testing.assert_close(net.decoder.from_codes(golden["codes"]), golden["hard"], **TWIN)
    torch.testing.assert_close(net.decode(golden["codes"]), golden["pixels"], **TWIN)


def test_the_record_has_the_license(pickled: Path, tmp_path: Path) -> None:
    record = convert(find(pickled), tmp_path / "out")
    assert record == read_json(tmp_path / "out/record.json")
    assert (record["license"], record["license_name"]) == ("other", "modified-mit")
    assert record["license_text"].startswith("Modified MIT License\n\nSoftware Copyright (c) 2021 OpenAI\n")
    assert record["parameters"].keys() == {"dvae"}


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_equals_the_released_package(tmp_path: Path, legacy: bool) -> None:
    dall_e = pytest.importorskip("dall_e", reason="PyPI's DALL-E 0.1 is missing: see tests/requirements-parity.txt")
    external = {"encoder": dall_e.Encoder, "decoder": dall_e.Decoder}
    nets = {part: external[part](**GOLDEN["SIZES"][part]) for part in external}
    (tmp_path / "in").mkdir()
    for part, net in nets.items():
        GOLDEN["fill"](net, part)
        torch.save(net, tmp_path / f"in/{part}.pkl", _use_new_zipfile_serialization=not legacy)
    convert(find(tmp_path / "in"), tmp_path / "out")
    net = load_image_tokenizer(tmp_path / "out/dvae")
    images = torch.rand(2, 3, 64, 40, generator=torch.Generator().manual_seed(2))
    codes = nets["encoder"](dall_e.map_pixels(images)).argmax(1)
    assert torch.equal(net.encode(images), codes)
    hard = nets["decoder"](F.one_hot(codes, 512).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(net.decoder.from_codes(codes), hard, **TWIN)
    torch.testing.assert_close(net.decode(codes), dall_e.unmap_pixels(torch.sigmoid(hard[:, :3])), **TWIN)


# ------------------------------------------------------------ other formats


def test_state_dicts(tmp_path: Path, native: DVAE, released: dict[str, State]) -> None:
    (tmp_path / "in").mkdir()
    torch.save(released["encoder"], tmp_path / "in/a")
    save_file(released["decoder"], tmp_path / "in/b")
    convert(find(tmp_path / "in"), tmp_path / "out")
    assert same(load_image_tokenizer(tmp_path / "out/dvae"), native)


@torch.no_grad()
def test_the_encoder_of_transformers(tmp_path: Path) -> None:
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    flava = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=32, num_blocks_per_group=1)).eval()
    flava.save_pretrained(tmp_path / "in")
    source = recognize(tmp_path / "in")
    assert source is not None
    assert source.parts.keys() == {"encoder"}
    record = convert(source, tmp_path / "out")
    assert record["inferred"]["type"] == "dvae_encoder"
    assert "cannot decode" in record["description"]
    net = load_image_tokenizer(tmp_path / "out/dvae")
    assert isinstance(net, DVAEEncoder)
    images = torch.rand(2, 3, 64, 40)
    codes = flava.get_codebook_indices(net.map_pixels(images))
    assert torch.equal(net.encode(images), codes)
    assert len(codes.unique()) > 2
    with pytest.raises(ValueError, match="only an encoder and cannot decode"):
        net.decode(codes)
    assert same(load_model(tmp_path / "in", "dvae"), net)
    assert same(load_model(tmp_path / "out", "dvae"), net)
    complete = {f"image_codebook.{name}": tensor for name, tensor in flava.state_dict().items()}
    save_file({**complete, "logit_scale": torch.ones(())}, tmp_path / "complete.safetensors")
    assert find(tmp_path / "complete.safetensors").config == source.config


def test_the_encoder_of_transformers_with_the_released_decoder(
    tmp_path: Path, native: DVAE, released: dict[str, State]
) -> None:
    save_file({flava_name(name): tensor for name, tensor in released["encoder"].items()}, tmp_path / "a")
    torch.save(released["decoder"], tmp_path / "b")
    convert(find(tmp_path), tmp_path / "out")
    assert same(load_image_tokenizer(tmp_path / "out/dvae"), native)


# ------------------------------------------------------------ errors


def test_a_decoder_without_its_encoder_raises(tmp_path: Path, released: dict[str, State]) -> None:
    torch.save(released["decoder"], tmp_path / "decoder.pkl")
    assert "(decoder.pkl) without the encoder: give both files, or the folder" in refusal(lambda: find(tmp_path))


def test_two_encoders_raise(tmp_path: Path, released: dict[str, State]) -> None:
    for name in "ab":
        torch.save(released["encoder"], tmp_path / name)
    assert "holds several encoders of OpenAI's discrete VAE (a, b)" in refusal(lambda: find(tmp_path))


def test_encoder_and_decoder_of_different_sizes_raise(tmp_path: Path, released: dict[str, State]) -> None:
    released["decoder"]["blocks.input.w"] = torch.rand(8, 400, 1, 1)
    for part, state in released.items():
        torch.save(state, tmp_path / part)
    assert "do not belong together: they have codebook_size 512 and 400" in refusal(lambda: find(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.group_2.block_1.id_path.w", None, "missing encoder.groups.group_2.block_1.skip.weight"),
        ("blocks.extra.w", torch.ones(1), "unexpected encoder.blocks.extra.w"),
        ("blocks.input.b", torch.ones(65), r"encoder.input.bias has shape (65,), expected (64,)"),
        ("blocks.input.b", torch.full((64,), torch.nan), "encoder.input.bias has values that are not finite"),
        ("blocks.input.b", torch.ones(64, dtype=torch.int32), "encoder.input.bias is torch.int32, expected floating"),
    ],
)
def test_damaged_weights_raise(
    tmp_path: Path, released: dict[str, State], name: str, tensor: Tensor | None, message: str
) -> None:
    state = released["encoder"]
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    torch.save(state, tmp_path / "weights")
    source = find(tmp_path)
    assert message in refusal(lambda: convert(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_false_depth_raises(tmp_path: Path, released: dict[str, State]) -> None:
    names = [f"blocks.group_{i}.block_{j}.res_path.conv_1.w" for i in range(1, 40) for j in range(1, 4)]
    torch.save({**released["encoder"], **dict.fromkeys(names, torch.ones(1))}, tmp_path / "weights")
    assert "too few for its 117 blocks" in refusal(lambda: find(tmp_path))
