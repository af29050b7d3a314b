"""A plan as a text table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dalle_zoo.planning.collectives import Collective
from dalle_zoo.planning.duration import Duration, computes_in
from dalle_zoo.planning.formats import GIB
from dalle_zoo.planning.hardware import CPU
from dalle_zoo.planning.memory import FORWARD, Memory
from dalle_zoo.planning.plan import Plan
from dalle_zoo.planning.workload import Bytes

WIDTH = 52
RETAINED = "activations"
"""Prefix of the entries that the forward pass retains for the backward pass."""


def render(plan: Plan, recipe: str) -> str:
    """Returns the complete table."""
    parts = (_head(plan, recipe), _parameters(plan), _memory(plan), _fit(plan), _host(plan), _step(plan))
    return "\n\n".join("\n".join(part) for part in (*parts, _traffic(plan), _time(plan)) if part)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<{WIDTH}}{value:>12}{'   ' + note if note else ''}".rstrip()


def _device(plan: Plan) -> str:
    return "process" if plan.on_cpu else "GPU"


def _devices(plan: Plan) -> str:
    return "CPU processes" if plan.on_cpu else "GPUs"


def _name(plan: Plan) -> str:
    return CPU if plan.on_cpu else "NAME"


def _rows(kinds: Bytes) -> Iterator[str]:
    for name, size in kinds.items():
        yield _row(name, f"{size / GIB:.3f}")


def _head(plan: Plan, recipe: str) -> list[str]:
    s, sharding = plan.setup, plan.setup.sharding
    strategy = sharding.name if s.strategy == "auto" else s.strategy
    lines = [
        f"{recipe}: {s.nodes} x {s.devices} {_devices(plan)}, {strategy}, numbers as {s.formats.name}",
        f"  shards: {sharding.shards.size}, replicas: {sharding.replicas.size}; {s.batch} x {s.accumulate} samples "
        f"per {_device(plan)} and step{', blocks recomputed' if s.recompute else ''}",
    ]
    gpu = plan.hardware.gpu
    if gpu is not None and computes_in(s) not in gpu.tflops:
        lines.append(
            f"  {gpu.name} does not support {computes_in(s)}, so float32 rates apply: see --trainer.precision"
        )
    return lines


def _parameters(plan: Plan) -> list[str]:
    counts = plan.work.counts
    rows = [_row(name, f"{count:,}") for name, count in counts.items()]
    return ["parameters", *rows, _row("all", f"{sum(counts.values()):,}")]


def _memory(plan: Plan) -> list[str]:
    m, hardware = plan.memory, plan.hardware
    lines = [f"memory of a {_device(plan)}, GiB", *_rows(m.held)]
    for phase, kinds in m.phases.items():
        lines += [f" {phase}{' (peak)' if phase == m.fullest else ''}", *_rows(kinds)]
    assumed = "Python, PyTorch, allocator" if plan.on_cpu else "CUDA, NCCL, allocator"
    lines += [" assumed", _row(assumed, f"{m.reserve / GIB:.3f}")]
    room = "" if hardware.memory is None else f"of {hardware.memory / GIB:g}"
    lines.append(_row("total at the peak", f"{m.total / GIB:.2f}", room))
    if plan.other_recompute is not None:
        word = "without" if plan.setup.recompute else "with"
        lines.append(_row(f"total {word} recomputation", f"{plan.other_recompute.total / GIB:.2f}"))
        lines.append(_row("activations retained: as planned", f"{_retained(m) / GIB:.2f}"))
        other = f"{_retained(plan.other_recompute) / GIB:.2f}"
        lines.append(_row(f"activations retained: {word} recomputation", other))
    return lines


def _retained(memory: Memory) -> float:
    return sum(size for name, size in memory.phases[FORWARD].items() if name.startswith(RETAINED))


def _fit(plan: Plan) -> list[str]:
    if plan.fits is None:
        return [f"not compared with a {_device(plan)}: pass --gpu {_name(plan)}, or --gpu-memory GIB"]
    left = (plan.hardware.memory or 0) - plan.memory.total
    if plan.fits:
        return [f"FITS with {left / GIB:.2f} GiB to spare"]
    lines = [f"DOES NOT FIT: {-left / GIB:.2f} GiB too much"]
    if not plan.suggestions:
        return [*lines, f"  no known change makes it fit: use {_devices(plan)} with more memory or a smaller model"]
    lines.append("  each of these suggestions makes it fit:")
    for number, suggestion in enumerate(plan.suggestions, start=1):
        lines.append(f"  {number}. {'; '.join(suggestion.words)}: {suggestion.total / GIB:.2f} GiB")
        lines.append(f"     {' '.join(suggestion.keys)}")
    return lines


def _host(plan: Plan) -> list[str]:
    kinds = plan.host
    return ["memory of a node, GiB", *_rows(kinds), _row("total", f"{sum(kinds.values()) / GIB:.1f}")]


def _step(plan: Plan) -> list[str]:
    s, flops = plan.setup, plan.work.flops
    lines = ["one optimizer step"]
    lines.append(_row("samples", f"{s.samples:,}"))
    lines.append(_row("tokens", f"{s.samples * plan.work.tokens:,}"))
    lines += [_row(f"forward, {part}, TFLOP per sample", f"{n / 1e12:.4f}") for part, n in flops.forward.items()]
    lines.append(_row("forward and backward, TFLOP per sample", f"{flops.model / 1e12:.3f}"))
    if s.recompute:
        lines.append(_row("recomputed, TFLOP per sample", f"{flops.recomputed / 1e12:.3f}"))
    lines.append(_row(f"model operations of all {_devices(plan)}, PFLOP", f"{plan.model_flops / 1e15:.3f}"))
    return lines


def _traffic(plan: Plan) -> list[str]:
    sent = plan.sent()
    if not sent:
        return []
    title = f"sent by a {_device(plan)} in one step, GB"
    lines = [f"{title:<{WIDTH + 11}}in node   to others", *_sent(sent)]
    if plan.factors is not None:
        gradients = [c for c in plan.sent(compress=False) if c.name == "all-reduce of gradients"]
        if gradients:
            lines += [" without PowerSGD", *_sent(gradients)]
        lines.append(_row("compression rate of the matrices", f"{100 * plan.factors.compression:.1f} %"))
        if plan.factors.too_small:
            lines.append(_row("uncompressed elements of matrices below the rank", f"{plan.factors.too_small:,}"))
    return lines


def _sent(found: Iterable[Collective]) -> Iterator[str]:
    for c in found:
        yield f"  {c.name:<{WIDTH - 4}}{c.intra / 1e9:>10.3f}  {c.inter / 1e9:>10.3f}"


def _time(plan: Plan) -> list[str]:
    d, h, rates = plan.duration(), plan.hardware, plan.rates
    if d is None or rates is None or h.gpu is None:
        return [f"no times: pass --gpu {_name(plan)}"]
    links = f"{rates.intra / 1e9:.3g} GB/s per GPU in a node and {rates.inter / 1e9:.3g} GB/s per node between nodes"
    how = h.gpu.source if h.gpu.name == CPU else f"{h.gpu.name} at {100 * h.mfu:g} % of its peak, {links}"
    lines = [f"seconds of one step: {how}", *_seconds(d)]
    uncompressed = plan.duration(compress=False)
    if plan.factors is not None and uncompressed is not None:
        lines.append(_row("total without PowerSGD", f"{uncompressed.total:.3f}"))
    tokens = plan.setup.samples * plan.work.tokens / d.total
    lines.append(_row("tokens per second", f"{tokens:,.0f}", f"{tokens / plan.setup.world:,.0f} per {_device(plan)}"))
    lines.append(_row("model FLOP utilization of the step", f"{100 * (plan.utilization or 0):.1f} %"))
    if plan.setup.steps:
        days = d.total * plan.setup.steps / 86400
        hours = 24 * days * plan.setup.world
        number, unit = (days, "days") if days >= 1 else (1440 * days, "minutes")
        note = f"{hours:,.0f} {_device(plan)}-hours" if days >= 1 else ""
        lines.append(_row(f"run of {plan.setup.steps:,} steps, {unit}", f"{number:,.2f}", note))
    return lines


def _seconds(d: Duration) -> Iterator[str]:
    yield _row("forward", f"{d.forward:.3f}", f"overlapped communication {d.forward_network:.3f}")
    yield _row(
        "backward, with recomputation", f"{d.backward:.3f}", f"overlapped communication {d.backward_network:.3f}"
    )
    yield _row("waiting for communication", f"{d.waiting:.3f}", f"after the backward pass {d.exchange:.3f}")
    if d.powersgd:
        yield _row("computation of PowerSGD", f"{d.powersgd:.3f}")
    yield _row("optimizer", f"{d.optimizer:.3f}")
    yield _row("total", f"{d.total:.3f}")
