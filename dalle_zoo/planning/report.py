"""A plan as a table for the screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dalle_zoo.planning.duration import Duration, computes_in
from dalle_zoo.planning.formats import GIB
from dalle_zoo.planning.memory import FORWARD, Memory
from dalle_zoo.planning.network import Collective
from dalle_zoo.planning.parameters import by_kind
from dalle_zoo.planning.plan import Plan
from dalle_zoo.planning.work import Bytes

WIDTH = 52
RETAINED = ("activations", "log-probabilities")
"""How kinds begin that the backward pass waits for."""


def render(plan: Plan, recipe: str) -> str:
    """The complete table."""
    parts = (_head(plan, recipe), _parameters(plan), _memory(plan), _fit(plan), _host(plan), _update(plan))
    return "\n\n".join("\n".join(part) for part in (*parts, _wire(plan), _time(plan)) if part)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<{WIDTH}}{value:>12}{'   ' + note if note else ''}".rstrip()


def _rows(kinds: Bytes) -> Iterator[str]:
    for name, size in kinds.items():
        yield _row(name, f"{size / GIB:.3f}")


def _head(plan: Plan, recipe: str) -> list[str]:
    s, spread = plan.setup, plan.setup.spread
    strategy = spread.name if s.strategy == "auto" else s.strategy
    lines = [
        f"{recipe}: {s.nodes} x {s.devices} GPUs, {strategy}, numbers as {s.formats.name}",
        f"  weights sharded over {spread.shards.size}, copies of them: {spread.copies.size}; "
        f"{s.batch} x {s.accumulate} samples per GPU and step{', blocks recomputed' if s.recompute else ''}",
    ]
    gpu = plan.hardware.gpu
    if gpu is not None and computes_in(s) not in gpu.tflops:
        lines.append(
            f"  {gpu.name} has no {computes_in(s)} arithmetic, so float32 rates are taken: see --trainer.precision"
        )
    return lines


def _parameters(plan: Plan) -> list[str]:
    kinds = by_kind(plan.work.parameters)
    rows = [_row(name, f"{count:,}") for name, count in kinds.items()]
    return ["parameters", *rows, _row("all", f"{sum(kinds.values()):,}")]


def _memory(plan: Plan) -> list[str]:
    m, s = plan.memory, plan.setup
    lines = ["memory of a GPU, GiB", *_rows(m.held)]
    for moment, kinds in m.moments.items():
        lines += [f" {moment}{' (fullest then)' if moment == m.fullest else ''}", *_rows(kinds)]
    lines += [" assumed", _row("CUDA, NCCL, allocator", f"{m.reserve / GIB:.3f}")]
    lines.append(_row("total when fullest", f"{m.total / GIB:.2f}", _room(plan)))
    if plan.other_recompute is not None:
        word = "without" if s.recompute else "with"
        lines.append(_row(f"total {word} recomputation", f"{plan.other_recompute.total / GIB:.2f}"))
        lines.append(_row("activations kept: as planned", f"{_retained(m) / GIB:.2f}"))
        lines.append(_row(f"activations kept: {word} recomputation", f"{_retained(plan.other_recompute) / GIB:.2f}"))
    return lines


def _retained(memory: Memory) -> float:
    return sum(size for name, size in memory.moments[FORWARD].items() if name.startswith(RETAINED))


def _room(plan: Plan) -> str:
    return "" if plan.hardware.memory is None else f"of {plan.hardware.memory / GIB:g}"


def _fit(plan: Plan) -> list[str]:
    if plan.fits is None:
        return ["not checked whether it fits: pass --gpu NAME, or --gpu-memory GIB"]
    left = (plan.hardware.memory or 0) - plan.memory.total
    if plan.fits:
        return [f"FITS with {left / GIB:.2f} GiB to spare"]
    lines = [f"DOES NOT FIT: {-left / GIB:.2f} GiB too much"]
    if not plan.suggestions:
        return [*lines, "  nothing that a plan can change makes it fit: take GPUs with more memory or a smaller model"]
    lines.append("  each of these makes it fit:")
    for number, suggestion in enumerate(plan.suggestions, start=1):
        lines.append(f"  {number}. {'; '.join(suggestion.words)}: {suggestion.total / GIB:.2f} GiB")
        lines.append(f"     {' '.join(suggestion.keys)}")
    return lines


def _host(plan: Plan) -> list[str]:
    kinds = plan.memory.host
    return ["memory of a node, GiB", *_rows(kinds), _row("total", f"{sum(kinds.values()) / GIB:.1f}")]


def _update(plan: Plan) -> list[str]:
    s, flops = plan.setup, plan.work.flops()
    lines = ["one step"]
    lines.append(_row("samples", f"{s.samples:,}"))
    lines.append(_row("tokens", f"{s.samples * plan.work.tokens:,}"))
    lines += [_row(f"forward, {part}, TFLOP a sample", f"{n / 1e12:.4f}") for part, n in flops.forward.items()]
    lines.append(_row("forward and backward, TFLOP a sample", f"{flops.model / 1e12:.3f}"))
    if s.recompute:
        lines.append(_row("recomputed, TFLOP a sample", f"{flops.recomputed / 1e12:.3f}"))
    lines.append(_row("model operations of all GPUs, PFLOP", f"{plan.model_flops / 1e15:.3f}"))
    return lines


def _wire(plan: Plan) -> list[str]:
    if not plan.wire:
        return []
    lines = ["sent by a GPU in one step, GB" + " " * (WIDTH - 20) + "in node   to others"]
    lines += list(_wires(plan.wire))
    if plan.factors is not None:
        uncompressed = next((c for c in plan.wire_uncompressed if c.name == "all-reduce of gradients"), None)
        if uncompressed is not None:
            lines += [" without PowerSGD", *_wires([uncompressed])]
        lines.append(_row("compression rate of the matrices", f"{100 * plan.factors.compression:.1f} %"))
        if plan.factors.too_small:
            lines.append(
                _row("matrix elements too few for the rank, sent uncompressed", f"{plan.factors.too_small:,}")
            )
    return lines


def _wires(found: Iterable[Collective]) -> Iterator[str]:
    for c in found:
        yield f"  {c.name:<{WIDTH - 4}}{c.intra / 1e9:>10.3f}  {c.inter / 1e9:>10.3f}"


def _time(plan: Plan) -> list[str]:
    d, h, rates = plan.duration, plan.hardware, plan.rates
    if d is None or rates is None or h.gpu is None:
        return ["no times: pass --gpu NAME"]
    lines = [
        f"seconds of one step: {h.gpu.name} at {100 * h.mfu:g} % of its peak, "
        f"{rates.intra / 1e9:g} GB/s a GPU inside and {rates.inter / 1e9:g} GB/s a node between nodes",
        *_seconds(d),
    ]
    if plan.duration_uncompressed is not None:
        lines.append(_row("total without PowerSGD", f"{plan.duration_uncompressed.total:.3f}"))
    tokens = plan.setup.samples * plan.work.tokens / d.total
    lines.append(_row("tokens per second", f"{tokens:,.0f}", f"{tokens / plan.setup.world:,.0f} a GPU"))
    lines.append(_row("model FLOP utilization of the step", f"{100 * (plan.utilization or 0):.1f} %"))
    if plan.setup.steps:
        days = d.total * plan.setup.steps / 86400
        hours = 24 * days * plan.setup.world
        lines.append(_row(f"run of {plan.setup.steps:,} steps, days", f"{days:,.2f}", f"{hours:,.0f} GPU-hours"))
    return lines


def _seconds(d: Duration) -> Iterator[str]:
    yield _row("forward", f"{d.forward:.3f}", f"network behind it {d.forward_network:.3f}")
    yield _row("backward, with recomputation", f"{d.backward:.3f}", f"network behind it {d.backward_network:.3f}")
    yield _row("waiting for the network", f"{d.waiting:.3f}", f"after the backward pass {d.exchange:.3f}")
    if d.powersgd:
        yield _row("arithmetic of PowerSGD", f"{d.powersgd:.3f}")
    yield _row("optimizer", f"{d.optimizer:.3f}")
    yield _row("total", f"{d.total:.3f}")
