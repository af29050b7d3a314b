"""DALL-E mini in the layouts of min-dalle and of Flax: results after conversion, inferred options, errors."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dalle_zoo import DallePipeline
from dalle_zoo.convert import FAMILIES, Source, WeightFileError, convert, find, recognize
from dalle_zoo.convert.lazy import check_fit
from dalle_zoo.models.external.dalle_mini import DalleMini, DalleMiniConfig
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig
from dalle_zoo.networks import load_prior
from dalle_zoo.sampling import SamplingOptions, decode_logits, sample_codes
from dalle_zoo.tokenizers import DalleMiniTokenizer, HFTokenizer, load_text_tokenizer
from dalle_zoo.tokenizers.dalle_mini import simplify
from tools.fuzz_files import packed

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/dalle_mini.py"))
FIRST = runpy.run_path(str(Path(__file__).parents[1] / "golden/vqgan.py"))
TEXT = json.loads(GOLDEN["TEXT"].read_text())
LAYOUTS = json.loads(GOLDEN["LAYOUTS"].read_text())
TWIN = {"atol": 1e-4, "rtol": 0.0}
"""Tolerance for the golden logits, whose standard deviation is about 3: float32 rounding in another order."""
Sizes = Mapping[str, int]
Twin = tuple[DalleMini, dict[str, Tensor]]

TINY: Sizes = {"width": 64, "hidden": 20, "text_vocab": 404, "text_length": 16, "rows": 50, "tokens": 16, "layers": 2}
"""A network of one head for 4 x 4 codes out of 48, with an unused row in its embedding."""
CONFIG: dict[str, Any] = {
    "model_type": "dallebart", "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_vocab_size": 404,
    "image_vocab_size": 49, "image_length": 16, "max_text_length": 16, "decoder_start_token_id": 48,
    "normalize_text": True, "ln_positions": "normformer", "use_glu": True,
}  # fmt: skip
"""Configuration of the tiny network under the names of the training code."""


def state_dict(part: str, sizes: Sizes) -> dict[str, Tensor]:
    """Weights of the encoder or the decoder under min-dalle's names."""
    length = sizes["text_length"] if part == "encoder" else sizes["tokens"]
    known = {1024: sizes["width"], 2730: sizes["hidden"], 50264: sizes["text_vocab"], 16385: sizes["rows"]}
    known |= {64: length, 256: length}
    shapes = {}
    for name, shape in LAYOUTS["mini"][part].items():
        if name.startswith("layers.11."):
            continue
        names = [name.replace("layers.0.", f"layers.{i}.") for i in range(sizes["layers"])]
        shapes |= dict.fromkeys(names, tuple(known[size] for size in shape))
    made: dict[str, Tensor] = GOLDEN["weights"](part, shapes)
    return made


def min_dalle(folder: Path, sizes: Sizes = TINY, suffix: str = "") -> Path:
    """Both files of min-dalle."""
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        torch.save(state_dict(part, sizes), folder / f"{part}{suffix}.pt")
    return folder


def vocabulary(folder: Path, suffix: str = "", more: Mapping[str, int] | None = None) -> None:
    content = TEXT["vocabulary"] | dict(more or {})
    (folder / f"vocab{suffix}.json").write_text(json.dumps(content))
    (folder / f"merges{suffix}.txt").write_text("\n".join(["#version: 0.2", *TEXT["merges"], ""]))


def describe(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def detokenizer(folder: Path) -> None:
    config = VQGANConfig(
        image_size=16, width=32, multipliers=(1, 2, 2), blocks_per_level=1, attention_sizes=(8,), latent_channels=24,
        code_channels=16, codebook_size=48, decoder_only=True, signed_pixels=False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VQGAN(config).state_dict().items()}
    state = FIRST["weights"](shapes)
    state["embedding.weight"] = state.pop("quantize.embedding.weight")
    torch.save(state, folder / "detoker.pt")


def inferred(source: Source | None) -> dict[str, Any]:
    assert source is not None
    assert source.family == "dalle_mini"
    return dict(source.config)


# ------------------------------------------------------------ results


@pytest.fixture(scope="module", params=list(GOLDEN["VARIANTS"]))
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """A converted golden network, and the outputs of the original."""
    variant, folder = request.param, tmp_path_factory.mktemp("twin")
    original = GOLDEN["VARIANTS"][variant]
    sizes = {
        "width": 128, "hidden": 44, "text_vocab": 40, "text_length": 12, "rows": original["image_vocab_count"] + 1,
        "tokens": 256, "layers": original["layer_count"],
    }  # fmt: skip
    convert(find(min_dalle(folder / "in", sizes)), folder / "out")
    prior = load_prior(folder / "out/prior")
    assert isinstance(prior, DalleMini)
    assert (prior.config.start_token, prior.config.codebook_size) == (original["start"], 16384)
    golden = load_file(GOLDEN["FILE"])
    return prior, {name.removeprefix(f"{variant}."): t for name, t in golden.items() if name.startswith(variant)}


@torch.no_grad()
def test_logits_equal_the_original(twin: Twin) -> None:
    """Logits in one pass and step by step, with and without a caption."""
    prior, golden = twin
    text, codes = golden["text"].flatten(0, 1), GOLDEN["given_codes"]().view(2, 16, 16).repeat_interleave(2, 0)
    expected = golden["logits"].flatten(0, 1)  # (2 captions, 2, positions, codes)
    assert torch.equal(text[0], prior.null_text())
    complete = prior.image_logits(text, codes)[:, GOLDEN["POSITIONS"], :: GOLDEN["STRIDE"]]
    assert 1 < float(expected.std()) < 10
    torch.testing.assert_close(complete, expected, **TWIN)
    steps = torch.stack(list(decode_logits(prior, text, codes[:, None])), 2)[:, 0]
    torch.testing.assert_close(steps[:, GOLDEN["POSITIONS"], :: GOLDEN["STRIDE"]], expected, **TWIN)


def test_codes_equal_the_original(twin: Twin) -> None:
    """The most likely codes, with the original's guidance."""
    prior, golden = twin
    text, seeds = golden["text"][:, 1], torch.zeros(2, 1, dtype=torch.long)
    codes = sample_codes(prior, text, seeds, SamplingOptions(temperature=0, guidance_scale=GOLDEN["GUIDANCE"]))
    assert torch.equal(codes.flatten(1), golden["codes"])


# ------------------------------------------------------------ inferred options


@pytest.mark.parametrize("size", ["mini", "mega"])
def test_published_sizes(
    size: str, empty_safetensors: Callable[[Mapping[str, Sequence[int]], Path], Path], tmp_path: Path
) -> None:
    mega = size == "mega"
    for part, layout in LAYOUTS[size].items():
        middle = {n: s for n, s in layout.items() if n.startswith("layers.0.")}
        count = 24 if mega else 12
        every = {n.replace(".0.", f".{i}.", 1): s for i in range(count) for n, s in middle.items()}
        empty_safetensors(layout | every, tmp_path / f"{part}.safetensors")
    source = recognize(tmp_path)
    expected = DalleMiniConfig()
    if mega:
        wide = {"width": 2048, "text_vocab": 50272, "image_rows": 16416, "start_token": 16415}
        parts = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (("layers", 24), ("heads", 32), ("hidden", 4096))
        }
        expected = DalleMiniConfig(**wide, **parts)
    assert inferred(source) == asdict(expected)
    assert source is not None
    with torch.device("meta"):
        check_fit(FAMILIES[source.family](source.family).translate(source, expected), DalleMini(expected).state_dict())


def test_conversion_without_a_configuration(tmp_path: Path) -> None:
    source = find(min_dalle(tmp_path / "in"))
    expected = DalleMiniConfig(
        text_length=16, text_vocab=404, image_height=4, image_width=4, codebook_size=32, image_rows=50,
        start_token=49, width=64, encoder_layers=2, encoder_heads=1, encoder_hidden=20, decoder_layers=2,
        decoder_heads=1, decoder_hidden=20,
    )  # fmt: skip
    assert inferred(source) == asdict(expected)
    none = "no configuration was found"
    assert source.notes == {
        "codebook_size": "the largest power of 2 below the 50 rows of the table, as no image tokenizer was found",
        "start_token": f"the last of several rows after the codes, as {none}",
        "encoder_heads": f"width / 64, as {none}",
        "decoder_heads": f"width / 64, as {none}",
        **dict.fromkeys(("begin_token", "pad_token", "end_token"), "BART's, as no vocabulary was found"),
        "captions": "as in all configurations of the training code",
    }
    record = convert(source, tmp_path / "out")
    assert record["missing"] == ["dvae", "tokenizer"]
    assert record["inferred"] == {"type": "dalle_mini", **asdict(expected), "captions": "simplified"}
    assert record["parameters"] == {"prior": sum(p.numel() for p in load_prior(tmp_path / "out/prior").parameters())}


def test_conversion_with_configuration_and_vocabulary(tmp_path: Path) -> None:
    folder = min_dalle(tmp_path / "in")
    moved = {"<s>": 7, TEXT_AT_7: 0}
    vocabulary(folder, more=moved)
    describe(folder)
    detokenizer(folder)
    source = find(folder)
    config = inferred(source)
    assert (config["codebook_size"], config["start_token"]) == (48, 48)
    assert (config["encoder_heads"], config["decoder_heads"]) == (2, 4)
    assert (config["begin_token"], config["pad_token"], config["end_token"]) == (7, 1, 2)
    assert source.notes == {
        "codebook_size": "that of the image tokenizer",
        **dict.fromkeys(("start_token", "encoder_heads", "decoder_heads"), "config.json"),
        **dict.fromkeys(("begin_token", "pad_token", "end_token"), "vocab.json"),
        "captions": "config.json",
    }


TEXT_AT_7 = next(token for token, number in TEXT["vocabulary"].items() if number == 7)


def test_missing_gains_are_one(tmp_path: Path) -> None:
    """min-dalle's files are in half precision, transposed, and lack the gains of norms before matrix products."""
    folder = tmp_path / "in"
    folder.mkdir()
    lacking = ("pre_self_attn_layer_norm", "pre_encoder_attn_layer_norm", "ln0", "ln1", "final_ln")
    retained = 0
    for part in ("encoder", "decoder"):
        state = {}
        for name, tensor in state_dict(part, TINY).items():
            if not name.removesuffix(".weight").endswith(lacking):
                half = tensor.half()
                state[name] = half.T.contiguous().T if half.ndim == 2 else half
                retained += 1
        torch.save(state, folder / f"{part}.pt")
    record = convert(find(folder), tmp_path / "out")
    assert record["inferred"]["gains"] == "16 that the files lack are 1"
    with safe_open(tmp_path / "out/prior/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable)
    assert len(tensors) == retained + 16
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["decoder.layers.1.text_norm.weight"], torch.ones(64, dtype=torch.float16))
    expected = state_dict("decoder", TINY)["layers.1.encoder_attn.k_proj.weight"].half()
    assert torch.equal(tensors["decoder.layers.1.text_attention.key.weight"], expected)


# ------------------------------------------------------------ Flax


FLAX = {
    "encoder": {
        "pre_self_attn_layer_norm": "LayerNorm_0", "self_attn": "FlaxBartAttention_0",
        "self_attn_layer_norm": "LayerNorm_1", "glu": "GLU_0",
    },
    "decoder": {
        "pre_self_attn_layer_norm": "LayerNorm_0", "self_attn": "FlaxBartAttention_0",
        "self_attn_layer_norm": "LayerNorm_1", "pre_encoder_attn_layer_norm": "LayerNorm_2",
        "encoder_attn": "FlaxBartAttention_1", "encoder_attn_layer_norm": "LayerNorm_3", "glu": "GLU_0",
    },
}  # fmt: skip
GATED = {"ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2"}


def flax_tree(stacked: bool) -> dict[str, Any]:
    """The tiny network as stored by the training code: layers stacked in one tensor, or separate."""
    tree: dict[str, Any] = {}

    def put(path: Sequence[str], value: Tensor) -> None:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value

    for part in ("encoder", "decoder"):
        state, layers = state_dict(part, TINY), range(TINY["layers"])
        for name in state:
            *modules, kind = name.split(".")
            matrix = state[name].ndim == 2
            kernel = matrix and "embed" not in name
            flax_kind = kind if kind == "bias" else "kernel" if kernel else "embedding" if matrix else "scale"
            if modules[0] != "layers":
                path = ["lm_head"] if modules == ["lm_head"] else ["model", part, *modules]
                put([*path, flax_kind], state[name].T if kernel else state[name])
            elif modules[1] == "0":
                values = [state[name.replace("layers.0.", f"layers.{i}.")] for i in layers]
                values = [value.T if kernel else value for value in values]
                inner = [FLAX[part][modules[2]], *(GATED.get(m, m) for m in modules[3:]), flax_kind]
                where = ["model", part, "layers"]
                if stacked:
                    put([*where, f"FlaxBart{part.title()}Layers", *inner], torch.stack(values))
                else:
                    for i in layers:
                        put([*where, f"FlaxBart{part.title()}Layer_{i}", *inner], values[i])
    return tree


@pytest.mark.parametrize("stacked", [True, False])
def test_flax_files_give_the_same_network(stacked: bool, tmp_path: Path) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(packed(flax_tree(stacked)))
    describe(tmp_path)
    source = find(tmp_path / "flax_model.msgpack")
    assert "no configuration was found" in source.notes["start_token"]
    source = find(tmp_path)
    assert source.notes["start_token"] == "config.json"
    convert(source, tmp_path / "flax")
    convert(find(min_dalle(tmp_path / "in")), tmp_path / "torch")
    one, other = (load_file(tmp_path / name / "prior/model.safetensors") for name in ("flax", "torch"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated or damaged"),
        (lambda data: data + b"\0", "1 bytes after its content"),
        (lambda data: data.replace(b"float32", b"complex", 1), "an array of the kind 'complex', expected float64"),
        (lambda data: data.replace(b"\x01\x93", b"\x03\x93", 1), "an extension of the kind 3, expected only arrays"),
        (lambda data: data.replace(b"\xa4bias", b"\xa5scale", 1), "is damaged|twice|of the kind"),
        (lambda data: data.replace(b"\xc6", b"\xc3", 1), "a value of the kind 0xc3, expected numbers of an array"),
        (lambda data: packed({"model": {"__msgpack_chunked_array__": {}}}), "an array in chunks"),
        (lambda data: b"\x81\xa1a" * 70 + b"\x80", "too deeply"),
        (lambda data: b"\x81\xa1a\xdf\xff\xff\xff\xff", "too much of it"),
        (lambda data: b"\x81\xa1\xff\x80aaa", "a name that is not valid UTF-8"),
    ],
)
def test_damaged_flax_files_raise(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(damage(packed(flax_tree(stacked=True))))
    with pytest.raises(WeightFileError, match=message):
        find(tmp_path)


# ------------------------------------------------------------ captions


@pytest.fixture(scope="module")
def bart() -> Any:
    """The class that the training code's tokenizer derives from."""
    from transformers import BartTokenizerFast

    merges: Any = [tuple(line.split(" ")) for line in TEXT["merges"]]
    return BartTokenizerFast(vocab=TEXT["vocabulary"], merges=merges)


def test_captions_are_simplified_as_for_training() -> None:
    """Dozens of written captions and two hundred of unusual pieces; the training code prepends a space."""
    for caption, expected in TEXT["simplified"].items():
        assert f" {simplify(caption)}" == expected, caption


def test_captions_for_which_the_rules_differ_from_the_tables() -> None:
    assert {caption: (simplify(caption), external.strip()) for caption, external in TEXT["different"].items()} == {
        "\u043a\u043e\u0442 on \u5317\u4eac street": ("on street", "kot on bei jing street"),
        "face \U0001f618": ("face, face throwing a kiss", "face, face blowing a kiss"),
        "\u00e2\u20ac\u0153broken\u00e2\u20ac\u009d encoding": ("aeuroebrokenaeur encoding", '" broken " encoding'),
        "waving \U0001f44b\U0001f3fd": ("waving, waving hand sign", "waving, waving hand medium skin tone"),
    }


def test_ids_of_simplified_captions(bart: Any, tmp_path: Path) -> None:
    prior, tokenizer = pair(tmp_path)
    assert isinstance(tokenizer, DalleMiniTokenizer)
    captions = [caption for caption in TEXT["simplified"] if simplify(caption)]
    expected = bart(
        [TEXT["simplified"][caption] for caption in captions], padding="max_length", truncation=True, max_length=16
    )
    came = prior.encode_captions(tokenizer, captions)
    assert came.tolist() == expected["input_ids"]
    assert (came != 1).tolist() == [[bool(x) for x in row] for row in expected["attention_mask"]]
    assert (came[:, -1] == 2).any(), "a caption too long keeps its end token"
    empty = bart("", padding="max_length", max_length=16)["input_ids"]
    assert prior.encode_captions(tokenizer, ["", "..."]).tolist() == [empty, empty]
    assert prior.null_text().tolist() == empty


def test_ids_equal_min_dalle_for_plain_captions(tmp_path: Path) -> None:
    """min-dalle encodes plain captions equally, but not punctuation, accented capitals and long captions."""
    _, tokenizer = pair(tmp_path)
    for caption, ids in TEXT["min_dalle"].items():
        assert [0, *tokenizer.encode(caption), 2] == ids, caption


def test_captions_without_simplification(bart: Any, tmp_path: Path) -> None:
    prior, tokenizer = pair(tmp_path, normalize_text=False)
    assert isinstance(tokenizer, HFTokenizer)
    captions = [*TEXT["simplified"], *TEXT["different"], "a <pad> b</s> <s>c <unk>", "</s>"]
    expected = bart(captions, padding="max_length", truncation=True, max_length=16)["input_ids"]
    assert prior.encode_captions(tokenizer, captions).tolist() == expected


def pair(tmp_path: Path, **changes: Any) -> tuple[DalleMini, Any]:
    """The converted tiny prior and its text tokenizer."""
    folder = min_dalle(tmp_path / "in")
    vocabulary(folder)
    describe(folder, **changes)
    convert(find(folder), tmp_path / "out")
    prior = load_prior(tmp_path / "out/prior")
    assert isinstance(prior, DalleMini)
    return prior, load_text_tokenizer(tmp_path / "out/tokenizer")


def test_the_mask_token_may_lack_an_embedding(tmp_path: Path) -> None:
    folder = min_dalle(tmp_path / "in")
    vocabulary(folder, more={"<mask>": 404})
    convert(find(folder), tmp_path / "out")
    assert load_text_tokenizer(tmp_path / "out/tokenizer").vocab_size == 400
    vocabulary(folder, more={"other": 404})
    with pytest.raises(WeightFileError, match=r"vocab.json has ids up to 404, the weights have 404 rows"):
        convert(find(folder), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------ a complete model


@pytest.mark.parametrize("converted", [True, False])
def test_prompt_to_images(converted: bool, tmp_path: Path) -> None:
    place = min_dalle(tmp_path / "in", suffix="_mini")
    vocabulary(place, "_mini")
    detokenizer(place)
    if converted:
        record = convert(find(place), tmp_path / "out")
        assert record["missing"] == []
        assert record["image_tokenizer"]["family"] == "vqgan"
        place = tmp_path / "out"
    pipe = DallePipeline.from_pretrained(place)
    arguments: dict[str, Any] = {"num_images_per_prompt": 2, "seed": 1, "output_type": "latent"}
    plain = pipe("A cat, on the moon!", **arguments).images
    assert plain.shape == (2, 4, 4)
    assert not torch.equal(pipe("A cat, on the moon!", guidance_scale=10.0, **arguments).images, plain)
    assert torch.equal(pipe("a cat on the moon", **arguments).images, pipe("A CAT on the moon", **arguments).images)
    images = pipe(["a cat", ""], num_images_per_prompt=2, top_k=8, guidance_scale=16.0).images
    assert [image.size for image in images] == [(16, 16)] * 4
    assert pipe("a cat", image=None, temperature=0).images[0].size == (16, 16)


# ------------------------------------------------------------ errors


def test_both_sizes_in_one_folder_raise(tmp_path: Path) -> None:
    folder = min_dalle(min_dalle(tmp_path / "in"), suffix="_mini")
    said = r"holds several decoders of DALL-E mini \(decoder.pt, decoder_mini.pt\): name the files of one"
    with pytest.raises(WeightFileError, match=said):
        find(folder)
    assert recognize(folder, only=["*_mini.*"]) is not None


@pytest.mark.parametrize(("part", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_missing_part_raises(part: str, other: str, tmp_path: Path) -> None:
    file = min_dalle(tmp_path / "in") / f"{part}.pt"
    with pytest.raises(WeightFileError, match=rf"has the {part} of DALL-E mini \({part}.pt\) without the {other}"):
        find(file)
    assert recognize([file, tmp_path / f"in/{other}.pt"]) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 128}, "config.json does not describe these weights.*d_model is 128, expected 64"),
        ({"image_vocab_size": 48}, "image_vocab_size is 48, expected 49"),
        (
            {"ln_positions": "swinv2"},
            "of an unsupported kind: ln_positions is 'swinv2', expected 'normformer'",
        ),
        ({"decoder_start_token_id": 50}, r"start_token must follow the codes and be in 32\.\.49"),
        ({"encoder_attention_heads": "2"}, "encoder_attention_heads is '2', expected an integer"),
        ({"decoder_attention_heads": 3}, "width 64 is not a multiple of decoder_heads 3"),
    ],
)
def test_configurations_that_do_not_fit_raise(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = min_dalle(tmp_path / "in")
    describe(folder, **changes)
    with pytest.raises(WeightFileError, match=message):
        find(folder)


def test_ambiguous_or_mismatched_files_raise(tmp_path: Path) -> None:
    folder = min_dalle(tmp_path / "in")
    vocabulary(folder)
    vocabulary(folder, "_mini")
    with pytest.raises(WeightFileError, match=r"more than one vocabulary \(vocab.json, vocab_mini.json\)"):
        find(folder)
    (folder / "vocab_mini.json").unlink()
    describe(folder)
    (folder / "other.json").write_text(json.dumps(CONFIG))
    with pytest.raises(WeightFileError, match=r"several configurations \(config.json, other.json\)"):
        find(folder)
    (folder / "other.json").unlink()
    (folder / "merges_mini.txt").write_text("#version: 0.2\na b c\n")
    (folder / "merges.txt").unlink()
    with pytest.raises(WeightFileError, match="line 2 must hold two parts, got 'a b c'"):
        convert(find(folder), tmp_path / "out")
    (folder / "merges_mini.txt").write_text("#version: 0.2\nq q\n")
    with pytest.raises(WeightFileError, match="vocabulary and merges do not belong together"):
        convert(find(folder), tmp_path / "out")
    (folder / "merges_mini.txt").unlink()
    with pytest.raises(WeightFileError, match=r"vocab.json was found without its merges: give both, or neither"):
        find(folder)


def test_weights_that_do_not_fit_raise(tmp_path: Path) -> None:
    folder = min_dalle(tmp_path / "in")
    complete = state_dict("decoder", TINY)
    for change, message in (
        ({"layers.1.glu.fc3.weight": torch.ones(2)}, r"unexpected decoder.layers.1.gated_unit.fc3.weight"),
        ({"extra.weight": torch.ones(2)}, r"unexpected decoder.extra.weight"),
        ({"final_ln.bias": torch.ones(3)}, r"decoder.final_norm.bias has shape \(3,\), expected \(64,\)"),
        ({"lm_head.weight": torch.full((50, 64), torch.nan)}, "image_head.weight has values that are not finite"),
    ):
        torch.save(complete | change, folder / "decoder.pt")
        with pytest.raises(WeightFileError, match=message):
            convert(find(folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    torch.save(complete | {"embed_positions.weight": torch.ones(15, 64)}, folder / "decoder.pt")
    with pytest.raises(WeightFileError, match="15 image positions, expected a square number"):
        find(folder)
