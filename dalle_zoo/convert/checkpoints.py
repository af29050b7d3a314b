"""Files of tensors, opened without running anything: torch's two formats, safetensors and Flax's.

Opening a file reads its table of contents alone.
"""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.convert.flax_files import is_mapping, open_flax
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.safetensors_files import open_safetensors
from dalle_zoo.convert.stored import Checkpoint, Storage, StoredTensor
from dalle_zoo.convert.torch_files import PICKLE, ZIP, open_legacy, open_zip

__all__ = ["Checkpoint", "Storage", "StoredTensor", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file of weights; no tensor is read, and nothing that the file asks for is run.

    Args:
        path: The file. Its ending does not matter.

    Raises:
        UnrelatedFileError: It is none of the formats.
        WeightFileError: It is damaged, or asks for more than weights need.
        FileNotFoundError: It is missing.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(ZIP):
                opened = open_zip(path, file)
            elif start[8:] == b"{":  # behind the length of a header, whose first byte may be any
                opened = open_safetensors(path, file)
            elif start.startswith(PICKLE):
                opened = open_legacy(path, file)
            elif is_mapping(start):
                opened = open_flax(path, file)
            else:
                raise UnrelatedFileError("it begins like no file of torch, of safetensors or of Flax")
            _ = opened.tensors  # which checks them
            return opened
    except WeightFileError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path} is not opened: {text}") from None
