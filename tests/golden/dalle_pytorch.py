"""Makes dalle_pytorch_VERSION.safetensors and dalle_pytorch_layouts.json: what a version of DALLE-pytorch computes.

    python -P tests/golden/dalle_pytorch.py

Run it once in an environment of every version in `CASES`, each installed with --no-deps, with einops, omegaconf,
axial-positional-embedding 0.2.1, rotary-embedding-torch 0.1.5 and g-mlp-pytorch 0.1.5 (0.0.14 with version 0.12.0 and
0.0.18 with 0.14.3, which named tensors in other ways). Packages that are imported but not needed here are stubs. The
weights are not stored: they follow from their names.

Block-sparse attention is a stub as well, for DeepSpeed's kernels need a GPU of their time: `SparseSelfAttention` does
the same in dense matrices.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

uniform = runpy.run_path(str(Path(__file__).with_name("openai_dvae.py")))["uniform"]

FOLDER = Path(__file__).parent
LAYOUTS = FOLDER / "dalle_pytorch_layouts.json"
VAE: dict[str, Any] = {
    "image_size": 16, "num_layers": 1, "num_tokens": 9, "codebook_dim": 6, "hidden_dim": 8, "num_resnet_blocks": 0,
}  # fmt: skip
"""The image tokenizer, of 8 x 8 codes: a neighborhood of five cells does not fill the grid."""
VAES = {"plain": VAE, "residual": {**VAE, "num_layers": 2, "num_resnet_blocks": 2}}
SIZES: dict[str, Any] = {
    "num_text_tokens": 11, "text_seq_len": 5, "dim": 20, "depth": 4, "heads": 3, "dim_head": 8,
}  # fmt: skip
"""Of every prior; the heads together are wider than the model."""
ALL = {"attn_types": ("full", "axial_row", "axial_col", "conv_like")}
SHARED = {"shared_attn_ids": ("a", "b", "a"), "shared_ff_ids": (0, 1), "attn_types": ("full", "axial_row", "full")}
MLP = {"attn_types": ("mlp", "full", "mlp", "axial_col")}
SPARSE = {"attn_types": ("full", "sparse", "axial_row", "sparse"), "text_seq_len": 16}
"""Of 80 positions, five blocks."""
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "0.5.1": {"mixed": ALL},
    "0.6.0": {"mixed": ALL},
    "0.7.3": {"mixed": ALL, "full": {"reversible": True}, "sparse": SPARSE},
    "0.9.6": {"mixed": ALL},
    "0.12.0": {"mlp": {"attn_types": "mlp"}},
    "0.14.3": {"mixed": ALL, "full": {"reversible": True, "stable": True}, "mlp": MLP},
    "1.0.1": {"mlp": {**MLP, "reversible": True, "shift_tokens": True}},
    "1.0.3": {"full": {"shift_tokens": True, "rotary_emb": True}},
    "1.1.8": {
        "mixed": {**ALL, "sandwich_norm": True},
        "bare": {**ALL, "shift_tokens": False, "rotary_emb": False},
        "sparse": {**SPARSE, "rotary_emb": True},
    },
    "1.4.2": {
        "mixed": ALL,
        "shared": {**SHARED, "share_input_output_emb": True},
    },
    "1.6.6": {
        "mixed": ALL,
        "bare": {**ALL, "shift_tokens": False, "rotary_emb": False},
        "reversible": {**SHARED, "reversible": True, "stable": True, "sandwich_norm": True},
        "axial": {**ALL, "rotary_emb": False, "share_input_output_emb": True},
    },
}
"""Options of `DALLE` other than the sizes, by version and name; what is left out has the version's default."""
TEXT = torch.tensor([[3, 7, 1, 0, 0], [4, 10, 0, 2, 6], [0, 0, 0, 0, 0]])
"""Captions as the tokenizers give them: 0 is padding, also inside a caption, where it was a token."""


def captions(options: dict[str, Any]) -> Tensor:
    """`TEXT` in the length of a case."""
    return F.pad(TEXT, (0, options.get("text_seq_len", SIZES["text_seq_len"]) - TEXT.shape[1]))


def file_of(version: str) -> Path:
    """Where the outputs of a version are."""
    return FOLDER / f"dalle_pytorch_{version}.safetensors"


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that follows from its name and keeps activations near unit size; no bias is 0, no scale is 1."""
    values: Tensor = uniform(name, shape)
    if name.endswith("bias"):
        return values / 2
    if name.endswith("scale"):
        return (2 + values) / 4
    if shape == (1,):  # over the length, not the root mean square
        return 4 + values
    if len(shape) == 1:
        return 1 + values / 2
    if "_emb." in name or "codebook" in name:
        return values
    return values * math.sqrt(3 / math.prod(shape[1:]))


def state_dict(layout: dict[str, Any], angles: Tensor | None) -> dict[str, Tensor]:
    """A state dict of the original, in which tensors that are one are one object.

    Args:
        layout: Of a case: "shapes" of names, and of further names of a tensor its first one in "same".
        angles: The table of rotations, which the original computes.
    """
    state = {name: weight(name, tuple(shape)) for name, shape in layout["shapes"].items()}
    if angles is not None:
        state["transformer.pos_emb"] = angles
    for name, first in layout["same"].items():
        state[name] = state[first]
    for name, layout_of_blocks in state.items():
        if name.endswith("master_layout"):  # of the first head for all, and every block reads itself
            blocks = layout_of_blocks[:1] + 2 * torch.eye(layout_of_blocks.shape[1])
            state[name] = (blocks > 0).long().expand(layout_of_blocks.shape).clone()
    if "logits_mask" in state:
        state["logits_mask"] = state["logits_mask"] > 0
    return state


def layout_of(net: nn.Module) -> dict[str, Any]:
    """Names and shapes of the tensors of a network, those apart that are one."""
    seen: dict[int, str] = {}
    shapes, same = {}, {}
    for name, tensor in net.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name)
        if first == name:
            shapes[name] = list(tensor.shape)
        else:
            same[name] = first
    return {"shapes": shapes, "same": same}


class SparseSelfAttention(nn.Module):
    """Twin of DeepSpeed's 0.3 to 0.16 in dense matrices, of the same buffer.

    As there, the layout of a length is looked up in one table for all layers, so that it is that of the layer which
    came first; and the values of the padding mask, 1 or 0, are added to the scores.
    """

    layouts: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, sparsity_config: SimpleNamespace, max_seq_length: int, attn_mask_mode: str) -> None:
        super().__init__()
        assert (sparsity_config.block, attn_mask_mode) == (16, "add")
        blocks = max_seq_length // 16
        layout = torch.ones(sparsity_config.num_heads, blocks, blocks, dtype=torch.long)  # which `fill` replaces
        self.register_buffer("master_layout", layout)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, key_padding_mask: Tensor
    ) -> Tensor:
        length, size = query.shape[2:]
        layout = self.layouts.setdefault(length, self.master_layout[:, : length // 16, : length // 16])
        scores = torch.einsum("b h i d, b h j d -> b h i j", query, key) * size**-0.5
        scores = scores + key_padding_mask.to(query)[:, None, None] + attn_mask
        scores = scores.masked_fill(torch.kron(layout, torch.ones(16, 16)) == 0, -math.inf)
        return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), value)


def stubs() -> None:
    """Stands in for packages that are imported for other image and text tokenizers."""
    members = {
        "taming": (), "taming.models": (), "taming.models.vqgan": ("VQModel", "GumbelVQ"), "youtokentome": (),
        "ftfy": (), "regex": (), "requests": (), "tqdm": ("tqdm",), "transformers": ("BertTokenizer",),
        "pkg_resources": ("get_distribution",),
    }  # fmt: skip
    for name, attributes in members.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (nn.Module,), {}))
        sys.modules[name] = module
    sys.modules["regex"].compile = lambda *_: None  # type: ignore[attr-defined]
    sys.modules["regex"].IGNORECASE = 0  # type: ignore[attr-defined]
    sys.modules["deepspeed.ops.sparse_attention"] = ModuleType("deepspeed.ops.sparse_attention")
    vars(sys.modules["deepspeed.ops.sparse_attention"]).update(
        SparseSelfAttention=SparseSelfAttention, VariableSparsityConfig=SimpleNamespace
    )
    version = type("Distribution", (), {"version": "0"})
    sys.modules["pkg_resources"].get_distribution = lambda _: version  # type: ignore[attr-defined]


def fill(net: nn.Module) -> dict[str, Any]:
    """Gives a network its weights and returns its layout; what it computes itself stays."""
    layout = layout_of(net)
    computed = {n: t for n, t in net.state_dict().items() if n in ("transformer.pos_emb", "logits_mask")}
    net.load_state_dict(state_dict(layout, None) | computed)
    return layout


def prior(options: dict[str, Any], version: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs and layout of a case."""
    from dalle_pytorch import DALLE, DiscreteVAE

    SparseSelfAttention.layouts.clear()
    sizes, text = {**SIZES, **options}, captions(options)
    net = DALLE(vae=DiscreteVAE(**VAE), **sizes).eval()
    layout = fill(net)
    cells = (VAE["image_size"] // 2 ** VAE["num_layers"]) ** 2
    codes = ((uniform("codes", (len(TEXT), cells)) + 1) / 2 * VAE["num_tokens"]).long()
    length, columns = sizes["text_seq_len"], VAE["num_tokens"]
    masked = {"mask": text != 0} if int(version.split(".")[1]) < 9 and version[0] == "0" else {}
    logits = net(text.clone(), codes, **masked)
    outputs = {"codes": codes, "text_logits": logits[:, :length, :-columns], "logits": logits[:, length:, -columns:]}
    sampled: list[Tensor] = []
    net.vae.decode = lambda tokens: sampled.append(tokens)
    net.generate_images(text.clone(), filter_thres=0.9999, **masked)
    outputs["greedy"] = sampled[0]
    if int(version.split(".")[1]) >= 4 and version[0] == "1":
        # Without this option the original keeps the inputs of all axial and convolutional layers in one place.
        net = DALLE(vae=DiscreteVAE(**VAE), **sizes, optimize_for_inference=True).eval()
        fill(net)
        cache: dict[str, Any] = {}
        steps = [net(text.clone(), codes[:, :i], cache=cache)[:, -1, -columns:] for i in range(cells)]
        outputs["cached"] = torch.stack(steps, 1)
    if "transformer.pos_emb" in net.state_dict():
        outputs["angles"] = net.transformer.pos_emb
    return outputs, layout


def image_tokenizer(hparams: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs and layout of an image tokenizer; its pixels are those that it was trained to give."""
    from dalle_pytorch import DiscreteVAE

    net = DiscreteVAE(**hparams).eval()
    layout = fill(net)
    images = (uniform("images", (2, 3, hparams["image_size"], hparams["image_size"])) + 1) / 2
    codes = net.get_codebook_indices(images)
    return {"images": images, "codes": codes, "pixels": net.decode(codes)}, layout


@torch.no_grad()
def main() -> None:
    """Writes the file of the version that is installed, and its part of the layouts."""
    stubs()
    version = importlib.metadata.version("dalle-pytorch")
    layouts = json.loads(LAYOUTS.read_text()) if LAYOUTS.exists() else {}
    outputs = {}
    for name, options in CASES[version].items():
        made, layouts[f"{version} {name}"] = prior(options, version)
        outputs |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    if version == max(CASES, key=lambda text: [int(part) for part in text.split(".")]):
        for name, hparams in VAES.items():
            made, layouts[f"vae {name}"] = image_tokenizer(hparams)
            outputs |= {f"vae {name}.{key}": tensor for key, tensor in made.items()}
    save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, file_of(version))
    LAYOUTS.write_text(json.dumps(layouts, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
