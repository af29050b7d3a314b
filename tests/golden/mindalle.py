"""Makes mindalle.safetensors and mindalle_tokenizer.json: what minDALL-E's own code computes.

    python tests/golden/mindalle.py CHECKOUT

needs a checkout of https://github.com/kakaobrain/minDALL-E (made with commit e548007), omegaconf, tqdm and tokenizers
(0.23.3; 0.13.3 gives the same). The weights are not stored: they follow from their names. The vocabulary of the
release is not available; a small one, trained once on the captions here, is in the JSON file and stays as it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

uniform = runpy.run_path(str(Path(__file__).with_name("openai_dvae.py")))["uniform"]

FILE = Path(__file__).with_suffix(".safetensors")
TOKENIZER = Path(__file__).with_name("mindalle_tokenizer.json")
VOCABULARY, LENGTH = 300, 40
"""Size of the small vocabulary, and the tokens that captions are truncated or filled to."""
HPARAMS: dict[str, Any] = {
    "embed_dim": 48, "n_layers": 3, "n_heads": 3, "n_dense_layers": 3, "ctx_len_img": 16, "ctx_len_txt": 12,
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True, "attn_bias": True,
    "gelu_use_approx": False,
}  # fmt: skip
"""Architecture of the small twin, by the original's names."""
STAGE2: dict[str, Any] = {"vocab_size_txt": VOCABULARY, "vocab_size_img": 48, "hparams": HPARAMS}
RELEASED: dict[str, Any] = {
    "vocab_size_txt": 16384,
    "vocab_size_img": 16384,
    "hparams": HPARAMS
    | {"embed_dim": 1536, "n_layers": 42, "n_heads": 24, "n_dense_layers": 42, "ctx_len_img": 256, "ctx_len_txt": 64},
}
"""What the published configuration says."""
VARIANTS = {"published": {}, "unbiased": {"attn_bias": False, "mlp_bias": False}}
"""The kinds of network that are converted."""
SAMPLER = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}

CAPTIONS = (
    "a painting of a cat with sunglasses in the frame",
    "A LARGE Pink Elephant Walking On The BEACH",
    "Eiffel tower on a desert.",
    "a photo of san francisco's golden gate bridge, in black-and-white tone!",
    "",
    "   ",
    "a",
    "a  cat\twith\nsunglasses",
    "cat, dog; (bird) [tree] {ocean} <sky>: 50% #1 @home a/b\\c",
    "the quick brown fox jumps over the lazy dog",
    "zyzzyva qqq xylophone",
    "1234567890 3.14 1,000",
    "Café naïve façade ÅNGSTRÖM",
    "cafe\u0301 with a combining accent",
    "İstanbul and the ẞ of STRASSE",
    "北京的一只猫 a cat in 北京",
    "кошка в шляпе",
    "a 🐱 with 🕶️",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, nul\u0000 and \ufffd",
    "“curly” \u2018quotes\u2019 — dashes… ™",
    "spelled [PAD] and [UNK] and [pad]",
    "under_score don't it's o'clock",
    " leading and trailing spaces ",
    "a painting of a bird in the style of asian painting " * 4,
    "supercalifragilisticexpialidocious" * 3,
)
"""Captions whose ids are stored."""


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that follows from its name; no bias is 0, no scale is 1. Embeddings are large, so that tokens count."""
    values: Tensor = uniform(name, shape)
    if name.endswith("bias"):
        return values / 2
    if len(shape) == 1:
        return 1 + values / 2
    return 4 * values if "emb" in name else values * math.sqrt(3 / shape[1])


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def stage2(variant: str) -> dict[str, Any]:
    """Options of the small twin."""
    return STAGE2 | {"hparams": HPARAMS | VARIANTS[variant]}


def layout(stage: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original's tensors, which `original` checks."""
    hparams = stage["hparams"]
    d, txt, img = hparams["embed_dim"], stage["vocab_size_txt"], stage["vocab_size_img"]
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb_img.weight": (img, d), "tok_emb_txt.weight": (txt, d),
        "pos_emb_img.weight": (hparams["ctx_len_img"], d), "pos_emb_txt.weight": (hparams["ctx_len_txt"], d),
    }  # fmt: skip
    matrices = {f"attn.{name}": (d, d) for name in ("key", "query", "value", "proj")}
    matrices |= {"mlp.0": (4 * d, d), "mlp.2": (d, 4 * d)}
    for index in range(hparams["n_layers"]):
        for norm in ("ln1", "ln2"):
            shapes |= {f"blocks.{index}.{norm}.{kind}": (d,) for kind in ("weight", "bias")}
        for name, shape in matrices.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            if hparams[f"{name.partition('.')[0]}_bias"]:
                shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,), "head_img.weight": (img, d), "head_txt.weight": (txt, d)}
    return shapes


def bare_packages(checkout: Path) -> None:
    """Lets modules of the checkout be imported without its ``__init__`` files, which ask for Lightning and CLIP."""
    for name in ("dalle", "dalle.models", "dalle.models.stage2", "dalle.utils"):
        package = ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package


def original(stage: dict[str, Any]) -> Any:
    """The original's network."""
    from dalle.models.stage2.transformer import Transformer1d
    from omegaconf import OmegaConf

    net = Transformer1d(**stage | {"hparams": OmegaConf.create(stage["hparams"])}).eval()
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == layout(stage)
    return net


def computed(variant: str) -> dict[str, Tensor]:
    """Logits in one pass and step by step, and the most likely codes."""
    from dalle.utils.sampling import cutoff_topk_logits, cutoff_topp_probs, get_positional_encoding, sampling

    stage = stage2(variant)
    net = original(stage)
    net.load_state_dict(weights(layout(stage)))
    text = ((uniform("text", (2, 12)) + 1) / 2 * VOCABULARY).long()
    codes = ((uniform("codes", (2, 16)) + 1) / 2 * 48).long()
    positions = {"pos_images": get_positional_encoding(codes), "pos_texts": get_positional_encoding(text)}
    image_logits, text_logits = net(codes, text, **positions)
    steps, past = [], None
    for index in range(16):
        before = slice(index - 1, index)
        logits, present = net.sampling(
            images=codes[:, before] if index else None,
            texts=text,
            pos_images=positions["pos_images"][:, before] if index else None,
            pos_texts=positions["pos_texts"],
            use_fp16=False,
            past=past,
        )
        steps.append(logits)
        past = [*(past or []), torch.stack(present)]
    retained = cutoff_topk_logits(image_logits[0] / SAMPLER["temperature"], SAMPLER["top_k"])
    return {
        "text": text,
        "codes": codes,
        "image_logits": image_logits,
        "text_logits": text_logits,
        "step_logits": torch.stack(steps, 1),
        "greedy": sampling(net, text, top_k=1, is_tqdm=False, use_fp16=False, max_seq_len=16),
        "probabilities": cutoff_topp_probs(retained.softmax(-1), SAMPLER["top_p"]),
    }


def write_vocabulary(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> None:
    """The two files, where the release has them."""
    folder.mkdir(parents=True)
    (folder / "bpe-16k-vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "bpe-16k-merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def without_padding(vocabulary: dict[str, int]) -> dict[str, int]:
    """The vocabulary of which [PAD] is no part, so that the original appends it."""
    return {piece: index for index, piece in enumerate(sorted(set(vocabulary) - {"[PAD]"}))}


def tokenized() -> dict[str, Any]:
    """The small vocabulary, and ids of the captions with it and without its [PAD]."""
    from dalle.models.tokenizer import build_tokenizer

    answer: dict[str, Any] = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    complete = answer["vocabulary"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, vocabulary in {"ids": complete, "ids_appended": without_padding(complete)}.items():
            write_vocabulary(Path(folder) / name, vocabulary, answer["merges"])
            tokenizer = build_tokenizer(str(Path(folder) / name), context_length=LENGTH, lowercase=True, dropout=None)
            answer[name] = [tokenizer.encode(caption).ids for caption in CAPTIONS]
    return answer


@torch.no_grad()
def main() -> None:
    """Writes the files."""
    bare_packages(Path(sys.argv[1]))
    with torch.device("meta"):
        original(RELEASED)  # whose layout is checked there
    outputs = {f"{variant}.{key}": t for variant in VARIANTS for key, t in computed(variant).items()}
    save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, FILE)
    rows = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in tokenized().items()]
    TOKENIZER.write_text("{" + ",\n".join(rows) + "}\n")


if __name__ == "__main__":
    main()
