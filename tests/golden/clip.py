"""Makes clip.json: what CLIP's text tokenizer, as DALLE-pytorch 1.6.6 has it, makes of captions.

    python -P tests/golden/clip.py

needs dalle-pytorch 1.6.6, installed with --no-deps, with ftfy 6.0.3, regex and tokenizers; other packages that its
module imports are stubs. CLIP's own list of merges is not stored; a small one was learned from the captions here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).with_suffix(".json")
NUM_MERGES = 300
HEADER = '"bpe_simple_vocab_16e6.txt#version: 0.2'

CAPTIONS = (
    "a painting of a cat with sunglasses in the frame",
    "A LARGE Pink Elephant Walking On The BEACH",
    "Eiffel tower on a desert.",
    "a photo of san francisco's golden gate bridge, in black-and-white tone!",
    "",
    "   ",
    "a",
    "!",
    "a  cat\twith\n\nsunglasses ",
    "cat, dog; (bird) [tree] {ocean} <sky>: 50% #1 @home a/b\\c",
    "they're here, we've won, I'm late, she'll see, he'd go, don't, o'clock, it's 'sup",
    "3d emoji, 1234567890 3.14 1,000 ½ ²",
    "Café naïve façade ÅNGSTRÖM",
    "cafe\u0301 with a combining accent",
    "İstanbul and the ẞ of STRASSE, ΟΔΟΣ",
    "北京的一只猫 a cat in 北京",
    "кошка в шляпе",
    "a 🐱 with 🕶️ and 👨‍👩‍👧",
    "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, em\u2003space",
    "“curly” \u2018quotes\u2019 „low‟ \u201aones\u201b \u02bcn",
    "dashes – — … ™ •",
    "the ﬁlm of an oﬃce, ĳs, ŉ, ǆ",
    "\uff26\uff35\uff2c\uff2c\u3000\uff57\uff49\uff44\uff54\uff48\uff01",
    "nul\u0000, bell\u0007, delete\u007f and \ufeffmark",
    "Tom &amp; Jerry &amp;amp; co &lt;3 &quot;quoted&quot; &#39;s &nbsp; &eacute;",
    "<b>Tom</b> &amp; Jerry",
    "spelled <|startoftext|> and <|endoftext|> and <|EndOfText|>",
    "under_score a</w>b",
    "supercalifragilisticexpialidocious " * 3,
)
"""Captions whose ids are stored."""


def merges() -> list[tuple[str, str]]:
    """A small list of merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    learned.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 2 * len(alphabet) + NUM_MERGES
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    learned.train_from_iterator(CAPTIONS, trainer)
    return [(first, second) for first, second in json.loads(learned.to_str())["model"]["merges"]]


def main() -> None:
    """Writes the file."""
    for name in ("youtokentome", "transformers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["transformers"].BertTokenizer = object  # type: ignore[attr-defined]
    package = importlib.util.find_spec("dalle_pytorch")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("dalle_pytorch_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    learned = merges()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join([HEADER, *(" ".join(pair) for pair in learned)]))
        file.flush()
        original = module.SimpleTokenizer(file.name)
    ids = {caption: original.encode(caption) for caption in CAPTIONS}
    content = {"merges": [" ".join(pair) for pair in learned], "ids": ids}
    FILE.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("],", "],\n") + "\n")


if __name__ == "__main__":
    main()
