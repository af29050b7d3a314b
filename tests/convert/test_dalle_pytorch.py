"""DALLE-pytorch's priors: every layout of all versions gives the original's outputs; inferred options; errors."""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dalle_zoo import DallePipeline
from dalle_zoo.convert import WeightFileError, convert, find, inspect_files, recognize
from dalle_zoo.convert.dalle_pytorch_tensors import sort_tensors, translated
from dalle_zoo.convert.dalle_pytorch_text import about_vocabulary, find_vocabulary, read_vocabulary
from dalle_zoo.convert.lazy import check_fit
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.external.dalle_pytorch import DallePytorch
from dalle_zoo.models.external.dalle_pytorch_config import DallePytorchConfig
from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.networks import load_image_tokenizer, load_prior
from dalle_zoo.sampling import SamplingOptions, decode_logits, sample_codes

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
    """Content of a checkpoint of train_dalle.py of that version."""
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
    prior = load_prior(out / "prior")
    assert isinstance(prior, DallePytorch)
    return prior, record


def with_pads(prior: DallePytorch, text: Tensor) -> Tensor:
    """Result of `encode_captions` for the ids of the original's tokenizers."""
    return text.where(text != 0, prior.null_text())


# ------------------------------------------------------------ results


@every_case
@torch.no_grad()
def test_equals_the_original(case: str, tmp_path: Path) -> None:
    prior, record = converted(save(case, tmp_path), tmp_path / "ours")
    expected = golden(case)
    version, name = case.split()
    text = with_pads(prior, GOLDEN["captions"](GOLDEN["CASES"][version][name]))
    codes = expected["codes"].view(-1, 8, 8)
    torch.testing.assert_close(prior.text_logits(text), expected["text_logits"], **SAME)
    torch.testing.assert_close(prior.image_logits(text, codes), expected["logits"], **SAME)
    torch.testing.assert_close(prior.image_logits(text[:1], codes[:1]), expected["logits"][:1], **SAME)
    steps = torch.stack(list(decode_logits(prior, text, codes[:, None])), 2)[:, 0]
    torch.testing.assert_close(steps, expected.get("cached", expected["logits"]), **SAME)
    sampled = sample_codes(prior, text, torch.zeros(3, 1, dtype=torch.long), SamplingOptions(temperature=0))
    assert torch.equal(sampled.flatten(1), expected["greedy"])
    assert record["image_tokenizer"]["family"] == "dalle_pytorch_vae"
    assert record["missing"] == ["tokenizer"]


@pytest.mark.parametrize("kind", GOLDEN["VAES"])
@torch.no_grad()
def test_image_tokenizer_equals_the_original(kind: str, tmp_path: Path) -> None:
    hparams = GOLDEN["VAES"][kind]
    weights = GOLDEN["state_dict"](layouts()[f"vae {kind}"], None)
    torch.save({"hparams": hparams, "weights": weights}, tmp_path / "vae.pt")
    record = convert(find(tmp_path / "vae.pt"), tmp_path / "ours")
    vae = load_image_tokenizer(tmp_path / "ours/dvae")
    assert isinstance(vae, DallePytorchVAE)
    assert record["notes"] == {"image_size": "hparams"}
    assert (vae.image_size, vae.factor, vae.codebook_size) == (16, 2 ** hparams["num_layers"], 9)
    version = max(GOLDEN["CASES"], key=lambda text: [int(part) for part in text.split(".")])
    stored = load_file(GOLDEN["file_of"](version))
    expected = {key: stored[f"vae {kind}.{key}"] for key in ("images", "codes", "pixels")}
    codes = vae.encode(expected["images"])
    assert torch.equal(codes.flatten(1), expected["codes"])
    torch.testing.assert_close(vae.decode(codes), (expected["pixels"] / 2 + 0.5).clamp(0, 1), **SAME)


# ------------------------------------------------------------ prompt to images


def words(folder: Path, count: int = 11, name: str = "bpe.json") -> Path:
    """A vocabulary of the tokenizers library; the id of "a" is 0."""
    known = ["a", "red", "green", "blue", "cat", "dog", "on", "the", "mat", "with"]
    vocabulary = {word: number for number, word in enumerate([*known, *map(str, range(len(known), count))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / name))
    return folder / name


def test_a_folder_converts_to_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save("1.6.6 mixed", tmp_path / "in")
    words(tmp_path / "in")
    record = convert(find(tmp_path / "in"), tmp_path / "ours")
    assert record["missing"] == []
    pipe = DallePipeline.from_pretrained(tmp_path / "ours")
    out = pipe("a red cat", num_images_per_prompt=2, seed=1, top_k=5, guidance_scale=2.0)
    assert [image.size for image in out.images] == [(16, 16)] * 2
    assert pipe.encode_text(["a red cat on a mat with"]).tolist() == [[11, 1, 4, 6, 15]]  # a is 0, so padding
    again = pipe(
        "a red cat", num_images_per_prompt=2, seed=1, top_k=5, guidance_scale=2.0, output_type="latent"
    ).images
    alone = pipe("a red cat", num_images_per_prompt=2, seed=1, top_k=5, output_type="latent").images
    assert again.shape == (2, 8, 8)
    assert not torch.equal(again, alone)


@torch.no_grad()
def test_guidance_acts_at_every_token(tmp_path: Path) -> None:
    """In the original it acts only at the first token, because it erases the caption that both passes share."""
    prior, _ = converted(save("1.6.6 mixed", tmp_path), tmp_path / "ours")
    text = with_pads(prior, GOLDEN["TEXT"][:1])
    codes = sample_codes(prior, text, torch.zeros(1, 1, dtype=torch.long), SamplingOptions(guidance_scale=3.0))[:, 0]
    conditional = prior.image_logits(text, codes)
    empty = prior.image_logits(prior.null_text()[None], codes)
    assert (conditional - empty).abs().amax(-1).min() > 1e-3


# ------------------------------------------------------------ inferred options


ALL_BEFORE = "full, row_same, column, conv_clamped(kernel=5)"


def inferred(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    source = find(path)
    return dict(source.config), dict(source.notes)


def test_the_record_states_the_origin_of_options(tmp_path: Path) -> None:
    config, notes = inferred(save("1.6.6 reversible", tmp_path))
    assert config == {
        "text_length": 5, "text_vocab": 11, "image_height": 8, "image_width": 8, "codebook_size": 9, "width": 20,
        "num_layers": 4, "num_heads": 3, "head_size": 8, "masks": "full, row_same, full", "positions": "rotary",
        "sparse_layers": (), "gmlp_layers": (),
        "padding": "learned", "padding_id": 0, "shift_tokens": True, "layer_scale": True, "sandwich_norm": True,
        "divide_by_max": True, "reversible": True, "tied_embeddings": False, "shared_attention": (0, 1, 0, 0),
        "shared_mlp": (0, 1, 0, 1), "norm": "layer",
    }  # fmt: skip
    assert notes == {
        "text_vocab": "num_text_tokens in hparams",
        "num_heads": "heads in hparams",
        "head_size": "dim_head in hparams",
        "masks": "attn_types in hparams",
        "divide_by_max": "stable in hparams",
        "padding_id": "the original's default, padding_id is not stated",
        "text_length": "text_seq_len in hparams",
        "vocabulary": "none was found",
    }


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("0.5.1 mixed", {"norm": "rms", "padding": "masked", "layer_scale": False, "masks": ALL_BEFORE}),
        ("0.6.0 mixed", {"norm": "rms", "padding": "masked", "layer_scale": False, "masks": ALL_BEFORE}),
        ("0.7.3 mixed", {"padding": "masked", "layer_scale": False, "shift_tokens": False, "positions": "axial"}),
        ("0.9.6 mixed", {"padding": "learned", "layer_scale": True}),
        ("0.7.3 sparse", {"padding": "masked", "masks": "full, full, row_same, full", "sparse_layers": (1, 3)}),
        ("0.12.0 mlp", {"masks": "full", "gmlp_layers": (0, 1, 2, 3), "shared_attention": ()}),
        ("1.0.1 mlp", {"masks": "full, full, full, column", "gmlp_layers": (0, 2), "shift_tokens": True}),
        ("0.14.3 full", {"padding": "learned", "reversible": True, "divide_by_max": True}),
        ("1.0.3 full", {"shift_tokens": True, "positions": "rotary"}),
        ("1.1.8 mixed", {"shift_tokens": True, "sandwich_norm": True}),
        ("1.1.8 bare", {"shift_tokens": False, "positions": "axial", "sandwich_norm": False}),
        ("1.4.2 shared", {"shared_attention": (0, 1, 0, 0), "tied_embeddings": True, "shift_tokens": True}),
        ("1.6.6 bare", {"shift_tokens": False, "positions": "axial", "shared_mlp": ()}),
        ("1.6.6 axial", {"tied_embeddings": True, "positions": "axial", "shift_tokens": True}),
    ],
)
def test_options_are_inferred_from_tensors(case: str, expected: dict[str, Any], tmp_path: Path) -> None:
    config, _ = inferred(save(case, tmp_path))
    assert {name: config[name] for name in expected} == expected


LAYOUT = "transformer.layers.layers.{}.0.fn.fn.fn.attn_fn.master_layout"


def test_all_block_sparse_layers_use_the_layout_of_the_first(tmp_path: Path) -> None:
    path = save("1.1.8 sparse", tmp_path)
    weights = torch.load(path)["weights"]
    assert not torch.equal(weights[LAYOUT.format(1)], weights[LAYOUT.format(3)])
    prior, record = converted(path, tmp_path / "ours")
    assert torch.equal(prior.blocks, weights[LAYOUT.format(1)][0].float())
    assert (
        record["notes"]["sparse_layers"]
        == "attn_types in hparams; all attend to the blocks of the first, as with DeepSpeed"
    )
    assert record["unused"] == {"attn_fn.master_layout": 1}


def test_a_missing_layout_with_random_blocks_raises(tmp_path: Path) -> None:
    source = find(save("1.1.8 sparse", tmp_path, drop(LAYOUT.format(1))))
    with pytest.raises(
        WeightFileError, match=r"lack attn_fn.master_layout, and some of the blocks they attend to were"
    ):
        convert(source, tmp_path / "ours")


def test_a_layout_without_random_blocks_may_be_missing(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["hparams"].update(attn_types=("sparse",), text_seq_len=12)
        weights = content["weights"]
        weights["transformer.pos_emb"] = weights["transformer.pos_emb"][:, :17]  # <bos>, 12 of text, a grid of 2 x 2
        weights["text_emb.weight"] = torch.rand(23, 20)
        weights["to_logits.1.weight"], weights["to_logits.1.bias"] = torch.rand(32, 20), torch.rand(32)

    source = find(save("1.6.6 mixed", tmp_path, change))
    config = DallePytorchConfig(**source.config)
    assert config.input_length == 16
    assert translated(sort_tensors(source.parts["prior"]), config)["blocks"].read().tolist() == [[1.0]]


def test_an_unused_matrix_in_a_gmlp_block_is_ignored(tmp_path: Path) -> None:
    """g-mlp-pytorch 0.1.0 and 0.1.1 retained the convolution that the matrix replaced."""

    def change(content: dict[str, Any]) -> None:
        weights = content["weights"]
        for name in [name for name in weights if ".sgu.weight" in name or ".sgu.bias" in name]:
            weights[name.replace("sgu.", "sgu.proj.")] = torch.rand(1)
            weights[name] = weights[name][0]

    prior, record = converted(save("1.0.1 mlp", tmp_path, change), tmp_path / "ours")
    expected = golden("1.0.1 mlp")
    with torch.no_grad():
        logits = prior.image_logits(with_pads(prior, GOLDEN["TEXT"]), expected["codes"].view(-1, 8, 8))
    torch.testing.assert_close(logits, expected["logits"], **SAME)
    assert record["unused"] == {"sgu.proj": 4}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "1.0.1 mlp",
            lambda c: c["hparams"].update(attn_types=["full"]),
            r"has gMLP layers \(\), the tensors have \(0, 2\)",
        ),
        (
            "1.0.1 mlp",
            lambda c: c["hparams"].update(attn_types=["mlp"]),
            r"has gMLP layers \(0, 1, 2, 3\), the tensors",
        ),
        (
            "1.1.8 sparse",
            lambda c: c["hparams"].update(attn_types=["full"]),
            "it has attention 1: attn_fn.master_layout, attention 3",
        ),
        (
            "1.1.8 sparse",
            lambda c: c["weights"].update({LAYOUT.format(1): torch.ones(3, 4, 4)}),
            r"has shape \(3, 4, 4\), expected \(3, 5, 5\)",
        ),
        (
            "1.1.8 sparse",
            lambda c: c["weights"].update({LAYOUT.format(1): torch.ones(3, 5, 5).triu(1)}),
            "every block must attend to itself",
        ),
    ],
)
def test_block_sparse_and_gmlp_layers_that_do_not_fit_raise(
    case: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightFileError, match=message):
        convert(find(save(case, tmp_path, change)), tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "version", "spec", "stated"),
    [
        ("0.14.3 mixed", None, "conv_clamped(kernel=5)", "as no version is stated"),
        ("1.4.2 mixed", "1.4.2", "conv_clamped(kernel=5)", "version 1.4.2"),
        ("1.4.2 mixed", None, "conv_quadrant(kernel=5)", "as no version is stated"),
        ("1.6.6 mixed", "1.5.0", "conv_quadrant(kernel=5)", "version 1.5.0"),
    ],
)
def test_the_version_determines_the_convolutional_mask(
    case: str, version: str | None, spec: str, stated: str, tmp_path: Path
) -> None:
    config, notes = inferred(save(case, tmp_path, lambda content: content.update(version=version)))
    assert config["masks"] == f"full, row_same, column, {spec}"
    assert notes["masks"] == f"attn_types in hparams; conv_like is {spec}, {stated}"


def test_defaults_are_those_of_the_original(tmp_path: Path) -> None:
    def bare(content: dict[str, Any]) -> None:
        for name in ("attn_types", "stable"):
            content["hparams"].pop(name, None)

    config, notes = inferred(save("1.6.6 mixed", tmp_path, bare))
    assert config["masks"] == "full"
    assert notes["masks"] == "the original's default, attn_types is not stated"


def test_partly_shared_layers_are_not_shared(tmp_path: Path) -> None:
    name = "transformer.layers.layers.2.1.fn.fn.fn.fn.net.3.bias"
    config, _ = inferred(save("1.4.2 shared", tmp_path, lambda c: c["weights"].update({name: torch.rand(20)})))
    assert (config["shared_attention"], config["shared_mlp"]) == ((0, 1, 0, 0), (0, 1, 2, 1))


def test_hyper_parameters_are_read_from_a_file_next_to_the_weights(tmp_path: Path) -> None:
    content = content_of("1.6.6 mixed")
    torch.save(content["weights"], tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightFileError, match=r"it lacks its hparams, .* such as hparams.json with"):
        recognize(tmp_path)
    (tmp_path / "hparams.json").write_text(json.dumps(content["hparams"] | {"version": "1.6.6"}))
    config, notes = inferred(tmp_path)
    assert (config["num_heads"], notes["num_heads"]) == (3, "heads in hparams.json")
    assert notes["masks"].endswith("version 1.6.6")
    (tmp_path / "other.json").write_text(json.dumps(content["hparams"] | {"heads": 6}))
    with pytest.raises(WeightFileError, match=r"hparams.json and other.json state different hyper-parameters"):
        recognize(tmp_path)


def test_the_model_of_learning_at_home(tmp_path: Path) -> None:
    """learning-at-home/dalle: layers nested as before 1.4, in a wrapper; its code states the hyper-parameters."""
    content = content_of("1.6.6 reversible")
    bare = {
        f"model.{name}".replace("net.fn.fn.fn", "net.fn.fn").replace("fn.to_", "to_"): tensor
        for name, tensor in content["weights"].items()
        if not name.startswith("vae.")
    }
    assert "model.transformer.layers.blocks.0.f.net.fn.fn.fn.to_qkv.weight" in bare
    torch.save(bare, tmp_path / "model_state.pt")
    kinds = ["axial_row", "axial_col", "axial_row", "conv_like"]
    (tmp_path / "hparams.json").write_text(json.dumps(content["hparams"] | {"attn_types": kinds, "padding_id": 1}))
    config, notes = inferred(tmp_path)
    assert config["masks"] == "row_same, column, row_same, conv_clamped(kernel=5)"
    assert (config["padding_id"], notes["padding_id"]) == (1, "padding_id in hparams.json")
    assert (config["reversible"], config["shift_tokens"], config["shared_mlp"]) == (True, True, (0, 1, 0, 1))


def test_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    content = content_of("1.6.6 mixed")
    weights = content.pop("weights")
    torch.save(
        content | {"weights": "To get a working standard checkpoint, look into consolidating"},
        tmp_path / "auxiliary.pt",
    )
    with pytest.raises(WeightFileError, match=r"Join these with DeepSpeed's zero_to_fp32.py"):
        recognize(tmp_path)
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "pytorch_model.bin")
    source = find(tmp_path)
    assert source.config["masks"].endswith("conv_quadrant(kernel=5)")
    assert source.notes["num_heads"] == "heads in auxiliary.pt"


def test_angles_in_half_precision_are_not_recomputed(tmp_path: Path) -> None:
    def halve(content: dict[str, Any]) -> None:
        content["weights"] = {n: t.half() if t.is_floating_point() else t for n, t in content["weights"].items()}

    prior, _ = converted(save("1.6.6 mixed", tmp_path, halve), tmp_path / "ours")
    angles = golden("1.6.6 mixed")["angles"][0].half().float()
    assert torch.equal(prior.rotation, torch.stack([angles.cos(), angles.sin()]))


def expanded(layout: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names with braces expanded."""
    out = {}
    for name, shape in layout.items():
        head, brace, rest = name.partition("{")
        if not brace:
            out[name] = shape
            continue
        numbers, _, tail = rest.partition("}")
        first, last = map(int, numbers.split("-"))
        out |= {f"{head}{number}{tail}": shape for number in range(first, last + 1)}
    return out


def test_a_published_size(tmp_path: Path, empty_safetensors: Callable[..., Path]) -> None:
    published = json.loads((Path(__file__).parents[1] / "golden/dalle_pytorch_published.json").read_text())
    empty_safetensors(expanded(published["shapes"]), tmp_path / "model.safetensors")
    stated = {"dim": 1024, "num_text_tokens": 10000, "text_seq_len": 256, "depth": 12, "heads": 16, "dim_head": 64}
    stated |= {"attn_types": ["full", "axial_row", "axial_col", "conv_like"], "version": published["version"]}
    (tmp_path / "hparams.json").write_text(json.dumps(stated))
    source = find(tmp_path)
    assert (source.config["image_height"], source.config["codebook_size"]) == (32, 8192)
    assert source.image_tokenizer is not None
    assert source.image_tokenizer.config["num_blocks"] == 1
    with torch.device("meta"):
        prior = DallePytorch(DallePytorchConfig(**source.config))
    check_fit(translated(sort_tensors(source.parts["prior"]), prior.config), prior.state_dict())
    assert sum(parameter.numel() for parameter in prior.parameters()) == 239325200  # as the original counts


# ------------------------------------------------------------ image tokenizers in the same file


def test_a_vqgan_in_the_file(tmp_path: Path) -> None:
    vqgan = runpy.run_path(str(Path(__file__).parents[1] / "golden/vqgan.py"))
    config = VQGANConfig(
        image_size=16, width=32, multipliers=(1, 2), blocks_per_level=1, attention_sizes=(8,), latent_channels=24,
        code_channels=16, codebook_size=9,
    )  # fmt: skip
    weights = vqgan["weights"]({name: tuple(t.shape) for name, t in VQGAN(config).state_dict().items()})

    def swap(content: dict[str, Any]) -> None:
        prior = {name: t for name, t in content["weights"].items() if not name.startswith("vae.")}
        inside = {f"vae.model.{name}": t for name, t in weights.items()}
        content["weights"] = prior | inside | {"vae.model.loss.logvar": torch.zeros(())}
        content |= {"vae_params": None, "vae_class_name": "VQGanVAE"}

    record = convert(find(save("1.6.6 mixed", tmp_path, swap)), tmp_path / "ours")
    assert record["image_tokenizer"]["family"] == "vqgan"
    net = load_image_tokenizer(tmp_path / "ours/dvae")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


def test_openais_discrete_vae_in_the_file(tmp_path: Path) -> None:
    release = runpy.run_path(str(Path(__file__).parents[1] / "golden/openai_dvae.py"))
    dvae = DVAE(DVAEConfig(width=16, decoder_stem=4, codebook_size=9))
    inside = {
        f"vae.{short}.{release['released_name'](name)}": tensor
        for short, part in (("enc", dvae.encoder), ("dec", dvae.decoder))
        for name, tensor in part.state_dict().items()
    }

    def swap(content: dict[str, Any]) -> None:
        prior = {name: t for name, t in content["weights"].items() if not name.startswith("vae.")}
        content |= {"weights": prior | inside, "vae_params": None, "vae_class_name": "OpenAIDiscreteVAE"}

    record = convert(find(save("1.6.6 mixed", tmp_path, swap)), tmp_path / "ours")
    assert record["image_tokenizer"]["family"] == "openai_dvae"
    net = load_image_tokenizer(tmp_path / "ours/dvae")
    assert all(torch.equal(tensor, dvae.state_dict()[name]) for name, tensor in net.state_dict().items())


def test_the_image_tokenizer_in_the_file_has_priority(tmp_path: Path) -> None:
    save("1.6.6 mixed", tmp_path)
    weights = GOLDEN["state_dict"](layouts()["vae residual"], None)
    torch.save({"hparams": GOLDEN["VAES"]["residual"], "weights": weights}, tmp_path / "vae.pt")
    source = find(tmp_path)
    assert source.family == "dalle_pytorch"
    assert source.image_tokenizer is not None
    assert source.image_tokenizer.config["num_blocks"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 10}, "num_tokens is 10, the tensors have 9"),
        ({"normalization": None}, "normalization is None"),
        ({"normalization": ((0.0,) * 3, (1.0,) * 3)}, r"normalization is \(\(0.0, 0.0, 0.0\), \(1.0, 1.0, 1.0\)\)"),
        ({"image_size": 15}, "image_size 15 is not a multiple of the downsampling factor 2"),
        ({"image_size": "16"}, "cannot be converted"),
    ],
)
def test_image_tokenizers_that_do_not_fit_raise(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = GOLDEN["state_dict"](layouts()["vae plain"], None)
    torch.save({"hparams": GOLDEN["VAE"] | change, "weights": weights}, tmp_path / "vae.pt")
    with pytest.raises(WeightFileError, match=message):
        recognize(tmp_path / "vae.pt")


def test_transparent_images_raise(tmp_path: Path) -> None:
    weights = GOLDEN["state_dict"](layouts()["vae plain"], None)
    weights["encoder.0.0.weight"] = torch.rand(8, 4, 4, 4)
    torch.save({"hparams": GOLDEN["VAE"], "weights": weights}, tmp_path / "vae.pt")
    with pytest.raises(WeightFileError, match="4 channels: only color images without transparency are supported"):
        recognize(tmp_path / "vae.pt")


# ------------------------------------------------------------ vocabularies


def clips_list(path: Path, count: int) -> Path:
    """A list of merges in the format and length of CLIP's: pairs of bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [f"{first} {second}" for first in symbols for second in symbols][:count]
    path.write_text("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *pairs, ""]), encoding="utf-8")
    return path


def test_clips_vocabulary_is_recognized_by_its_first_line(tmp_path: Path) -> None:
    path = clips_list(tmp_path / "anything.txt", 49152)
    assert about_vocabulary(None, 49408).endswith(
        "suggest CLIP's, which is bpe_simple_vocab_16e6.txt of the original's package"
    )
    assert find_vocabulary(inspect_files(tmp_path), 49408) == path
    assert about_vocabulary(path, 49408) == "anything.txt"
    assert read_vocabulary(path).kind == "clip"
    assert read_vocabulary(path).vocab_size == 49408
    clips_list(path, 100)
    with pytest.raises(WeightFileError, match=r"is not CLIP's list of merges: it has 100 merges of 48894"):
        find_vocabulary(inspect_files(tmp_path), 49408)


def test_the_vocabulary_is_selected_by_size(tmp_path: Path) -> None:
    save("1.6.6 mixed", tmp_path)
    words(tmp_path, 12, "other.json")
    with pytest.raises(WeightFileError, match=r"it has 11 text tokens, but other.json has 12: give the vocabulary"):
        recognize(tmp_path)
    right = words(tmp_path)
    assert find(tmp_path).files == {"vocabulary": right}
    words(tmp_path, name="again.json")
    with pytest.raises(
        WeightFileError, match=r"again.json and bpe.json have 11 ids: name the one it was trained with, with --files"
    ):
        recognize(tmp_path)


# ------------------------------------------------------------ errors


def set_hparams(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["hparams"].update(changes)


def laughs() -> list[Any]:
    """A nested list of a billion elements that takes little memory, because every level refers to one list twice."""
    value: list[Any] = ["lol"]
    for _ in range(30):
        value = [value, value]
    return value


@pytest.mark.parametrize("name", ["heads", "dim", "normalization"])
def test_nested_hyper_parameters_take_no_time(name: str, tmp_path: Path) -> None:
    weights = GOLDEN["state_dict"](layouts()["vae residual"], None)
    torch.save({"hparams": GOLDEN["VAES"]["residual"] | {name: laughs()}, "weights": weights}, tmp_path / "vae.pt")
    path = save("1.6.6 mixed", tmp_path, set_hparams(**{name: laughs()}))
    for file in (path, tmp_path / "vae.pt"):
        begin = time.monotonic()
        with pytest.raises(WeightFileError, match="cannot be converted: it has more than 10000 hyper-parameters"):
            recognize(file)
        assert time.monotonic() - begin < 5


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        content["weights"] = {name.replace(old, new): tensor for name, tensor in content["weights"].items()}

    return change


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["weights"].pop(name)


LAYER = "transformer.layers.layers.1"
QKV = f"{LAYER}.0.fn.fn.fn.fn.fn.to_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_hparams(attn_types=("full", "sparse")),
            "block-sparse attention needs an input length .* that is a multiple of 16, got 69",
        ),
        (set_hparams(attn_types=("full", "axial")), "layers of the attention type 'axial', expected full, axial_row"),
        (set_hparams(attn_types=3), "attn_types in hparams must be a list of names, got 3"),
        (set_hparams(heads=4), "heads 4 and dim_head 8 need a to_qkv of 96 rows, it has 72"),
        (set_hparams(heads="3"), "heads in hparams must be an integer of at least 1, got '3'"),
        (set_hparams(stable=1), "stable in hparams must be true or false, got 1"),
        (set_hparams(dim=21), "hparams does not fit the weights: dim is 21, the tensors have 20"),
        (set_hparams(rotary_emb=False), "rotary_emb is False, the tensors have True"),
        (set_hparams(shift_tokens=False), "shift_tokens is False, the tensors have True"),
        (set_hparams(num_text_tokens=12), "its table of 16 text tokens fits neither num_text_tokens 12 nor as many"),
        (
            set_hparams(text_seq_len=7, num_text_tokens=9),
            "has 70 rows, expected text_seq_len 7 plus a square grid",
        ),
        (rename("fn.to_qkv.weight", "fn.proj_in.0.weight"), r"has gMLP layers \(\), the tensors have \(0, 1, 2, 3\)"),
        (rename(f"{LAYER}.", "transformer.layers.layers.9."), "layers must be numbered 0, 1, ..."),
        (drop(QKV), "layers must be numbered 0, 1, ..., each with the matrices to_qkv"),
        (drop("text_emb.weight"), "it has no matrix text_emb.weight"),
        (lambda c: c["weights"].update({"transformer.pos_emb": torch.rand(())}), "transformer.pos_emb has 0 rows"),
        (
            lambda c: c["weights"].update({QKV: torch.rand(())}),
            "each with the matrices to_qkv \\(or proj_in of gMLP\\) and net.0",
        ),
    ],
)
def test_unsupported_checkpoints_raise(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=message):
        recognize(save("1.6.6 mixed", tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.1.scale"), "missing layers.1.mlp.scale"),
        (drop("to_logits.0.bias"), "it has no to_logits.0.bias"),
        (lambda c: c["weights"].update({"norm_by_max.x": torch.rand(1)}), "it has norm_by_max.x in addition"),
        (
            lambda c: c["weights"].update({f"{LAYER}.0.fn.other": torch.rand(1)}),
            "it has attention 1: other in addition",
        ),
        (
            lambda c: c["weights"].update({f"{LAYER}.1.scale": torch.rand(1, 1, 7)}),
            r"of shape \(1, 1, 7\) should have",
        ),
        (lambda c: c["weights"]["to_logits.1.bias"].fill_(torch.nan), "values that are not finite"),
    ],
)
def test_contradictions_raise(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    source = find(save("1.6.6 mixed", tmp_path, change))
    with pytest.raises(WeightFileError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_several_priors_raise(tmp_path: Path) -> None:
    save("1.6.6 mixed", tmp_path)
    (tmp_path / "dalle.pt").rename(tmp_path / "other.pt")
    save("1.6.6 bare", tmp_path)
    with pytest.raises(
        WeightFileError,
        match=r"several priors of DALLE-pytorch \(dalle.pt, other.pt\): name the files of one with --files or files=",
    ):
        recognize(tmp_path)
