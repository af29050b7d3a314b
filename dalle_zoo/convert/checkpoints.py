"""Opens weight files without running code: both formats of torch, safetensors, and Flax.

Opening a file reads only its table of contents.
"""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.convert.flax_files import is_mapping, open_flax
from dalle_zoo.convert.pickles import UnrelatedFileError, WeightFileError
from dalle_zoo.convert.safetensors_files import open_safetensors
from dalle_zoo.convert.stored import Checkpoint
from dalle_zoo.convert.torch_files import PICKLE, ZIP, open_legacy, open_zip
from dalle_zoo.model_folder import substitute_hint


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a weight file; no tensor is read, and no code in the file is run.

    Args:
        path: The file. Its extension does not matter.

    Raises:
        UnrelatedFileError: The file has none of the formats.
        WeightFileError: The file is damaged, or a pickle in it does more than weights need.
        FileNotFoundError: The file does not exist.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"weight": torch.ones(2, 3)}, path := Path(folder, "net.pt"))
        ...     open_checkpoint(path).summary()
        'a file of torch with 1 tensors (weight [2, 3], ...)'
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(ZIP):
                opened = open_zip(path, file)
            elif start[8:] == b"{":  # after the length of the header, whose first byte may have any value
                opened = open_safetensors(path, file)
            elif start.startswith(PICKLE):
                opened = open_legacy(path, file)
            elif is_mapping(start):
                opened = open_flax(path, file)
            else:
                raise UnrelatedFileError(f"it is not a file of torch, safetensors or Flax{substitute_hint(path)}")
            _ = opened.tensors  # checks names and nesting
            return opened
    except WeightFileError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path} cannot be opened: {text}") from None
