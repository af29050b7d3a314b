"""Pickles modules as OpenAI's release has them, under the names of its package, which need not be installed.

    python released_modules.py FOLDER {zip,legacy}

writes FOLDER/first and FOLDER/second: a decoder and an encoder with the weights of tests/golden/openai_dvae.py.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_zoo.models.dvae import DVAE, DVAEConfig

GOLDEN = runpy.run_path(str(Path(__file__).parents[1] / "golden/openai_dvae.py"))


def module(home: str, name: str) -> nn.Module:
    """An empty module whose class pickle stores under the name of another package."""
    package = home.split(".")[0]
    sys.modules.setdefault(package, types.ModuleType(package))
    place = sys.modules.setdefault(home, types.ModuleType(home))
    if not hasattr(place, name):
        setattr(place, name, type(name, (nn.Module,), {"__module__": home}))
    made: nn.Module = getattr(place, name)()
    return made


def released(part: str, weights: dict[str, Tensor]) -> nn.Module:
    """A tree of modules with weights under their names."""
    tree: dict[str, Any] = {}
    for name, tensor in weights.items():
        node = tree
        *way, last = name.split(".")
        for step in way:
            node = node.setdefault(step, {})
        node[last] = tensor

    def build(node: dict[str, Any], name: str) -> nn.Module:
        if "w" in node:
            conv = module("dall_e.utils", "Conv2d")
            conv.w, conv.b = nn.Parameter(node["w"]), nn.Parameter(node["b"])
            conv.use_float16, conv.device = True, torch.device("cpu")
            return conv
        members = OrderedDict((step, build(below, step)) for step, below in node.items())
        if name.startswith("block_"):
            block = module(f"dall_e.{part}", f"{part.title()}Block")
            block.post_gain = 1 / 64
            for step, member in ({"id_path": nn.Identity()} | members).items():
                block.add_module(step, member)
            return block
        if name.startswith("group_"):
            members["pool" if part == "encoder" else "upsample"] = (
                nn.MaxPool2d(2) if part == "encoder" else nn.Upsample(2)
            )
        return nn.Sequential(members)

    complete = module(f"dall_e.{part}", part.title())
    complete.group_count, complete.vocab_size = 4, 512
    complete.add_module("blocks", build(tree["blocks"], "blocks"))
    return complete


def main(folder: Path, form: str) -> None:
    with torch.device("meta"):
        dvae = DVAE(DVAEConfig(width=64, decoder_stem=8, codebook_size=512))
    for name, part in (("first", "decoder"), ("second", "encoder")):
        shapes = {GOLDEN["released_name"](n): tuple(t.shape) for n, t in getattr(dvae, part).state_dict().items()}
        weights = {external: GOLDEN["weight"](f"{part}.{external}", shape) for external, shape in shapes.items()}
        torch.save(released(part, weights), folder / name, _use_new_zipfile_serialization=form == "zip")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
