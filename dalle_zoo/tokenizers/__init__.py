"""Text tokenizers: captions to ids and back.

| kind | class | vocabulary | dropout | preserves |
|---|---|---|---|---|
| `bpe` | `BPETokenizer` | trained; 16,384 by default | yes | lower case, single spaces |
| `byte` | `ByteTokenizer` | the 256 bytes of UTF-8 | no | everything |
| `clip` | `CLIPTokenizer` | CLIP's | no | lower case, single spaces, plain punctuation |
| `dalle_mini` | `DalleMiniTokenizer` | that of DALL-E mini or mega | no | lower-case ASCII, commas |
| `hf` | `HFTokenizer` | that of its Hugging Face folder | no | depends on the folder |

`CaptionEncoder` encodes batches of captions, with one learned padding token per position. To add a tokenizer,
write a module with a subclass of `TextTokenizer` that is registered in `TEXT_TOKENIZERS` under its
`kind`, and import it here.
"""

from __future__ import annotations

import inspect
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
    "fresh_text_tokenizer",
    "load_text_tokenizer",
]


def fresh_text_tokenizer(kind: str) -> TextTokenizer | None:
    """Builds a tokenizer that needs no training, such as ``byte``; None for other kinds and unknown names.

    Example:
        >>> fresh_text_tokenizer("byte").encode("a cat")
        [97, 32, 99, 97, 116]
    """
    cls = TEXT_TOKENIZERS.get(kind)
    if cls is None or any(p.default is p.empty for p in inspect.signature(cls).parameters.values()):
        return None
    return cls()


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Loads the tokenizer in a folder, of any kind.

    Args:
        folder: Folder that `TextTokenizer.save` wrote, or the folder of any Hugging Face tokenizer,
            which is loaded as `hf`.

    Returns:
        The tokenizer, an instance of the class that is registered for its kind.

    Raises:
        FileNotFoundError: The folder or its files are missing.
        ValueError: A file cannot be read, or its kind is not registered.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ByteTokenizer().save(folder)
        ...     load_text_tokenizer(folder).kind
        'byte'
    """
    return TEXT_TOKENIZERS[recorded_kind(folder) or HFTokenizer.kind].load(folder)
