"""Makes dalle_mini.safetensors, dalle_mini_text.json and dalle_mini_layouts.json.

They hold what min-dalle and DALL-E mini's training code compute, and how min-dalle names tensors.

    python tests/golden/dalle_mini.py CHECKOUT

needs a checkout of https://github.com/borisdayma/dalle-mini (made with commit f0be4de) and, installed with --no-deps,
min-dalle 0.4.11, emoji 1.7.0, ftfy 6.3.1, unidecode 1.4.0 and tokenizers. The weights are not stored: they follow from
their names. Nor is the vocabulary of the release available; a small one is trained on the captions here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
uniform = runpy.run_path(str(FOLDER / "openai_dvae.py"))["uniform"]
bare_package = runpy.run_path(str(FOLDER / "vqgan.py"))["bare_package"]

FILE = FOLDER / "dalle_mini.safetensors"
TEXT = FOLDER / "dalle_mini_text.json"
LAYOUTS = FOLDER / "dalle_mini_layouts.json"
SHARED: dict[str, Any] = {"embed_count": 128, "attention_head_count": 2, "glu_embed_count": 44}
TEXT_LENGTH, TEXT_VOCAB, NUM_CODES, NUM_TOKENS = 12, 40, 16384, 256
VARIANTS: dict[str, dict[str, int]] = {
    "mini": {"layer_count": 2, "image_vocab_count": 16384, "start": 16384},
    "mega": {"layer_count": 3, "image_vocab_count": 16415, "start": 16415},
}
"""Small twins by the original's names; the tables of image tokens have the sizes of the release.

The start token is the one of earlier versions; 0.4.11 begins with 16383, which is a code of the image.
"""
CAPTIONS = ([0, 17, 5, 39, 2], [0, 9, 30, 12, 4, 22, 8, 11, 33, 21, 7, 2])
"""Ids of two captions, one that needs pads and one that fills all positions."""
EMPTY = [0, 2]
GUIDANCE = 16.0
POSITIONS, STRIDE = list(range(0, NUM_TOKENS, 17)), 128
"""Logits are stored of these image tokens and of every so-manieth code."""


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that follows from its name and keeps activations near unit size; no bias is 0, no gain is 1."""
    values: Tensor = uniform(name, shape)
    if name.endswith("bias"):
        return values / 2
    if len(shape) == 1:
        return 1 + values / 2
    return values if "embed" in name else values * math.sqrt(9 / shape[1])


def weights(part: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """State dict of the original's encoder or decoder."""
    return {name: weight(f"{part}.{name}", shape) for name, shape in shapes.items()}


def original(part: str, variant: str) -> nn.Module:
    """The encoder or the decoder of min-dalle."""
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder

    sizes = VARIANTS[variant]
    common = {**SHARED, "layer_count": sizes["layer_count"], "device": "cpu"}
    if part == "encoder":
        net = DalleBartEncoder(text_vocab_count=TEXT_VOCAB, text_token_count=TEXT_LENGTH, **common)
    else:
        net = DalleBartDecoder(image_vocab_count=sizes["image_vocab_count"], **common)
    net.load_state_dict(weights(part, {name: tuple(t.shape) for name, t in net.state_dict().items()}))
    return net.eval()


def layouts() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Names and shapes of the tensors of the published sizes, by size and part; of layers the first and the last."""
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder

    sizes = {"mini": (12, 1024, 16, 2730, 50264, 16384), "mega": (24, 2048, 32, 4096, 50272, 16415)}
    made: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name, (layers, width, heads, hidden, text, image) in sizes.items():
        common = {"embed_count": width, "attention_head_count": heads, "glu_embed_count": hidden, "device": "meta"}
        with torch.device("meta"):
            nets = {
                "encoder": DalleBartEncoder(text_vocab_count=text, text_token_count=64, layer_count=layers, **common),
                "decoder": DalleBartDecoder(image_vocab_count=image, layer_count=layers, **common),
            }
        middle = tuple(f"layers.{i}." for i in range(1, layers - 1))
        made[name] = {
            part: {key: list(t.shape) for key, t in net.state_dict().items() if not key.startswith(middle)}
            for part, net in nets.items()
        }
    return made


def given_codes() -> Tensor:
    """Codes of an image for either caption, (2, N)."""
    return ((uniform("codes", (len(CAPTIONS), NUM_TOKENS)) + 1) / 2 * NUM_CODES).long()


def numbers(variant: str) -> dict[str, Tensor]:
    """Logits without and with a caption for given codes, and the most likely codes under guidance."""
    encoder: Any = original("encoder", variant)
    decoder: Any = original("decoder", variant)
    sizes = VARIANTS[variant]
    made: dict[str, list[Tensor]] = {"text": [], "logits": [], "codes": []}
    for caption, codes in zip(CAPTIONS, given_codes(), strict=True):
        rows = [ids + [1] * (TEXT_LENGTH - len(ids)) for ids in (EMPTY, list(caption))]
        text = torch.tensor(rows)
        given = {"attention_mask": text.not_equal(1)[:, None, None, :], "encoder_state": encoder(text)}

        def empty_state() -> Tensor:
            return torch.zeros(sizes["layer_count"], 4, NUM_TOKENS, SHARED["embed_count"])

        previous = torch.cat([torch.tensor([sizes["start"]]), codes[:-1]])[None]
        complete = decoder(
            attention_state=empty_state(), prev_tokens=previous, token_index=torch.arange(256), **given
        )[0]
        state, steps = empty_state(), []
        for i in range(NUM_TOKENS):
            at = torch.tensor([i])
            one, state = decoder(attention_state=state, prev_tokens=previous[:, [i]], token_index=at, **given)
            steps.append(one)
        cached = torch.cat(steps, 1)
        assert (cached - complete).abs().max() < 1e-4  # of the original itself
        made["text"].append(text)
        made["logits"].append(cached[:, POSITIONS, :NUM_CODES:STRIDE])
        settings = torch.tensor([1.0, 1, GUIDANCE])  # temperature, top-k, supercondition factor
        tokens, state = torch.full((1, NUM_TOKENS + 1), sizes["start"]), empty_state()
        for i in range(NUM_TOKENS):
            at = torch.tensor([i])
            tokens[:, i + 1], state = decoder.sample_tokens(
                settings, attention_state=state, prev_tokens=tokens[:, [i]], token_index=at, **given
            )
        made["codes"].append(tokens[0, 1:])
    return {f"{variant}.{name}": torch.stack(tensors).contiguous() for name, tensors in made.items()}


# ---------------------------------------------------------------- captions

PLAIN = (
    "a painting of a cat with sunglasses in the frame",
    "court sketch of godzilla on trial",
    "a comfy chair that looks like an avocado",
    "the eiffel tower on the moon",
    "1234 cats and 7 dogs",
    "it's a cat that doesn't care",
)
"""Captions that all of the original encoders take alike."""
PROMPTS = (
    *PLAIN,
    "A LARGE Pink Elephant, Walking On The BEACH!",
    "a cat. a dog; (a bird) [a tree] {a lake}: what? = + ~ | \\",
    "well-known black-and-white photo, by John O'Neil",
    "'quoted' and \"double\" and `ticked` \u2018curly\u2019 \u201cdouble curly\u201d",
    "they'll we've you're I'm he'd don't rock'n'roll '90s",
    "3.14 or 1,000 or 1,234,567 or 1,1,234 or 12,34",
    "1/2/2020 and 24/7 and and/or",
    "a.b.c u.s.a. v1.2.3 file.txt",
    "50% off & 3$ * 2_000 #1 @home",
    "soooooo goooood!!!! VIII ----- ....",
    "see http://example.com/a?b=c now",
    "<b>bold</b> a < b > c",
    "[12] Some text [3]",
    "fish &amp; chips &quot;now&quot; &#39;hot&#39;",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m stra\u00dfe \u00d8resund \u0141\u00f3d\u017a \u0152uvre \u00e6on",
    "cafe\u0301 with a combining accent",
    "20\u00b0C for 5\u20ac or \u00a33 \u2013 one\u2014two\u2026 \u00bd cup",
    "\uff21 wide letter and the \ufb01 ligature",
    "a \U0001f34e on a table, \U0001f602",
    "\ttabs\nand  new lines   ",
    ",,, starts and ends with commas ,,",
    "a - b -- c",
    "",
    "   ",
    "...",
)
DIFFERENT = (
    "\u043a\u043e\u0442 on \u5317\u4eac street",
    "face \U0001f618",
    "\u00e2\u20ac\u0153broken\u00e2\u20ac\u009d encoding",
    "waving \U0001f44b\U0001f3fd",
)
"""Captions where our simpler tables give something else."""
PIECES = (
    "cat", "a", "b", "1", "2", "23", "456", ",", ".", "/", "-", "'", "s", "ll", '"', "`", " ", "  ", "#", " # ", "_",
    "[1]", "(", "&", "%", "$", "*", "<b>", "<", "http://x.y", "http", "!", "?", "it's", "u.s.a", "1,234", "12/3",
    "don't", "\u00e9", "\u2026", "\t", "\n", " and ", "aaaa", "VIII", "'re", ";", "=", "{", "}", "\\", "&amp;", "|",
    "\u201c", "\u2019", "\u2014", "\u2013",
)  # fmt: skip


def mixed(count: int) -> list[str]:
    """Captions of odd pieces in any order."""
    rng = random.Random(0)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14))) for _ in range(count)]


def normalizer(checkout: Path) -> Any:
    """The training code's rules, hashtags taken as one word: their splitting needs a list of words."""
    hub = ModuleType("huggingface_hub")
    hub.hf_hub_download = None  # type: ignore[attr-defined]
    sys.modules.setdefault("huggingface_hub", hub)
    warnings.simplefilter("ignore")  # escapes in its patterns
    spec = importlib.util.spec_from_file_location("text", checkout / "src/dalle_mini/model/text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TextNormalizer.__new__(module.TextNormalizer)
    made._hashtag_processor = lambda words: words
    return made


def captions(checkout: Path) -> dict[str, Any]:
    """What the original encoders make of captions."""
    from min_dalle.text_tokenizer import TextTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    normalize = normalizer(checkout)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    learned.train_from_iterator([normalize(text) for text in PROMPTS] * 2, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    min_dalle = TextTokenizer(model["vocab"], merges)
    return {
        "vocabulary": model["vocab"],
        "merges": merges,
        "simplified": {text: normalize(text) for text in (*PROMPTS, *mixed(200))},
        "different": {text: normalize(text) for text in DIFFERENT},
        "min_dalle": {text: min_dalle.tokenize(text) for text in PLAIN},
    }


@torch.no_grad()
def main(checkout: Path) -> None:
    """Writes the files."""
    bare_package("min_dalle")
    LAYOUTS.write_text(json.dumps(layouts(), separators=(",", ":")).replace('],"', '],\n"') + "\n")
    TEXT.write_text(json.dumps(captions(checkout), indent=0) + "\n")
    save_file({name: tensor for variant in VARIANTS for name, tensor in numbers(variant).items()}, FILE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
