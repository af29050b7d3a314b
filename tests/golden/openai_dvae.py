"""Makes openai_dvae.safetensors: what PyPI's DALL-E 0.1 computes with weights that a formula gives.

    python tests/golden/openai_dvae.py

needs the packages of tests/requirements-parity.txt. The weights are not stored: they follow from their names.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".safetensors")
SIZES = {"encoder": {"n_hid": 64, "vocab_size": 512}, "decoder": {"n_hid": 64, "n_init": 8, "vocab_size": 512}}
"""The smallest twins that the package lets one build."""


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that follow from a name; NumPy promises the raw stream for all its versions."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    values = (raw >> np.uint64(11)) * 2.0**-52 - 1
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight with the variance of the released initialization, or a bias (there 0, but here it must count)."""
    fan_in = math.prod(shape[1:])
    return uniform(name, shape) * (math.sqrt(3 / fan_in) if len(shape) > 1 else 0.5)


def released_name(native: str) -> str:
    """Name in the released modules of a native tensor: groups.group_1.block_1.conv_2.weight and the like."""
    name, kind = native.rsplit(".", 1)
    name = name.removeprefix("groups.").replace("skip", "id_path")
    name = re.sub(r"(conv_\d)", r"res_path.\1", name)
    name = "output.conv" if name == "output" else name
    return f"blocks.{name}.{kind[0]}"


def fill(net: nn.Module, part: str) -> None:
    """Gives a released network ("encoder" or "decoder") its weights."""
    net.load_state_dict({name: weight(f"{part}.{name}", tuple(t.shape)) for name, t in net.state_dict().items()})


def fill_native(net: nn.Module, part: str) -> None:
    """Gives a native network the same weights."""
    named = {name: (released_name(name), tuple(tensor.shape)) for name, tensor in net.state_dict().items()}
    net.load_state_dict({name: weight(f"{part}.{external}", shape) for name, (external, shape) in named.items()})


def main() -> None:
    """Writes the file."""
    import dall_e

    encoder, decoder = dall_e.Encoder(**SIZES["encoder"]), dall_e.Decoder(**SIZES["decoder"])
    fill(encoder, "encoder")
    fill(decoder, "decoder")
    images = (uniform("images", (2, 3, 32, 24)) + 1) / 2
    cells = torch.softmax(4 * uniform("cells", (1, 512, 3, 2)), dim=1)
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        codes = logits.argmax(1)
        one_hot = nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
        hard, soft = decoder(one_hot), decoder(cells)
        pixels = dall_e.unmap_pixels(torch.sigmoid(hard[:, :3]))
    outputs = {"logits": logits, "codes": codes, "hard": hard, "soft": soft, "pixels": pixels}
    save_file({"images": images, "cells": cells} | {k: v.contiguous() for k, v in outputs.items()}, FILE)


if __name__ == "__main__":
    main()
