"""Makes rudalle_*: what released code of ruDALL-E computes, how it names tensors, and how it splits captions.

    python -P tests/golden/rudalle.py

(-P, or this file would be imported as the package) needs rudalle 1.1.3, installed with --no-deps, youtokentome 1.0.6
(with --no-build-isolation, after Cython), and einops. The weights are not stored: they follow from their names.
"""
# ruff: noqa: RUF001 (captions are Russian)

from __future__ import annotations

import json
import math
import random
import re
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

VQGAN = runpy.run_path(str(Path(__file__).with_name("vqgan.py")))
uniform = VQGAN["uniform"]

FOLDER = Path(__file__).parent
FILES = {version: FOLDER / f"rudalle_{version}.safetensors" for version in ("v2", "v3")}
LAYOUTS = FOLDER / "rudalle_layouts.json"
VOCABULARY = FOLDER / "rudalle_bpe.model"
CAPTIONS = FOLDER / "rudalle_captions.json"
PLAIN = {"embedding_dropout_prob": 0.1, "output_dropout_prob": 0.1, "attention_dropout_prob": 0.1}
STABLE = {"cogview_sandwich_layernorm": True, "cogview_pb_relax": True}
SMALL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "text_seq_length": 6, "image_tokens_per_dim": 12,
    "vocab_size": 200 + 6, "image_vocab_size": 48,
}  # fmt: skip
"""The small twins, whose grid is wider than the kernel of 11, so that the versions differ."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "malevich": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16},
    "kandinsky": {"num_layers": 64, "hidden_size": 3840, "num_attention_heads": 60},
}
SIZES = {"text_seq_length": 128, "image_tokens_per_dim": 32, "vocab_size": 16384 + 128, "image_vocab_size": 8192}
CAPTION_LENGTH = 32
STRIDE = 5
"""Of the logits of text and image ids together only each fifth column is stored."""


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that follows from its name and keeps activations near unit size; no bias is 0, no scale is 1."""
    values: Tensor = uniform(name, shape)
    if name.endswith("bias"):
        return values / 2
    if len(shape) == 1:
        return 1 + values / 2
    return values if "embeddings" in name else values * math.sqrt(3 / shape[1])


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict without its masks."""
    return {name: weight(name, shape) for name, shape in shapes.items() if not name.endswith("_mask")}


def layout(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of "small", "malevich" or "kandinsky", as stored."""
    found = {}
    for name, shape in json.loads(LAYOUTS.read_text())[kind].items():
        before, braces, after = re.fullmatch(r"(.*?)(?:{0-(\d+)}(.*))?", name).groups()
        names = [name] if braces is None else [f"{before}{i}{after}" for i in range(int(braces) + 1)]
        found |= dict.fromkeys(names, tuple(shape))
    return found


def small_state(version: str) -> dict[str, Tensor]:
    """State dict of a small twin, as stored: with its masks."""
    stored = load_file(FILES[version])
    masks = {f"transformer.{kind}_mask": stored[f"{kind}_mask"] for kind in ("row", "col", "conv")}
    return weights(layout("small")) | masks


def original(version: str, **sizes: Any) -> nn.Module:
    """A network of the released code."""
    from rudalle.dalle.model import DalleModel

    net: nn.Module = DalleModel("cpu", hf_version=version, **PLAIN, **STABLE, **sizes)
    return net.eval()


def outputs(version: str) -> dict[str, Tensor]:
    """Logits in one pass and step by step, and the codes that are most likely one after the other."""
    net: Any = original(version, **SMALL)
    state = net.state_dict()
    net.load_state_dict(state | weights({name: tuple(t.shape) for name, t in state.items()}))
    text = torch.tensor([[2, 7, 39, 3, 0, 0], [2, 5, 111, 30, 17, 8]])
    codes = (uniform("codes", (2, 144)) * 24 + 24).long()
    causal = torch.tril(torch.ones(2, 1, 150, 150))
    joint, _ = net(torch.cat([text, codes], 1), causal)

    def sampled(given: Tensor | None) -> tuple[Tensor, Tensor]:
        stream, cache, steps = text, None, []
        for index in range(144):
            logits, cache = net(stream, causal, use_cache=True, cache=cache)
            steps.append(logits[:, -1, SMALL["vocab_size"] :])
            token = steps[-1].argmax(-1) if given is None else given[:, index]
            stream = torch.cat([stream, token[:, None]], 1)
        return torch.stack(steps, 1), stream[:, 6:]

    found = {
        "text": text,
        "codes": codes,
        "joint": joint[..., ::STRIDE],
        "steps": sampled(codes)[0],
        "likely": sampled(None)[1],
    }
    return found | {f"{kind}_mask": state[f"transformer.{kind}_mask"] for kind in ("row", "col", "conv")}


def layouts() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the tensors of the published sizes; those of all layers in one line."""
    found = {}
    for name, sizes in {"small": SMALL, **PUBLISHED}.items():
        with torch.device("meta"):
            state = original("v3", **SIZES | sizes).state_dict()
        layers = f"layers.{{0-{sizes['num_layers'] - 1}}}."
        first = {n.replace("layers.0.", layers): list(t.shape) for n, t in state.items() if "layers.0." in n}
        found[name] = {n: list(t.shape) for n, t in state.items() if ".layers." not in n} | first
    return found


# ------------------------------------------------------------ captions

SUBJECTS = "кот кошка котик собака девушка старик дом домик дракон робот cat dog house robot painting радуга"
KINDS = "рыжий рыжая белый красивый красивая маленький старый огромный red white beautiful small cyberpunk ночной"
PLACES = "на крыше|в лесу|на фоне моря|в стиле ван гога|у окна, зимой|on the roof|in the forest|at night, 8k|(эскиз)"
WRITTEN = [
    "", " ", "рыжий котик", "Рыжий  КОТИК", "  кот\tна\nкрыше  ", "hello, how are you?", "ΟΔΥΣΣΕΥΣ ΑΣ", "İstanbul",
    "кот 🐈 и собака 🐕‍🦺", "日本語の猫", "▁кот▁▁на ▁ крыше▁", "\u00a0кот\u00a0на\u2003крыше\u3000", "a\u00a0▁\u00a0▁",
    "<UNK> <PAD> <BOS> <EOS>", "ё е\u0308 é e\u0301", "1234567890 !?.,:;-()", "\x1cкот\x1f \x85", "кот\x0bна\x0cкрыше",
    "кот\x00кот", "робот-дракон (эскиз), 8k", "кот " * 40, "ж" * 100, "красивая " * 22 + "девушка", "котик" * 20,
]  # fmt: skip


def lines() -> list[str]:
    """Text on which the small vocabulary is trained."""
    rng = random.Random(0)
    return [
        f"{rng.choice(KINDS.split())} {rng.choice(SUBJECTS.split())} {rng.choice(PLACES.split('|'))}"
        for _ in range(600)
    ]


def captions() -> list[str]:
    """Captions by hand, and at random from known and unknown characters and spaces of all kinds."""
    rng = random.Random(1)
    words = [*lines()[:50], "КОТ", "Ж", "🐈", "ß", "ẞ", "Σ", "'", '"', "é", "", "zq", "我", "\u200b", "\u0301"]
    spaces = [" ", "  ", "\t", "\n", "▁", "\u00a0", "\u2028", "\r\n", "", ""]
    mixed = ["".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 9))) for _ in range(150)]
    letters = [*"абвгдкотшыжяё catdogxyz", "▁", "猫", " ", "\t"]
    return WRITTEN + mixed + ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(150)]


def tokenizer() -> list[tuple[str, list[int]]]:
    """Writes a small vocabulary; captions and their ids, start, end and padding included."""
    import youtokentome

    names = {"hf_hub_url": None, "cached_download": None}  # taken off the library since
    sys.modules["huggingface_hub"] = type("Stub", (ModuleType,), names)("huggingface_hub")
    from rudalle.tokenizer import get_tokenizer

    with TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text("\n".join(lines()))
        youtokentome.BPE.train(str(text), str(VOCABULARY), vocab_size=200, n_threads=1)
    wrapper = get_tokenizer(str(VOCABULARY))
    cleaned = [(caption, caption.lower().strip()) for caption in captions()]  # as rudalle.pipelines does
    return [(caption, wrapper.encode_text(text, CAPTION_LENGTH).tolist()) for caption, text in cleaned]


@torch.no_grad()
def main() -> None:
    """Writes the files."""
    VQGAN["bare_package"]("rudalle")
    VQGAN["bare_package"]("rudalle.dalle")
    for version, file in FILES.items():
        save_file({name: tensor.contiguous() for name, tensor in outputs(version).items()}, file)
    LAYOUTS.write_text(json.dumps(layouts(), separators=(",", ":")).replace('],"', '],\n"') + "\n")
    rows = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in tokenizer()]
    CAPTIONS.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
