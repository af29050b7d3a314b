"""Compares the dVAE at OpenAI's size with the package published with its weights: time, and equality of the codes.

    python benchmarks/dvae.py --threads 1        writes benchmarks/results/speed/dvae_cpu1.json

Both networks have the same random weights. PyPI's DALL-E 0.1 is not a dependency (``pip install --no-deps
DALL-E==0.1``, see tests/requirements-parity.txt); without it, the baseline is the modules of dalle-zoo called as that
package calls its own: `F.conv2d` and `F.relu` on channels-first float32, all logits, one-hot cells. Codes of random
networks hardly vary, so the bias of the logits is set to make every code equally likely on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.harness import Equality, Row, ceilings, compare, store  # noqa: E402 (a checkout runs uninstalled)
from dalle_zoo.data import center_transform, decode_image, open_source  # noqa: E402
from dalle_zoo.models.dvae import DVAE, DVAEConfig  # noqa: E402
from dalle_zoo.pipeline import load_model  # noqa: E402

PAPER = DVAEConfig()
ENCODE_FLOPS = 272e9
"""Operations for one image of 256 x 256 pixels; a multiply-add counts 2."""
PACKAGE, MODULES = "DALL-E 0.1", "the same calls of F.conv2d as DALL-E 0.1"
OURS, HALF, COMPILED = "DVAE, float32", "DVAE, bfloat16", "DVAE, bfloat16, compiled"
PEER_ROUNDING = 1e-4
"""Largest difference allowed between decoded pixels: float32 sums of up to 4,608 products in another order."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """The compared code: images to codes, and codes to images."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def native(device: str, config: DVAEConfig = PAPER) -> DVAE:
    """Returns the native network with random weights."""
    torch.manual_seed(0)
    net: Any = DVAE(config)  # torch 2.13 does not declare the overload of `to` below
    layout = torch.preserve_format if device == "cpu" else torch.channels_last
    net = net.to(device, memory_format=layout).eval().requires_grad_(False)
    assert isinstance(net, DVAE)
    net.encoder.output.bias.sub_(net.logits(random_images(1, device, config.image_size)).mean((0, 2, 3)))  # type: ignore[operator]
    return net


def random_images(count: int, device: str, size: int = 256) -> Tensor:
    """Returns images of smooth colors with noise, (count, 3, size, size)."""
    generator = torch.Generator().manual_seed(count)
    coarse = F.interpolate(torch.rand(count, 3, 32, 32, generator=generator), size=size, mode="bicubic").clamp(0, 1)
    return (0.7 * coarse + 0.3 * torch.rand(count, 3, size, size, generator=generator)).to(device)


def peer_of(net: DVAE, device: str) -> Peer:
    """Returns the published package with the native weights, or the native modules called in the same way."""
    if importlib.util.find_spec("dall_e") is None:
        return Peer(
            MODULES, lambda images: net.logits(images).argmax(1), functools.partial(decode_one_hot, net.decoder, net)
        )
    import dall_e

    encoder = dall_e.Encoder(device=torch.device(device))
    decoder = dall_e.Decoder(device=torch.device(device))
    for external, own in ((encoder, net.encoder), (decoder, net.decoder)):
        # Both list their tensors layer by layer.
        external.load_state_dict(dict(zip(external.state_dict(), own.state_dict().values(), strict=True)))
    return Peer(
        PACKAGE,
        lambda images: encoder(dall_e.map_pixels(images)).argmax(1),
        functools.partial(decode_one_hot, decoder.eval(), net),
    )


def decode_one_hot(decoder: nn.Module, net: DVAE, codes: Tensor) -> Tensor:
    """Decodes images through one-hot cells, as in the documentation of the package."""
    cells = F.one_hot(codes, net.codebook_size).permute(0, 3, 1, 2).float()
    return net.pixels(decoder(cells).float())


def half(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs a function under autocast to bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return work(x)


def unequal(a: Tensor, b: Tensor) -> float:
    """Share of codes that differ."""
    return float((a != b).float().mean())


def with_half(row: Row, path: str, equal: tuple[Equality, ...]) -> Row:
    """Returns a row for another path of the same measurement."""
    ratio = statistics.median(row.seconds[row.against]) / statistics.median(row.seconds[path])
    print(f"{row.name} ({path}): {ratio:.2f}x; " + ", ".join(f"{e.what} {e.value:.3g}" for e in equal), flush=True)
    return dataclasses.replace(row, path=path, ratio=ratio, target=None, equal=equal, dtype="bfloat16")


@functools.cache
def product_rate(device: str) -> float:
    """Measures the FLOP per second of a large bfloat16 product."""
    return ceilings(device)["flop"]


def rates(row: Row, count: int, device: str) -> Row:
    """Adds images per second to a row and, for bfloat16 on a GPU, the share of the rate of matrix products."""
    each = count / statistics.median(row.seconds[row.path])
    extra: dict[str, Any] = {"images per second": each}
    if device != "cpu" and row.dtype == "bfloat16":
        extra["share of the matrix ceiling"] = each * ENCODE_FLOPS / product_rate(device)
    print("  " + ", ".join(f"{name}: {value:.3g}" for name, value in extra.items()), flush=True)
    return dataclasses.replace(row, extra=extra)


ENCODING_NOTE = (
    "`dalle-zoo encode` takes 32 images per call. With one thread PyTorch leaves 1x1 kernels of the package to a "
    "slower product; with more it does not, so the gain is less."
)


def compare_encoding(net: DVAE, peer: Peer, count: int, target: float | None, device: str, note: str) -> list[Row]:
    """Returns rows of float32 and bfloat16 for ``count`` images per call."""
    images = random_images(count, device, net.image_size)
    paths = {
        peer.name: lambda: peer.encode(images),
        OURS: lambda: net.encode(images),
        HALF: lambda: half(net.encode, images),
    }
    codes = peer.encode(images)
    exact = unequal(net.encode(images), codes)
    # On a GPU the kernels differ, and the package computes in float16, so outputs are not equal.
    checks = (Equality(what="share of float32 codes that differ", value=exact, limit=0 if device == "cpu" else None),)
    row = compare(
        f"encode, {count} image{'s' * (count > 1)} per call",
        paths,
        path=OURS,
        against=peer.name,
        target=target,
        equal=checks,
        device=device,
        note=f"{note} {len(codes.unique()):,} different codes.",
    )
    differ = Equality(what="share of codes that differ", value=unequal(half(net.encode, images), codes))
    return [
        rates(row, count, device),
        rates(with_half(row, HALF, (differ,)), count, device),
    ]


def compare_decoding(net: DVAE, peer: Peer, count: int, device: str) -> list[Row]:
    """Returns rows of float32 and bfloat16 for ``count`` images per call."""
    codes = torch.randint(net.codebook_size, (count, 32, 32), generator=torch.Generator().manual_seed(0)).to(device)
    external = peer.decode(codes)

    def apart(pixels: Tensor, limit: float | None) -> tuple[Equality, ...]:
        value = float((pixels - external).abs().max())
        return (Equality(what="largest difference of a pixel in [0, 1]", value=value, limit=limit),)

    row = compare(
        f"decode, {count} image{'s' * (count > 1)} per call",
        {
            peer.name: lambda: peer.decode(codes),
            OURS: lambda: net.decode(codes),
            HALF: lambda: half(net.decode, codes),
        },
        path=OURS,
        against=peer.name,
        target=None,
        equal=apart(net.decode(codes), PEER_ROUNDING if device == "cpu" else None),
        device=device,
    )
    return [row, with_half(row, HALF, apart(half(net.decode, codes), None))]


def compare_trained(device: str) -> list[Row]:
    """Returns rows of the bundled weights and images, with whose codes those of bfloat16 are compared."""
    net = load_model("composition", "dvae", device=device)
    samples = list(open_source("composition:val-styles").stream())[:64]
    images = torch.stack([center_transform(decode_image(s.image), net.image_size) for s in samples]).to(device) / 255
    codes = net.encode(images)
    plain = net.logits(images).argmax(1)
    row = compare(
        f"encode, composition, {len(images)} images per call",
        {
            MODULES: lambda: net.logits(images).argmax(1),
            OURS: lambda: net.encode(images),
            HALF: lambda: half(net.encode, images),
        },
        path=OURS,
        against=MODULES,
        target=None,
        equal=(Equality(what="share of float32 codes that differ", value=unequal(codes, plain), limit=1e-3),),
        device=device,
        note="Trained weights on images they were not trained on.",
    )
    differ = Equality(what="share of codes that differ", value=unequal(half(net.encode, images), codes))
    return [row, with_half(row, HALF, (differ,))]


def compare_compiled(net: DVAE, device: str, count: int = 32) -> list[Row]:
    """Compares compiled with uncompiled networks in bfloat16 on a GPU, at a batch size that fills it."""
    images = random_images(count, device, net.image_size)
    codes = half(net.encode, images)
    compiled = native(device, net.config)
    compiled.compile_networks()
    row = compare(
        f"encode, {count} images per call, compiled",
        {HALF: lambda: half(net.encode, images), COMPILED: lambda: half(compiled.encode, images)},
        path=COMPILED,
        against=HALF,
        target=None,
        equal=(Equality(what="share of codes that differ", value=unequal(half(compiled.encode, images), codes)),),
        device=device,
        dtype="bfloat16",
    )
    return [rates(row, count, device)]


@torch.no_grad()
def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net = native(options.device)
    peer = peer_of(net, options.device)
    rows = [
        *compare_encoding(net, peer, 4, 2.0, options.device, ENCODING_NOTE),
        *compare_encoding(
            net, peer, 1, None, options.device, "Laying the weights out, once per call, counts in full."
        ),
        *compare_decoding(net, peer, 1, options.device),
        *compare_decoding(net, peer, 4, options.device),
        *compare_trained(options.device),
    ]
    if options.device != "cpu":
        rows += [*compare_encoding(net, peer, 64, None, options.device, ""), *compare_compiled(net, options.device)]
    command = f"python benchmarks/dvae.py --threads {options.threads} --device {options.device}"
    print(store("dvae", command, rows, options.device))


if __name__ == "__main__":
    main()
