"""Times training of the prior: attention by mask, the loss of the heads, and complete steps.

    python benchmarks/training.py --threads 1
    python benchmarks/training.py --device cuda

The baseline is the usual way to train: fused attention with a dense boolean mask, and one head over both vocabularies
at all positions, where the logits of the other modality are masked. Both sides have the same weights, the same
captions without padding, and the same optimizer. On a GPU, a step of 1.2 billion parameters is compared with the time
of its operations at the measured rate of a large product; attention counts the pairs that the masks allow.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from decoding import LARGE, keep_freed_memory, make_prior
from harness import ROUNDS, Equality, Row, Series, ceilings, compare, interleaved, store
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from dalle_zoo.masks import Mask, TextImageLayout
from dalle_zoo.models import attention
from dalle_zoo.models.attention import Backend, choice
from dalle_zoo.models.losses import head_loss
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.planning.prior import PriorWorkload

PAPER = TextImageLayout(256, 32, 32)
CONFIG = PriorConfig(width=512, num_layers=12, num_heads=8)
"""The paper's positions, vocabularies and masks."""
ROUNDING = 1e-5
HALF_ROUNDING = 0.02
"""Tolerance relative to the largest gradient: a few roundings to 8 bits."""
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

CONVOLUTION = "a pair of rows reads keys of eight; the paper has one such layer of 64"
"""Note on the smaller ratio of the convolutional mask."""

Tokens = tuple[Tensor, Tensor]
"""Text ids (B, T) and codes (B, h, w)."""


# ------------------------------------------------------------ attention


def random_heads(layout: TextImageLayout, dtype: torch.dtype, device: str, batch: int, heads: int) -> list[Tensor]:
    """Returns queries, keys, values and the gradient of the mixed values, as views of a projection: (B, H, L, 64)."""
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randn(batch, layout.length, 4, heads, 64, generator=generator).to(device, dtype)
    return list(sampled.permute(2, 0, 3, 1, 4))


def forward_and_backward(backend: Backend, mask: Mask, given: list[Tensor]) -> list[Tensor]:
    """Returns mixed values and the gradients of queries, keys and values."""
    *inputs, gradient = (x.detach().requires_grad_() for x in given)
    query, key, value = inputs
    out = backend(query, key, value, mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.detach())]


def attention_row(
    spec: str, dtype: torch.dtype, target: float | None, device: str, layout: TextImageLayout = PAPER
) -> Row:
    """Compares the attention of one layer, forward and backward."""
    mask = Mask.from_spec(spec, layout)
    batch, heads = (2, 8) if device == "cpu" else (16, 32)
    given = random_heads(layout, dtype, device, batch, heads)
    paths: dict[str, Callable[[], list[Tensor]]] = {
        "lines": lambda: forward_and_backward(attention.auto, mask, given),
        "dense boolean SDPA": lambda: forward_and_backward(attention.sdpa, mask, given),
    }
    units = [1.0 if dtype == FLOAT32 else float(found.abs().max()) for found in paths["dense boolean SDPA"]()]
    pairs = zip(*(work() for work in paths.values()), strict=True)
    apart = max(float((native - dense).abs().max()) / unit for (native, dense), unit in zip(pairs, units, strict=True))
    return compare(
        f"attention forward and backward, {spec}, {layout.length:,} positions, {batch} x {heads} heads of 64",
        paths,
        path="lines",
        against="dense boolean SDPA",
        target=target,
        equal=(
            Equality(
                what="largest difference of values and gradients" + (", of the largest" if dtype != FLOAT32 else ""),
                value=apart,
                limit=ROUNDING if dtype == FLOAT32 else HALF_ROUNDING,
            ),
        ),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        note=CONVOLUTION if spec == "conv" else "",
    )


def choice_row(spec: str, dtype: torch.dtype, layout: TextImageLayout, batch: int, heads: int) -> Row:
    """Compares the back-end that `auto` takes with the fastest of all back-ends that run on a CPU."""
    mask = Mask.from_spec(spec, layout)
    given = random_heads(layout, dtype, "cpu", batch, heads)
    backends = {name: attention.BACKENDS[name] for name in ("auto", "dense", "sdpa", "lines")}
    paths = {name: partial(forward_and_backward, backend, mask, given) for name, backend in backends.items()}
    outputs = {name: work() for name, work in paths.items()}
    units = [1.0 if dtype == FLOAT32 else float(found.abs().max()) for found in outputs["dense"]]
    apart = max(
        float((one - two).abs().max()) / unit
        for name in outputs
        for one, two, unit in zip(outputs[name], outputs["dense"], units, strict=True)
    )
    seconds = interleaved(paths)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min((name for name in medians if name != "auto"), key=lambda name: medians[name])
    row = Row(
        name=f"attention forward and backward, {spec}, {layout.length:,} positions, {batch} x {heads} heads of 64",
        path="auto",
        against=fastest,
        target=0.9,  # the choice may not be a slower one, up to the scatter of short calls
        ratio=medians[fastest] / medians["auto"],
        equal=(
            Equality(
                what="largest difference of values and gradients" + (", of the largest" if dtype != FLOAT32 else ""),
                value=apart,
                limit=ROUNDING if dtype == FLOAT32 else HALF_ROUNDING,
            ),
        ),
        seconds=seconds,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        note=f"auto takes {choice.choose(mask, given[0]).__name__}; the fastest other back-end is {fastest}",
    )
    print(f"{row.name} ({row.dtype}): {row.ratio:.2f}x, {row.note}", flush=True)
    return row


def attention_by_size(device: str) -> Series:
    """Measures forward and backward pass in ms by the side of the grid, for one image and 8 heads of 64."""
    paths = {"row, dense boolean SDPA": ("row", attention.sdpa)}
    paths |= {f"{spec}, auto": (spec, attention.auto) for spec in ("full", "conv", "row", "column")}
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for side in (8, 16, 24, 32):
        layout = replace(PAPER, height=side, width=side)
        given = random_heads(layout, FLOAT32 if device == "cpu" else BFLOAT16, device, 1, 8)
        works = {
            name: partial(forward_and_backward, backend, Mask.from_spec(spec, layout), given)
            for name, (spec, backend) in paths.items()
        }
        for name, seconds in interleaved(works, device=device).items():
            lines[name].append((side, 1e3 * statistics.median(seconds)))
    return Series(x="side of the grid, 256 text positions before it", y="ms, forward and backward", lines=lines)


# ------------------------------------------------------------ heads


class JointHead(nn.Module):
    """One head with the logits of both vocabularies at every position; those of the other kind are masked."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        heads = prior.text_head, prior.image_head
        self.weight = nn.Parameter(torch.cat([head.weight.detach() for head in heads]))
        self.bias = nn.Parameter(torch.cat([head.bias.detach() for head in heads]))
        c = prior.config
        is_image = torch.arange(c.layout.length) >= c.text_length
        self.register_buffer("other", is_image[:, None] != (torch.arange(len(self.bias)) >= c.text_vocab))
        weights = [(1 - c.text_loss_weight) / c.image_length, c.text_loss_weight / c.text_length]
        self.register_buffer("weights", torch.where(is_image, *weights))
        self.text_vocab = c.text_vocab

    def forward(self, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """Returns the weighted loss of hidden states (B, L, d)."""
        logits = F.linear(hidden, self.weight, self.bias).masked_fill(self.other, -torch.inf)
        target = torch.cat([text, codes.flatten(1) + self.text_vocab], 1)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        return (losses.view_as(target) * self.weights).sum() / len(target)


def separate_heads(prior: Prior, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
    """Returns the same loss, computed as in `Prior.loss`."""
    c = prior.config
    parts = (prior.text_head, hidden[:, : c.text_length], text), (prior.image_head, hidden[:, c.text_length :], codes)
    of_text, of_image = (
        head_loss(x.flatten(0, 1), head.weight, head.bias, target.flatten()) / target.numel()
        for head, x, target in parts
    )
    return c.text_loss_weight * of_text + (1 - c.text_loss_weight) * of_image


def make_tokens(config: PriorConfig, batch: int, device: str = "cpu") -> Tokens:
    """Returns text ids without padding, and codes."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(config.text_vocab, (batch, config.text_length), generator=generator)
    shape = (batch, config.image_height, config.image_width)
    return text.to(device), torch.randint(config.codebook_size, shape, generator=generator).to(device)


def head_memory(batch: int) -> Row:
    """Returns the peak bytes of forward and backward pass of the heads, without weights and hidden states."""
    prior = make_prior(replace(CONFIG, num_layers=1), FLOAT32)
    joint, tokens = JointHead(prior), make_tokens(CONFIG, batch)
    hidden = torch.randn(batch, PAPER.length, CONFIG.width)

    def measure(loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor, Tensor]:
        inputs = hidden.clone().requires_grad_()
        with MemTracker() as tracker:
            value = loss(inputs)
            value.backward()
        gradient = inputs.grad
        assert gradient is not None
        return float(tracker.get_tracker_snapshot("peak")[hidden.device]["Total"]), value.detach(), gradient

    native, loss, gradient = measure(lambda x: separate_heads(prior, x, *tokens))
    external, joint_loss, joint_gradient = measure(lambda x: joint(x, *tokens))
    return Row(
        name=f"memory of the heads' loss and gradients, width {CONFIG.width}, {batch} x 1,280 positions",
        path="separate heads, few positions at a time",
        against="one joint head",
        target=None,
        ratio=external / native,
        equal=loss_equality(loss, joint_loss, (gradient - joint_gradient).abs().max()),
        seconds={"separate heads, few positions at a time": [native], "one joint head": [external]},
        unit="bytes",
        threads=torch.get_num_threads(),
        note="peak by torch's MemTracker; gradients of the weights are in it, weights and inputs are not",
    )


def loss_equality(native: Tensor, external: Tensor, gradients_apart: Tensor) -> tuple[Equality, ...]:
    """Checks of float32 paths. Float32 numbers near 9 nats are 1e-6 apart, so the difference of losses is relative."""
    apart = float((native - external).abs() / external)
    return (
        Equality(what="relative difference of the loss", value=apart, limit=1e-6),
        Equality(what="largest difference of gradients", value=float(gradients_apart), limit=ROUNDING),
    )


# ------------------------------------------------------------ complete steps


def update(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A training step: forward and backward pass, then AdamW at a rate of 0, so that weights stay comparable."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def step_row(batch: int) -> Row:
    """Compares a complete training step with dense attention and a joint head."""
    native, dense = make_prior(CONFIG, FLOAT32), make_prior(CONFIG, FLOAT32, backend="sdpa")
    joint, (text, codes) = JointHead(dense), make_tokens(CONFIG, batch)
    del dense.text_head, dense.image_head
    paths = {
        "lines and separate heads": update(list(native.parameters()), lambda: native.loss(text, codes).total),
        "dense SDPA and one joint head": update(
            [*dense.parameters(), *joint.parameters()], lambda: joint(dense.hidden(text, codes), text, codes)
        ),
    }
    loss, dense_loss = (step() for step in paths.values())
    found = dict(native.named_parameters())
    gradients = [(grad(found[name]) - grad(p)).abs().max() for name, p in dense.named_parameters()]
    heads = torch.cat([grad(native.text_head.weight), grad(native.image_head.weight)])
    apart = torch.stack([*gradients, (heads - grad(joint.weight)).abs().max()]).max()
    return compare(
        f"training step, width 512, 12 layers, {batch} x 1,280 positions",
        paths,
        path="lines and separate heads",
        against="dense SDPA and one joint head",
        target=1.35,
        equal=loss_equality(loss, dense_loss, apart),
        note="with AdamW, which takes the same time on both sides",
    )


def grad(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def large_step(
    name: str,
    config: PriorConfig,
    batch: int,
    limits: Mapping[str, float],
    device: str = "cuda",
    rounds: int = ROUNDS,
    compiled: bool = True,
) -> Row:
    """Compares a step in bfloat16 with the time of its operations at the rate of a large product."""
    prior, (text, codes) = make_prior(config, FLOAT32, device), make_tokens(config, batch, device)
    eager = make_prior(config, FLOAT32, device, "sdpa")
    with torch.no_grad(), torch.autocast(device, BFLOAT16):
        expected = eager.loss(text, codes).total
    del eager
    for block in prior.residual_blocks():
        block.residual.compiled = compiled

    def loss() -> Tensor:
        with torch.autocast(device, BFLOAT16):
            return prior.loss(text, codes).total

    step = update(list(prior.parameters()), loss)
    step()  # the first is not compiled
    apart = float((step() - expected).abs())
    seconds = interleaved({"training step": step}, rounds, device)
    floor = batch * PriorWorkload(config).flops.model / limits["flop"]
    return Row(
        name=f"training step, {name}, {'compiled, ' if compiled else ''}{batch} x {config.layout.length:,} positions",
        path="training step",
        against="its operations at the rate of a large product",
        target=0.45,
        ratio=floor / statistics.median(seconds["training step"]),
        equal=(Equality(what="difference of the loss from eager dense attention", value=apart, limit=1e-3),),
        seconds={**seconds, "its operations at the rate of a large product": [floor]},
        threads=torch.get_num_threads(),
        dtype="bfloat16",
        note="the ratio is the model FLOP utilization; attention counts the pairs that the masks allow",
        extra={
            **limits,
            "tokens per second": batch * config.layout.length / statistics.median(seconds["training step"]),
        },
    )


def main() -> None:
    """Runs the benchmark and stores its results."""
    parser = argparse.ArgumentParser(
        description="Time of attention, of the heads' loss and of complete training steps."
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda (cpu)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.device == "cuda":
        limits = ceilings("cuda")
        rows = [attention_row(spec, BFLOAT16, None, "cuda") for spec in ("row", "column", "conv")]
        rows += [large_step("1.2B", LARGE["1.2B"], batch, limits) for batch in (8, 16, 32)]
    else:
        rows = [attention_row(spec, FLOAT32, 2.3, "cpu") for spec in ("row", "column", "conv")]
        rows += [attention_row(spec, BFLOAT16, None, "cpu") for spec in ("row", "column")]
        for dtype in (FLOAT32, BFLOAT16):
            for text, side, batch, heads in ((24, 8, 12, 3), (24, 16, 12, 3), (64, 16, 4, 8), (256, 24, 1, 8)):
                layout = TextImageLayout(text, side, side)
                rows += [choice_row(spec, dtype, layout, batch, heads) for spec in ("row", "column", "conv")]
        rows += [head_memory(4), step_row(1)]
    series = {"attention by size of the grid": attention_by_size(options.device)}
    command = f"python benchmarks/training.py --threads {options.threads} --device {options.device}"
    print(store("training", command, rows, options.device, series=series))


if __name__ == "__main__":
    main()
