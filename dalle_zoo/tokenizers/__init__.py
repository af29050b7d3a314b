"""Text tokenizers: captions to ids and back.

| kind | class | vocabulary | dropout | keeps |
|---|---|---|---|---|
| `bpe` | `BPETokenizer` | trained; 16,384 by default | yes | lower case, single spaces |
| `byte` | `ByteTokenizer` | the 256 bytes of UTF-8 | no | everything |
| `clip` | `CLIPTokenizer` | CLIP's | no | lower case, single spaces, plain signs |
| `dalle_mini` | `DalleMiniTokenizer` | that of DALL-E mini or mega | no | lower-case ASCII, commas |
| `hf` | `HFTokenizer` | of the Hugging Face folder it was opened from | no | what that one keeps |

`CaptionEncoder` makes batches of them, with one learned padding token per position. To add one: a
file with a subclass of `TextTokenizer` registered in `TEXT_TOKENIZERS` under its `kind`, and an
import line here.
"""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.tokenizers.base import TEXT_TOKENIZERS, TextTokenizer, recorded_kind
from dalle_zoo.tokenizers.bpe import BPETokenizer
from dalle_zoo.tokenizers.byte import ByteTokenizer
from dalle_zoo.tokenizers.captions import CaptionEncoder
from dalle_zoo.tokenizers.clip import CLIPTokenizer
from dalle_zoo.tokenizers.dalle_mini import DalleMiniTokenizer
from dalle_zoo.tokenizers.hf import HFTokenizer

__all__ = [
    "TEXT_TOKENIZERS",
    "BPETokenizer",
    "ByteTokenizer",
    "CLIPTokenizer",
    "CaptionEncoder",
    "DalleMiniTokenizer",
    "HFTokenizer",
    "TextTokenizer",
    "load_text_tokenizer",
]


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Opens the tokenizer of a folder, whichever kind it is.

    Args:
        folder: What `TextTokenizer.save` wrote, or any folder of a Hugging Face tokenizer, which
            opens as `hf`.

    Returns:
        The tokenizer, of the class registered for its kind.

    Raises:
        FileNotFoundError: The folder or its files are missing.
        ValueError: A file can't be read, or its kind is not registered.
    """
    return TEXT_TOKENIZERS[recorded_kind(folder) or HFTokenizer.kind].load(folder)
