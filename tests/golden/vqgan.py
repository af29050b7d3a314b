"""Makes vqgan_*.safetensors and vqgan_layouts.json: what released code of VQGANs computes, and how it names tensors.

    python tests/golden/vqgan.py

needs, installed with --no-deps, taming-transformers-rom1504 0.0.6, rudalle 1.1.3 and min-dalle 0.4.11, and what they
import here: pytorch-lightning, einops, omegaconf and PyWavelets. The weights are not stored: they follow from their
names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

uniform = runpy.run_path(str(Path(__file__).with_name("openai_dvae.py")))["uniform"]

FOLDER = Path(__file__).parent
LAYOUTS = FOLDER / "vqgan_layouts.json"
FILES = {name: FOLDER / f"vqgan_{name}.safetensors" for name in ("nearest", "gumbel", "wavelet", "detokenizer")}
COLORS = {"in_channels": 3, "out_ch": 3, "double_z": False, "dropout": 0.0}
DDCONFIG = {**COLORS, "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16}
"""Architecture of the small twins, by the original's names; attention is at the middle level."""
NEAREST = {"ddconfig": {**DDCONFIG, "z_channels": 24}, "embed_dim": 16, "n_embed": 48}
GUMBEL = {"ddconfig": {**DDCONFIG, "z_channels": 16}, "embed_dim": 16, "n_embed": 48}
F16 = {**COLORS, "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16]}
F8 = {**F16, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
RELEASED: dict[str, dict[str, Any]] = {
    "f16-16384": {"ddconfig": {**F16, "resolution": 256, "z_channels": 256}, "embed_dim": 256, "n_embed": 16384},
    "gumbel-f8-8192": {"ddconfig": {**F8, "resolution": 256, "z_channels": 256}, "embed_dim": 256, "n_embed": 8192},
}
"""What the published configurations say."""
STRIDE = 4
"""Of the detokenizer's image only each fourth pixel is stored; the package has one size."""


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that follows from its name and keeps activations near unit size; no bias is 0, no scale is 1."""
    values: Tensor = uniform(name, shape)
    if name.endswith("bias"):
        return values / 2
    if len(shape) == 1:
        return 1 + values / 2
    return values if len(shape) == 2 else values * math.sqrt(3 / math.prod(shape[1:]))


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def fill(net: nn.Module) -> None:
    """Gives a network its weights; the fixed filters of ruDALL-E's wavelet stay."""
    state = net.state_dict()
    made = weights({name: tuple(t.shape) for name, t in state.items() if ".idwt." not in name})
    net.load_state_dict(state | made)


def bare_package(name: str, **stubs: ModuleType) -> None:
    """Lets modules of a package be imported without its ``__init__``, which asks for what is not used here."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    for stub, module in stubs.items():
        sys.modules[f"{name}.{stub}"] = module


def original(kind: str, options: dict[str, Any]) -> nn.Module:
    """A network of the released code: "VQModel", "GumbelVQ", or ruDALL-E's with or without its wavelet."""
    from omegaconf import OmegaConf

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the shape of its vectors
        if kind in ("rudalle", "rudalle-wavelet"):
            from rudalle.vae.model import VQGanGumbelVAE

            config = OmegaConf.create({"model": {"params": {**options, "kl_weight": 1e-8}}})
            net: nn.Module = VQGanGumbelVAE(config, dwt=kind == "rudalle-wavelet")
        else:
            import taming.models.vqgan

            config = OmegaConf.create(options)
            extra = {"temperature_scheduler_config": None} if kind == "GumbelVQ" else {}
            net = getattr(taming.models.vqgan, kind)(lossconfig=None, **config, **extra)
    return net.eval()


def nearest() -> dict[str, Tensor]:
    """Taming's VQModel on images that are not square."""
    net: Any = original("VQModel", NEAREST)
    fill(net)
    images = (uniform("images", (2, 3, 16, 24)) + 1) / 2
    vectors = net.quant_conv(net.encoder(2 * images - 1))
    codes = net.quantize(vectors)[2][2].view(2, 4, 6)
    entries = net.quantize.get_codebook_entry(codes.flatten(), (2, 4, 6, 16))
    return {"images": images, "vectors": vectors, "codes": codes, "pixels": net.decode(entries)}


def gumbel() -> dict[str, Tensor]:
    """Taming's GumbelVQ without the noise that it adds when it encodes."""
    net: Any = original("GumbelVQ", GUMBEL)
    fill(net)
    images = (uniform("images", (2, 3, 16, 24)) + 1) / 2
    vectors = net.quant_conv(net.encoder(2 * images - 1))
    codes = net.quantize.proj(vectors).argmax(1)
    entries = net.quantize.get_codebook_entry(codes.flatten(), (2, 4, 6, 16))
    return {"images": images, "vectors": vectors, "codes": codes, "pixels": net.decode(entries)}


def wavelet() -> dict[str, Tensor]:
    """ruDALL-E's decoder of twice the size; its pixels are already in [0, 1]."""
    net: Any = original("rudalle-wavelet", GUMBEL)
    fill(net)
    images = (uniform("images", (2, 3, 16, 16)) + 1) / 2
    codes = net.get_codebook_indices(images, disable_gumbel_softmax=True)
    return {"images": images, "codes": codes.view(2, 4, 4), "pixels": net.decode(codes)}


def detokenizer() -> dict[str, Tensor]:
    """min-dalle's decoder, with the epsilon of the code that its weights were trained with (the package has 1e-5)."""
    from min_dalle.models.vqgan_detokenizer import VQGanDetokenizer

    net = VQGanDetokenizer().eval()
    fill(net)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    codes = (uniform("codes", (1, 256)) * 8192 + 8192).long()
    pixels = net(False, codes).permute(2, 0, 1)[None] / 255
    return {"codes": codes.view(1, 16, 16), "pixels": pixels[..., ::STRIDE, ::STRIDE]}


def layouts() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the tensors of the published sizes."""
    from min_dalle.models.vqgan_detokenizer import VQGanDetokenizer

    with torch.device("meta"):
        nets = {
            "f16-16384": original("VQModel", RELEASED["f16-16384"]),
            "gumbel-f8-8192": original("GumbelVQ", RELEASED["gumbel-f8-8192"]),
            "rudalle": original("rudalle", RELEASED["gumbel-f8-8192"]),
            "rudalle-wavelet": original("rudalle-wavelet", RELEASED["gumbel-f8-8192"]),
            "min-dalle": VQGanDetokenizer(),
        }
    return {kind: {name: list(t.shape) for name, t in net.state_dict().items()} for kind, net in nets.items()}


@torch.no_grad()
def main() -> None:
    """Writes the files."""
    training = ModuleType("taming.main")
    training.instantiate_from_config = lambda config: nn.Identity()  # type: ignore[attr-defined]  # the loss
    bare_package("taming", main=training)
    bare_package("rudalle")
    bare_package("rudalle.vae")
    bare_package("min_dalle")
    bare_package("min_dalle.models")
    for name, make in {"nearest": nearest, "gumbel": gumbel, "wavelet": wavelet, "detokenizer": detokenizer}.items():
        save_file({key: tensor.contiguous() for key, tensor in make().items()}, FILES[name])
    LAYOUTS.write_text(json.dumps(layouts(), separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
