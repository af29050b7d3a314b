"""minDALL-E in the layout of its release: recognition, inferred options, results after conversion, errors."""

from __future__ import annotations

import json
import math
import re
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

from dalle_zoo import DallePipeline
from dalle_zoo.convert import Source, WeightFileError, convert, find, recognize
from dalle_zoo.models.external.mindalle import MinDALLE, MinDALLEConfig
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.networks import load_prior
from dalle_zoo.sampling import decode_logits
from dalle_zoo.tokenizers import load_text_tokenizer

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/mindalle.py"))
FIRST = runpy.run_path(str(Path(__file__).parents[1] / "golden/vqgan.py"))
TOKENIZED = json.loads(GOLDEN["TOKENIZER"].read_text())
TWIN = {"atol": 1e-4, "rtol": 0.0}
"""As in tests/models/external/test_mindalle.py."""
SMALL = MinDALLEConfig(
    text_length=12, text_vocab=300, image_height=4, image_width=4, codebook_size=48, width=48, num_layers=3,
    num_heads=3, padding_id=1,
)  # fmt: skip
"""Fields that must be inferred for the network of the golden file."""
NETWORK = FIRST["NEAREST"]["ddconfig"]
VQGAN_SMALL = VQGANConfig(
    image_size=16, width=32, multipliers=(1, 2, 2), blocks_per_level=1, attention_sizes=(8,), latent_channels=24,
    code_channels=16, codebook_size=48,
)  # fmt: skip


def prior_weights(variant: str = "published") -> dict[str, Tensor]:
    state: dict[str, Tensor] = GOLDEN["weights"](GOLDEN["layout"](GOLDEN["stage2"](variant)))
    return state


def save_prior(folder: Path, state: Mapping[str, Tensor] | None = None, name: str = "stage2_last.ckpt") -> Path:
    torch.save({"state_dict": prior_weights() if state is None else state}, folder / name)
    return folder / name


def describe(folder: Path, name: str = "config.yaml", variant: str = "published", **changes: Any) -> None:
    """The release's configuration."""
    stage2 = GOLDEN["stage2"](variant) | {"type": "transformer1d"}
    top, inner = ({k: v for k, v in changes.items() if (k in stage2) is outer} for outer in (True, False))
    stage2 |= top | {"hparams": stage2["hparams"] | inner}
    stage1 = {"type": "vqgan", "embed_dim": 16, "n_embed": 48, "hparams": NETWORK}
    (folder / name).write_text(yaml.safe_dump({"stage1": stage1, "stage2": stage2}))


def release(folder: Path, variant: str = "published") -> Path:
    """All files of the release, small."""
    folder.mkdir()
    save_prior(folder, prior_weights(variant))
    describe(folder, variant=variant)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VQGAN(VQGAN_SMALL).state_dict().items()}
    torch.save({"state_dict": FIRST["weights"](shapes)}, folder / "stage1_last.ckpt")
    GOLDEN["write_vocabulary"](folder / "tokenizer", TOKENIZED["vocabulary"], TOKENIZED["merges"])
    return folder


def inferred(source: Source | None) -> dict[str, Any]:
    assert source is not None
    assert source.family == "mindalle"
    return dict(source.config)


# ------------------------------------------------------------ results


@pytest.mark.parametrize("variant", GOLDEN["VARIANTS"])
@torch.no_grad()
def test_the_prior_equals_the_original(variant: str, tmp_path: Path) -> None:
    convert(find(release(tmp_path / "release", variant)), tmp_path / "ours")
    prior = load_prior(tmp_path / "ours/prior")
    golden = {k.partition(".")[2]: v for k, v in load_file(GOLDEN["FILE"]).items() if k.startswith(variant)}
    codes = golden["codes"].view(2, 4, 4)
    assert isinstance(prior, MinDALLE)
    assert prior.config == SMALL
    torch.testing.assert_close(prior.image_logits(golden["text"], codes), golden["image_logits"], **TWIN)
    torch.testing.assert_close(prior.text_logits(golden["text"]), golden["text_logits"], **TWIN)
    steps = torch.stack(list(decode_logits(prior, golden["text"], codes[:, None])), 2)[:, 0]
    torch.testing.assert_close(steps, golden["step_logits"], **TWIN)


def test_the_release_generates_images(tmp_path: Path) -> None:
    record = convert(find(release(tmp_path / "release")), tmp_path / "ours")
    assert record["family"] == "mindalle"
    assert record["missing"] == []
    assert record["inferred"] == {"type": "mindalle", **asdict(SMALL)}
    assert record["notes"]["num_heads"] == "config.yaml"
    assert record["notes"]["padding_id"] == "[PAD] in bpe-16k-vocab.json"
    assert record["license"] == "CC-BY-NC-SA-4.0"
    assert record["license_note"] == "that of the published weights"
    assert record["image_tokenizer"]["inferred"]["image_size"] == 16
    assert record["parameters"].keys() == {"prior", "dvae"}
    pipe = DallePipeline.from_pretrained(tmp_path / "ours")
    assert pipe.encode_text(GOLDEN["CAPTIONS"]).tolist() == [row[:12] for row in TOKENIZED["ids"]]
    options = {"num_images_per_prompt": 2, "output_type": "latent", "seed": 3}
    plain = pipe("a cat", **options).images
    for changed in ({"top_k": 4}, {"top_p": 0.5}, {"temperature": 0.5}, {"guidance_scale": 3.0}):
        assert not torch.equal(pipe("a cat", **options, **changed).images, plain), changed
    images = pipe("A painting of a cat", num_images_per_prompt=2, seed=0).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize(("ids", "padding"), [("ids", 1), ("ids_appended", 299)])
def test_the_vocabulary_gives_the_ids_of_the_original(ids: str, padding: int, tmp_path: Path) -> None:
    location = release(tmp_path / "release")
    if ids == "ids_appended":
        (location / "tokenizer/bpe-16k-vocab.json").write_text(
            json.dumps(GOLDEN["without_padding"](TOKENIZED["vocabulary"]))
        )
    source = find(location)
    assert source.config["padding_id"] == padding
    convert(source, tmp_path / "ours")
    tokenizer = load_text_tokenizer(tmp_path / "ours/tokenizer")
    for caption, expected in zip(GOLDEN["CAPTIONS"], TOKENIZED[ids], strict=True):
        came = tokenizer.encode(caption)[: GOLDEN["LENGTH"]]
        assert came + [padding] * (GOLDEN["LENGTH"] - len(came)) == expected, caption
    assert tokenizer.decode(tokenizer.encode("A Painting of a cat")) == "a painting of a cat"


# ------------------------------------------------------------ inferred options


def test_published_size(
    empty_safetensors: Callable[[Mapping[str, Sequence[int]], Path], Path], tmp_path: Path
) -> None:
    layout = GOLDEN["layout"](GOLDEN["RELEASED"])
    assert (len(layout), sum(math.prod(shape) for shape in layout.values())) == (680, 1_291_081_728)
    source = recognize(empty_safetensors(layout, tmp_path / "model.safetensors"))
    assert inferred(source) == asdict(MinDALLEConfig())
    assert source is not None
    assert source.notes["num_heads"] == "assumed, heads of 64, as no configuration was found"
    assert source.notes["padding_id"] == "unknown: no vocabulary was found"


def test_missing_components_are_reported(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_prior(tmp_path / "in")
    describe(tmp_path / "in")
    record = convert(find(tmp_path / "in"), tmp_path / "ours")
    assert record["missing"] == ["dvae", "tokenizer"]
    assert load_prior(tmp_path / "ours/prior").config == MinDALLEConfig(**asdict(SMALL) | {"padding_id": None})
    assert not (tmp_path / "ours/model_index.json").exists()


def test_file_names_do_not_matter(tmp_path: Path) -> None:
    location = release(tmp_path / "release")
    for number, file in enumerate(sorted(path for path in location.rglob("*") if path.is_file())):
        file.rename(location / f"{number}{file.suffix if file.suffix in ('.json', '.yaml') else ''}")
    source = find(location)
    assert inferred(source) == asdict(SMALL)
    assert source.image_tokenizer is not None


@pytest.mark.parametrize("wrapped", [True, False])
def test_both_stages_in_one_file(wrapped: bool, tmp_path: Path) -> None:
    location = release(tmp_path / "release")
    both = {}
    for stage in ("stage1", "stage2"):
        file = location / f"{stage}_last.ckpt"
        both |= {f"{stage}.{name}": tensor for name, tensor in torch.load(file)["state_dict"].items()}
        file.unlink()
    torch.save({"state_dict": both, "epoch": 8} if wrapped else both, location / "last.ckpt")
    record = convert(find(location), tmp_path / "ours")
    assert record["inferred"] == {"type": "mindalle", **asdict(SMALL)}
    assert record["missing"] == []


def test_a_bare_state_dict(tmp_path: Path) -> None:
    describe(tmp_path)
    torch.save(prior_weights(), tmp_path / "x.pt")
    assert inferred(find(tmp_path)) == asdict(SMALL) | {"padding_id": None}


def test_the_default_number_of_heads(tmp_path: Path) -> None:
    save_prior(tmp_path)
    hparams = {name: value for name, value in GOLDEN["HPARAMS"].items() if name != "n_heads"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stage2": {"hparams": hparams}}))
    assert inferred(find(tmp_path))["num_heads"] == 24, "the original's default"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 64}, "config.yaml does not describe this network: embed_dim is 64, expected 48"),
        ({"n_layers": 2, "ctx_len_txt": 9}, "ctx_len_txt is 9, expected 12; n_layers is 2, expected 3"),
        ({"vocab_size_txt": 299}, "vocab_size_txt is 299, expected 300"),
        ({"mlp_bias": False}, "mlp_bias is False, expected True"),
        ({"gelu_use_approx": True}, "gelu_use_approx is True, expected False"),
        ({"n_heads": 5}, "width 48 is not a multiple of num_heads 5"),
        ({"n_heads": "3"}, "n_heads in config.yaml must be an integer, got '3'"),
    ],
)
def test_a_configuration_of_another_network_raises(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_prior(tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(WeightFileError, match=message):
        recognize(tmp_path)


# ------------------------------------------------------------ errors


@pytest.mark.parametrize("condition", ["sos", "sos.weight"])
def test_transfers_to_imagenet_raise(condition: str, tmp_path: Path) -> None:
    state = {name: t for name, t in prior_weights().items() if "txt" not in name and "head" not in name}
    state |= {"head.weight": torch.rand(48, 48), condition: torch.rand(1, 1, 48)}
    save_prior(tmp_path, {f"stage2.{name}": tensor for name, tensor in state.items()}, "last.ckpt")
    with pytest.raises(
        WeightFileError, match=r"last.ckpt is a transfer of minDALL-E to ImageNet, .* takes no captions"
    ):
        find(tmp_path)


def test_several_priors_raise(tmp_path: Path) -> None:
    save_prior(tmp_path, name="a.ckpt")
    save_prior(tmp_path, name="b.ckpt")
    with pytest.raises(
        WeightFileError, match=r"several priors of minDALL-E \(a.ckpt, b.ckpt\): name the files of one with --files"
    ):
        recognize(tmp_path)


def test_contradicting_configurations_raise(tmp_path: Path) -> None:
    save_prior(tmp_path)
    describe(tmp_path, "a.yaml")
    describe(tmp_path, "b.yaml", n_heads=4)
    with pytest.raises(WeightFileError, match="disagree on n_heads"):
        recognize(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ln_f.bias"), "it has no ln_f.bias"),
        (lambda s: s.pop("blocks.1.attn.query.bias"), "it has no blocks.1.attn.query.bias"),
        (lambda s: [s.pop(n) for n in list(s) if "blocks.1." in n], "it has no blocks.1.attn.query.weight"),
        (lambda s: s.update({"blocks.0.extra": torch.rand(3)}), "it has blocks.0.extra in addition"),
        (lambda s: s.update({"head_img.weight": torch.rand(())}), r"head_img.weight has shape \(\), expected two"),
        (lambda s: s.update({"pos_emb_img.weight": torch.rand(15, 48)}), "has 15 rows, expected a square"),
        (lambda s: s.update({"head_txt.weight": torch.rand(9, 48)}), r"text_head.weight has shape \(9, 48\)"),
        (lambda s: s.update({"blocks.0.attn.key.weight": torch.rand(48, 9)}), r"shapes \(48, 48\) and \(48, 9\)"),
        (lambda s: s["blocks.2.mlp.2.bias"].fill_(math.nan), "layers.2.mlp.output.bias has values that are not fin"),
    ],
)
def test_tensors_that_do_not_fit_raise(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    state = prior_weights()
    change(state)
    save_prior(tmp_path / "in", state)
    describe(tmp_path / "in")
    with pytest.raises(WeightFileError, match=message):
        convert(find(tmp_path / "in"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_unknown_widths_need_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"does not follow from the width 48: give the folder with its config"):
        find(save_prior(tmp_path))


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ({**TOKENIZED["vocabulary"], "more": 300}, TOKENIZED["merges"], "300 text tokens, the text tokenizer 301"),
        (TOKENIZED["vocabulary"], [*TOKENIZED["merges"], "z q"], "do not form a vocabulary: .*zq"),
        ({"[UNK]": "x"}, ["[UN K]"], "do not form a vocabulary"),
    ],
)
def test_vocabularies_that_do_not_fit_raise(
    vocabulary: dict[str, Any], merges: list[str], message: str, tmp_path: Path
) -> None:
    location = release(tmp_path / "release")
    for file in (location / "tokenizer").iterdir():
        file.unlink()
    (location / "tokenizer").rmdir()
    GOLDEN["write_vocabulary"](location / "tokenizer", vocabulary, merges)
    with pytest.raises(WeightFileError, match=re.compile(message, re.DOTALL)):
        convert(find(location), tmp_path / "ours")


def test_two_vocabularies_raise(tmp_path: Path) -> None:
    location = release(tmp_path / "release")
    GOLDEN["write_vocabulary"](location / "other", TOKENIZED["vocabulary"], TOKENIZED["merges"])
    with pytest.raises(WeightFileError, match=r"several vocabularies \("):
        find(location)
