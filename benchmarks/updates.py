"""Times updates of the recipe `prior/composition-8x8` against a plain network and DALLE-pytorch 1.6.6.

    python benchmarks/updates.py --threads 1

An update is forward and backward pass of a batch of the recipe, clipping, and AdamW, in float32 and with autocast to
bfloat16. The plain network is the usual way to write it: pre-LN blocks, fused causal attention in every layer, and
the text loss and the image loss each from all of their logits. It has the weights of the recipe's network, and equals
it if that has the mask `full` in every layer.

DALLE-pytorch has the same width, layers, heads, positions, vocabularies and kinds of attention; its MLP has a gate,
and one head has both vocabularies. It is not among the requirements of the tests. Without it, its rows are left out:

    pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding==0.2.1 einops g-mlp-pytorch==0.1.5 \\
        omegaconf rotary-embedding-torch==0.1.5
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from decoding import FLOAT32, keep_freed_memory, make_prior
from harness import ROUNDS, Equality, Row, interleaved, store
from torch import Tensor, nn
from torch.nn import functional as F
from training import make_tokens

from dalle_zoo.masks import layer_masks
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.recipes import find_recipe, read_recipe
from dalle_zoo.training.optimizer import AdamWConfig, decayed_names, make_optimizer

ROOT = Path(__file__).parents[1]
RECIPE = read_recipe(find_recipe("prior/composition-8x8"))
GIVEN = RECIPE["model"]["init_args"]
CONFIG = PriorConfig(**GIVEN["config"])
BATCH = int(RECIPE["data"]["init_args"]["batch_size"])
ADAMW = AdamWConfig(beta2=0.96, weight_decay=4.5e-2, variance_clip=5.0)
"""That of `PriorModule`, which the recipe leaves as it is."""
KINDS = {"row": "axial_row", "column": "axial_col", "conv": "conv_like"}
"""Kinds of attention of DALLE-pytorch, by the names of masks."""
NATIVE, PLAIN, ORIGINAL = "prior/composition-8x8", "the same network, plain, causal SDPA", "DALLE-pytorch 1.6.6"
NOTES = {
    PLAIN: "the optimizer of the recipe clips the variance, as in the paper, and its masks are sparse, which saves "
    "nothing at this length",
    ORIGINAL: "another network of the same shape, with PyTorch's AdamW: the losses are not comparable",
}
ROUNDING = 1e-5
"""Largest relative difference of float32 losses."""
HALF_ROUNDING = 1e-2
"""The same in bfloat16, with 8 bits."""


class PlainPrior(nn.Module):
    """The network of a prior in plain code; parameters are those of the prior, under the same names."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        for name, module in prior.named_children():
            self.add_module(name, module)
        self.start_of_text, self.start_of_image = prior.start_of_text, prior.start_of_image
        self.config = prior.config

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """Returns the loss of text (B, T) and codes (B, h, w)."""
        c, net, flat = self.config, self, codes.flatten(1)
        batch = len(text)
        words: Any = net.text_embedding(text[:, :-1])
        x_text = torch.cat([net.start_of_text.expand(batch, 1, -1), words], 1) + net.text_position.weight
        cells = net.row_position.weight[:, None] + net.column_position.weight
        shown = torch.cat([net.start_of_image.expand(batch, 1, -1), net.image_embedding(flat[:, :-1])], 1)
        x = torch.cat([x_text, shown + cells.flatten(0, 1)], 1)
        for layer in net.layers:
            x = x + self._attention(layer.attention, layer.attention_norm(x))
            x = x + layer.mlp.output(F.gelu(layer.mlp.hidden(layer.mlp_norm(x))))
        x = net.final_norm(x)
        of_text = F.cross_entropy(net.text_head(x[:, : c.text_length]).flatten(0, 1).float(), text.flatten())
        of_image = F.cross_entropy(net.image_head(x[:, c.text_length :]).flatten(0, 1).float(), flat.flatten())
        return c.text_loss_weight * of_text + (1 - c.text_loss_weight) * of_image

    def _attention(self, attention: Any, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attention.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def dalle_pytorch(depth: int = CONFIG.num_layers) -> nn.Module:
    """Returns DALLE-pytorch's network of the recipe's shape, or of another number of layers."""
    runpy.run_path(str(ROOT / "tests/golden/dalle_pytorch.py"))["stubs"]()
    from dalle_pytorch import DALLE, DiscreteVAE

    c = CONFIG
    vae = DiscreteVAE(image_size=4 * c.image_width, num_layers=2, num_tokens=c.codebook_size, hidden_dim=8)
    return DALLE(  # type: ignore[no-any-return]
        dim=c.width, vae=vae, num_text_tokens=c.text_vocab, text_seq_len=c.text_length, depth=depth,
        heads=c.num_heads, dim_head=c.width // c.num_heads, rotary_emb=False, shift_tokens=False,
        attn_types=tuple(KINDS[spec.partition("(")[0]] for spec in layer_masks(c.masks, c.num_layers))[:depth],
    )  # fmt: skip


def updater(net: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a function that makes an update at a rate of 0, so that weights stay comparable."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    if isinstance(net, Prior):
        optimizer = make_optimizer(net, ADAMW, 0.0, decayed_names(net))
    else:
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def update() -> Tensor:
        optimizer.zero_grad()
        with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value.detach()

    return update


def rows(dtype: torch.dtype, rounds: int) -> list[Row]:
    """Times all paths in turn, and returns a row for each that the recipe's network is compared with."""
    text, codes = make_tokens(CONFIG, BATCH)
    native = make_prior(CONFIG, FLOAT32, backend=GIVEN.get("attention", "auto"))
    full = make_prior(replace(CONFIG, masks="full"), FLOAT32, backend=GIVEN.get("attention", "auto"))
    plain = PlainPrior(make_prior(CONFIG, FLOAT32, backend=GIVEN.get("attention", "auto")))
    paths = {
        NATIVE: updater(native, lambda: native.loss(text, codes).total, dtype),
        PLAIN: updater(plain, lambda: plain(text, codes), dtype),
    }
    expected = updater(full, lambda: full.loss(text, codes).total, dtype)()
    apart = float((paths[PLAIN]() - expected).abs() / expected)
    same = Equality(
        what="relative difference of the loss from the recipe's with the mask full",
        value=apart,
        limit=ROUNDING if dtype == torch.float32 else HALF_ROUNDING,
    )
    checks = {PLAIN: (same,), ORIGINAL: ()}
    if find_spec("dalle_pytorch") is not None:
        other = dalle_pytorch()
        paths[ORIGINAL] = updater(other, lambda: other(text, codes.flatten(1), return_loss=True), dtype)
    seconds = interleaved(paths, rounds)
    return [row(name, seconds, checks[name], dtype) for name in paths if name != NATIVE]


def row(against: str, seconds: dict[str, list[float]], equal: tuple[Equality, ...], dtype: torch.dtype) -> Row:
    """Makes a row of measured times, and prints it."""
    middle = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    made = Row(
        name=f"update of prior/composition-8x8, {BATCH} x {CONFIG.layout.length} positions",
        path=NATIVE,
        against=against,
        target=None,
        ratio=middle[against] / middle[NATIVE],
        equal=equal,
        seconds={name: seconds[name] for name in (NATIVE, against)},
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        note=NOTES[against],
        extra={
            "updates per second": {name: 1 / middle[name] for name in (NATIVE, against)},
            "bfloat16 in hardware": torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported(),
            "optimizer": asdict(ADAMW),
        },
    )
    print(f"{made.dtype}: {1 / middle[NATIVE]:.2f} updates/s, {made.ratio:.2f}x of {against}", flush=True)
    return made


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Time of complete updates of prior/composition-8x8.")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed updates of each path ({ROUNDS})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found = [row for dtype in (torch.float32, torch.bfloat16) for row in rows(dtype, options.rounds)]
    print(store("updates", f"python benchmarks/updates.py --threads {options.threads}", found))


if __name__ == "__main__":
    main()
