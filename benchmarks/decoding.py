"""Measures the time of a sampling step of the prior, its memory, and how both grow.

    python benchmarks/decoding.py --threads 1
    python benchmarks/decoding.py --device cuda

Weights are random, which does not change the cost. A step is compared with two alternatives. The first is a cache that
grows by concatenation, with dense masks and a separate caption per candidate, as in other code bases. The second is
the lower bound of sampling one token at a time: a loop that multiplies each weight matrix once and does nothing else.
On a GPU this bound is the time to read the weights at the measured copy rate, or the roofline of weights, keys and
arithmetic, whichever is larger.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import torch
from harness import ROUNDS, Equality, Row, Series, ceilings, compare, interleaved, store
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_zoo.models.cpu.linears import packed_linears
from dalle_zoo.models.decoding import PriorDecoding
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.sampling import SamplingOptions, gumbel, sample_codes

PAPER = PriorConfig(width=384, num_heads=6, num_layers=6)
"""The paper's positions, vocabularies and masks; few narrow layers."""
SMALL = PriorConfig(text_length=64, image_height=16, image_width=16, width=512, num_heads=8, num_layers=12)
"""The shape at which other code bases have been measured."""
LARGE = {"1.2B": PriorConfig(width=2048, num_heads=32, num_layers=24), "12B": PriorConfig()}
"""Shapes that are measured on a GPU."""
POSITION = 512
"""Half of the paper's image is generated."""
STEPS = 4
"""Steps of a timed call."""
WRITTEN_OUT = (
    "written out, attention of one query in bfloat16 takes a quarter of the time of PyTorch's fused call, against "
    "which the target was 9x; half of the step of dalle-zoo is the matrices of the layers and the head, which both "
    "paths multiply"
)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

PACKED = ExitStack()
"""Priors whose matrices stay packed to the end of the benchmark."""


class ConcatenatedCache:
    """Decoding with keys and values that grow by concatenation, and rows of dense masks.

    Args:
        prior: The prior.
        text: Text ids, (P, T).
        codes: Tokens before the first step, (P, n, m).
        fused: Whether attention is PyTorch's fused call, or written out.
    """

    def __init__(self, prior: Prior, text: Tensor, codes: Tensor, fused: bool) -> None:
        self.prior, self.shape, self.fused = prior, codes.shape[:2], fused
        text, codes = text.repeat_interleave(codes.shape[1], 0), codes.flatten(0, 1)
        image = torch.cat([prior.start_of_image.expand(len(codes), 1, -1), prior.image_embedding(codes[:, :-1])], 1)
        x = torch.cat([prior.embed_text(text), image + prior.image_positions()[: codes.shape[1]]], 1)
        self.masks = [mask.dense(x.device) for mask in prior.masks]
        self.start: list[tuple[Tensor, Tensor]] = []
        for layer in prior.layers:
            query, key, value = layer.attention.project(layer.attention_norm(x))
            self.start.append((key.contiguous(), value.contiguous()))
            x = x + layer.attention.merge(layer.attention.backend(query, key, value, layer.attention.mask))
            x = x + layer.mlp(layer.mlp_norm(x))
        self.reset()

    def reset(self) -> None:
        """Discards the steps since construction."""
        self.caches = list(self.start)

    def step(self, index: int, previous: Tensor) -> Tensor:
        """Logits of image token ``index``, (P, n, K)."""
        prior, row = self.prior, self.prior.config.text_length + index
        x = prior.image_embedding(previous.flatten())[:, None] + prior.image_positions()[index]
        for number, layer in enumerate(prior.layers):
            query, key, value = layer.attention.project(layer.attention_norm(x))
            key = torch.cat([self.caches[number][0], key], 2)
            value = torch.cat([self.caches[number][1], value], 2)
            self.caches[number] = key, value
            allowed = self.masks[number][row, : row + 1]
            if self.fused:
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[None])
            else:
                scores = (query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
                mixed = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value
            x = x + layer.attention.merge(mixed)
            x = x + layer.mlp(layer.mlp_norm(x))
        logits: Tensor = prior.image_head(prior.final_norm(x))
        return logits.view(*self.shape, -1)


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory for tensors above 32 MB, which it otherwise returns to the system.

    A growing cache is reallocated at every step; without this, most of its time would be spent on new pages.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        no_mapping, trim_above = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(no_mapping, 0)
        ctypes.CDLL(None).mallopt(trim_above, 2**31 - 1)


def make_prior(config: PriorConfig, dtype: torch.dtype, device: str = "cpu", backend: str = "auto") -> Prior:
    """Returns a prior with random weights, including the heads, initialized directly on the device."""
    torch.manual_seed(0)
    with torch.device("meta"):
        prior = Prior(config, backend).to(dtype)
    prior.to_empty(device=device)
    for name, parameter in prior.named_parameters():
        mean, std = prior.initial(name)
        nn.init.normal_(parameter, mean, std or (0.02 if "head.weight" in name else 0.0))
    return prior.eval()


def make_text(prior: Prior, prompts: int = 1) -> Tensor:
    """Returns text ids without padding."""
    generator = torch.Generator().manual_seed(1)
    shape = (prompts, prior.config.text_length)
    return torch.randint(prior.config.text_vocab, shape, generator=generator).to(prior.device)


def make_codes(prior: Prior, candidates: int) -> Tensor:
    """Returns image tokens of one prompt's candidates, (1, n, N)."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, candidates, prior.config.image_length)
    return torch.randint(prior.config.codebook_size, shape, generator=generator)


def decode_up_to(decoder: PriorDecoding, codes: Tensor, position: int) -> None:
    """Runs the steps before a position."""
    for index in range(position):
        decoder.step(index, codes[:, :, index - 1] if index else None)


def advance(decoder: PriorDecoding | ConcatenatedCache, codes: Tensor, start: int, count: int = STEPS) -> Tensor:
    """Runs ``count`` steps and returns their logits, (P, n, count, K)."""
    steps = range(start, start + count)
    return torch.stack([decoder.step(index, codes[:, :, index - 1]) for index in steps], 2)


# ------------------------------------------------------------ rows


def against_concatenation(candidates: int, dtype: torch.dtype, target: float, fused: bool = False) -> Row:
    """Compares steps in the middle of the image with a concatenated cache."""
    prior = make_prior(PAPER, dtype)
    text, codes = make_text(prior), make_codes(prior, candidates)
    grown = ConcatenatedCache(prior, text, codes[:, :, :POSITION], fused)
    native = prior_decoder(prior, text, candidates)
    decode_up_to(native, codes, POSITION)
    came, expected = (advance(decoder, codes, POSITION) for decoder in (native, grown))
    exact = dtype == FLOAT32
    noise = gumbel(torch.arange(candidates), POSITION, came.shape[-1])[:, None]
    different = (came[0].float() + noise).argmax(-1) != (expected[0].float() + noise).argmax(-1)

    def again() -> None:
        grown.reset()
        advance(grown, codes, POSITION)

    against = f"concatenated cache, dense masks, attention {'fused' if fused else 'written out'}"
    shape = f"{PAPER.num_layers} layers of width {PAPER.width}, {candidates} candidate{'s' * (candidates > 1)}"
    return compare(
        f"{STEPS} steps at half of the image, {shape}",
        {"dalle-zoo": lambda: advance(native, codes, POSITION), against: again},
        path="dalle-zoo",
        against=against,
        target=target,
        equal=(
            Equality(
                what="largest difference of the logits",
                value=float((came - expected).abs().max()),
                limit=1e-5 if exact else None,
            ),
            Equality(
                what="share of codes that differ",
                value=float(different.float().mean()),
                limit=0.0 if exact else None,
            ),
        ),
        dtype=str(dtype).removeprefix("torch."),
        note=WRITTEN_OUT if dtype == BFLOAT16 and not fused else "",
    )


def memory(candidates: int) -> Row:
    """Compares the memory of keys and values with that of all positions, in the paper's layers at a small width."""
    config = PriorConfig(width=64, num_heads=1)
    prior = make_prior(config, FLOAT32)
    caches = PriorDecoding(prior, make_text(prior), candidates).caches
    image = sum(cache.num_bytes for cache in caches)
    text = sum(2 * cache.text_key.numel() * cache.text_key.element_size() for cache in caches)
    native, full = (image + text) / candidates, 2 * 4 * config.num_layers * config.layout.length * config.width
    return Row(
        name=f"keys and values of one of {candidates} images, the paper's {config.num_layers} layers, width 64",
        path="dalle-zoo",
        against="full cache",
        target=4.0,
        ratio=full / native,
        equal=(),
        seconds={"dalle-zoo": [native], "full cache": [float(full)]},
        unit="bytes",
        threads=torch.get_num_threads(),
        note="bytes of the buffers as they are allocated; the caption's are shared by the candidates",
    )


def against_weights(candidates: int, dtype: torch.dtype, target: float) -> Row:
    """Compares sampling a token with multiplying each matrix once, after the prefill and the packing of weights."""
    prior = make_prior(SMALL, dtype)
    text, seeds = make_text(prior), torch.arange(candidates)[None]
    linears = [m for n, m in prior.named_modules() if isinstance(m, nn.Linear) and n != "text_head"]
    inputs = {m.in_features: torch.randn(candidates, m.in_features, dtype=dtype) for m in linears}
    codes = sample_codes(prior, text, seeds)
    sampled = codes.flatten(2)
    logits = prior.image_logits(text.expand(candidates, -1), codes[0])
    noise = torch.stack([gumbel(seeds[0], index, SMALL.codebook_size) for index in range(SMALL.image_length)], 1)
    different = ((logits.float() + noise).argmax(-1) != sampled[0]).float().mean()
    decoder, options = prior_decoder(prior, text, candidates), SamplingOptions()
    decode_up_to(decoder, sampled, SMALL.image_length)
    count = SMALL.image_length // (ROUNDS + 1)  # a part of the image per round
    parts = iter(range(0, SMALL.image_length, count))

    def sample() -> None:
        start = next(parts)
        for index in range(start, start + count):
            step = decoder.step(index, sampled[:, :, index - 1] if index else None)
            options.sample(step.flatten(0, 1), seeds[0], index)

    def loop() -> None:
        for _ in range(count):
            for linear in linears:
                F.linear(inputs[linear.in_features], linear.weight, linear.bias)

    shape = f"{SMALL.num_layers} layers of width {SMALL.width}"
    return compare(
        f"{count} tokens of an image of 16 x 16, {shape}, {candidates} candidate{'s' * (candidates > 1)}",
        {"sampling": sample, "weight products only": loop},
        path="sampling",
        against="weight products only",
        target=target if torch.get_num_threads() == 1 else None,  # the target is for one thread
        equal=(
            Equality(
                what="share of codes that differ from the full forward",
                value=float(different),
                limit=0.0 if dtype == FLOAT32 else None,
            ),
        ),
        dtype=str(dtype).removeprefix("torch."),
    )


def prior_decoder(prior: Prior, text: Tensor, candidates: int) -> PriorDecoding:
    """Returns a decoding state like that of `sample_codes`, on a copy whose matrices stay packed."""
    prior = copy.deepcopy(prior)
    PACKED.enter_context(packed_linears(prior, len(text) * candidates))
    return PriorDecoding(prior, text, candidates)


# ------------------------------------------------------------ scaling of the cost


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Returns the median duration of three calls."""
    return statistics.median(interleaved({"work": work}, rounds=3, device=device)["work"])


def by_position() -> Series:
    """Measures a step by its position, for each mask."""
    lines = {}
    for masks in ("row", "column", "conv", "full"):
        config = PriorConfig(**{**asdict(PAPER), "masks": masks, "num_layers": 2})
        prior = make_prior(config, FLOAT32)
        codes = make_codes(prior, 16)
        decoder, points = prior_decoder(prior, make_text(prior), 16), []
        decode_up_to(decoder, codes, 1)
        for start in range(1, config.image_length - 128, 128):
            points.append((start, 1000 * seconds_of(partial(advance, decoder, codes, start)) / STEPS))
            advance(decoder, codes, start, 128)
        lines[masks] = points
    return Series(x="position in the image", y="ms per step, 2 layers, 16 candidates", lines=lines)


def by_candidates() -> tuple[Series, Series]:
    """Measures a step and the prefill by the number of candidates, with one prefill per prompt or per candidate."""
    prior = make_prior(PAPER, FLOAT32)
    text = make_text(prior)
    step, shared, repeated = [], [], []
    for candidates in (1, 2, 4, 8, 16, 32, 64):
        codes = make_codes(prior, candidates)
        decoder = prior_decoder(prior, text, candidates)
        decode_up_to(decoder, codes, 34)
        step.append((candidates, 1000 * seconds_of(partial(advance, decoder, codes, 34)) / STEPS))
        shared.append((candidates, 1000 * seconds_of(partial(PriorDecoding, prior, text, candidates))))
        if candidates <= 8:
            own = text.expand(candidates, -1)
            repeated.append((candidates, 1000 * seconds_of(partial(PriorDecoding, prior, own, 1))))
    axis = "candidates of one prompt"
    return (
        Series(x=axis, y="ms per step, 6 layers", lines={"step": step}),
        Series(x=axis, y="ms of the prefill", lines={"once per prompt": shared, "once per candidate": repeated}),
    )


# ------------------------------------------------------------ a GPU


def single_image(
    name: str, config: PriorConfig, limits: dict[str, float], device: str = "cuda", rounds: int = ROUNDS
) -> Row:
    """Compares sampling one image in bfloat16 with reading the weights at the rate of a copy."""
    prior = make_prior(config, BFLOAT16, device)
    text, seeds = make_text(prior), torch.zeros(1, 1, dtype=torch.long, device=device)
    by_graph, by_launch = sample_codes(prior, text, seeds), []
    read = sum(
        p.numel() * p.element_size() for n, p in prior.named_parameters() if n.startswith(("layers", "image_h"))
    )
    floor = config.image_length * read / limits["bytes"]
    single = {"single launches": lambda: by_launch.append(sample_codes(prior, text, seeds, graph=False))}
    launches = interleaved(single, 1, device, warm_up=0)  # many times slower, so that one call is enough
    seconds = interleaved({"sampling": lambda: sample_codes(prior, text, seeds)}, rounds, device, warm_up=0)
    return Row(
        name=f"an image of {config.image_height} x {config.image_width}, {name}",
        path="sampling",
        against="weights at the rate of a copy",
        target=0.6,
        ratio=floor / statistics.median(seconds["sampling"]),
        equal=(
            Equality(
                what="share of codes that differ from single launches",
                value=float((by_graph != by_launch[0]).float().mean()),
                limit=0.0,
            ),
        ),
        seconds={**seconds, **launches, "weights at the rate of a copy": [floor]},
        threads=torch.get_num_threads(),
        dtype="bfloat16",
        extra=limits,
    )


def best_batch(
    name: str,
    config: PriorConfig,
    prompts: int,
    candidates: int,
    limits: dict[str, float],
    device: str = "cuda",
    rounds: int = 3,
) -> Row:
    """Compares many images in bfloat16 with the roofline of weights, keys and arithmetic.

    A step reads the weights once, the keys of the caption once per prompt, and the image keys that the masks allow
    once per candidate; its arithmetic is that of all of them.
    """
    prior = make_prior(config, BFLOAT16, device)
    seeds = torch.arange(prompts * candidates, device=device).view(prompts, candidates)
    text, images = make_text(prior, prompts), prompts * candidates
    weights = sum(p.numel() for n, p in prior.named_parameters() if n.startswith(("layers", "image_head")))
    keys = sum(int(mask.decode_table().valid.sum()) for mask in prior.masks) / config.image_length
    text_keys = config.num_layers * config.text_length
    numbers = weights + 2 * config.width * (images * keys + prompts * text_keys)
    flop = 2 * images * (weights + 2 * config.width * (keys + text_keys))
    floor = config.image_length * max(2 * numbers / limits["bytes"], flop / limits["flop"])
    seconds = interleaved({"sampling": lambda: sample_codes(prior, text, seeds)}, device=device, rounds=rounds)
    return Row(
        name=f"{prompts} x {candidates} images of {config.image_height} x {config.image_width}, {name}",
        path="sampling",
        against="roofline",
        target=0.5,
        ratio=floor / statistics.median(seconds["sampling"]),
        equal=(),
        seconds={**seconds, "roofline": [floor]},
        threads=torch.get_num_threads(),
        dtype="bfloat16",
        extra={**limits, "images per second": images / statistics.median(seconds["sampling"])},
    )


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(description="Times sampling steps of the prior, and measures memory.")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    series: dict[str, Series] = {}
    with torch.inference_mode():
        if options.device == "cuda":
            limits = ceilings("cuda")
            rows = [single_image(name, config, limits) for name, config in LARGE.items()]
            shapes = ((256, 1), (1, 64), (8, 64))
            rows += [best_batch("1.2B", LARGE["1.2B"], *shape, limits) for shape in shapes]
        else:
            rows = [
                against_concatenation(32, FLOAT32, 4.0),
                against_concatenation(32, BFLOAT16, 9.0, fused=True),
                against_concatenation(32, BFLOAT16, 9.0),
                against_concatenation(1, FLOAT32, 1.2),
                memory(32),
                against_weights(1, FLOAT32, 0.9),
                against_weights(1, BFLOAT16, 0.75),
                against_weights(16, FLOAT32, 0.75),
                against_weights(16, BFLOAT16, 0.5),
            ]
            step, caption = by_candidates()
            series = {"step by position": by_position(), "step by candidates": step, "caption by candidates": caption}
    command = f"python benchmarks/decoding.py --threads {options.threads} --device {options.device}"
    print(store("decoding", command, rows, options.device, series=series))


if __name__ == "__main__":
    main()
