"""Four processes that try PowerSGD in groups of 1, 2 and 4: what each finds goes to a JSON file of its own.

    python tests/training/powersgd_processes.py FOLDER

`test_powersgd.py` starts it and checks what was found.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_zoo.training.powersgd import PowerSGD

WORLD, RANK, STEPS = 4, 4, 12
SHAPES = {"wide": (24, 40), "tall": (64, 16), "square": (32, 32), "tiny": (4, 50)}
"""The last matrix has no smaller factors of rank 4."""
COMPRESSED = ("wide", "tall", "square")

Gradients = dict[str, Tensor]
Groups = dict[int, dist.ProcessGroup]


def noise(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(repr(key).encode()))


def gradients(machine: int, step: int, true_rank: int | None = None) -> Gradients:
    """Float32 gradients as in training: one part is common to all machines and steps, the other is not."""
    sampled = {}
    for name, (rows, columns) in SHAPES.items():
        if true_rank is None:
            common = torch.randn(rows, columns, generator=noise(name))
            own = torch.randn(rows, columns, generator=noise(name, machine, step))
            sampled[name] = 1e-3 * (common + own)
        else:  # machines share the columns' space, so their mean has this rank too
            basis = torch.randn(rows, true_rank, generator=noise(name, step))
            sampled[name] = 1e-3 * basis @ torch.randn(true_rank, columns, generator=noise(name, machine, step))
    return sampled


def vector(machine: int, step: int) -> Tensor:
    return torch.randn(7, generator=noise("vector", machine, step))


def exact_mean(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over the group in float64."""
    total = tensor.double()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the distance relative to the second tensor."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class Run:
    """Steps of one `PowerSGD`, with sums of what it applied and of what would have been exact."""

    def __init__(self, group: dist.ProcessGroup, before: Run | None = None, **options: Any) -> None:
        self.powersgd = PowerSGD(options.pop("rank", RANK), group, group, **options)
        self.group = group
        self.applied: Gradients = dict(before.applied) if before else {}
        self.exact: Gradients = dict(before.exact) if before else {}

    def update(self, step: int, true_rank: int | None = None) -> Gradients:
        local = gradients(dist.get_rank(), step, true_rank)
        flat = exact_mean(torch.cat([gradient.flatten() for gradient in local.values()]), self.group)
        means = flat.split([gradient.numel() for gradient in local.values()])
        assert self.powersgd.reduce(local, [])
        for (name, gradient), mean in zip(local.items(), means, strict=True):
            self.applied[name] = self.applied.get(name, 0) + gradient.double()
            self.exact[name] = self.exact.get(name, 0) + mean.view(gradient.shape)
        return local

    def updates(self, first: int = 0, last: int = STEPS) -> Run:
        for step in range(first, last):
            self.update(step)
        return self

    def gap(self) -> float:
        """Distance of the applied from the exact gradients, over the compressed matrices."""
        return max(distance(self.applied[name], self.exact[name]) for name in COMPRESSED)

    def invariant(self) -> float:
        """Distance of applied gradients plus mean error from the exact gradients."""
        errors = self.powersgd.error_means()
        return max(distance(self.applied[name] + errors[name].double(), self.exact[name]) for name in COMPRESSED)


def exact_for_low_rank(groups: Groups) -> dict[str, Any]:
    """Matrices whose true rank is that of the factors; a view with strides; tensors that go uncompressed."""
    found = {}
    for size in (2, 4):
        group = groups[size]
        local = gradients(dist.get_rank(), 0, true_rank=2)
        others = [vector(dist.get_rank(), 0), vector(dist.get_rank(), 1).reshape(1, 7, 1)]
        around = torch.full((2 * 24, 40 + 3), 5.0)  # the wide matrix is part of a larger tensor
        view = around[::2, 3:]
        local["wide"] = view.copy_(local["wide"])
        local["tall"] = local["tall"].t().contiguous().t()  # column after column
        mean = {name: exact_mean(gradient, group) for name, gradient in local.items()}
        mean_others = [exact_mean(other, group) for other in others]
        retained = local.copy()
        powersgd = PowerSGD(8, group, group)
        assert powersgd.reduce(local, others)
        found[str(size)] = {
            "matrices": {name: distance(retained[name], mean[name]) for name in SHAPES},
            "others": [distance(other, m) for other, m in zip(others, mean_others, strict=True)],
            "compressed": list(powersgd.error_means()),
            "outside": bool((around[1::2] == 5).all() and (around[:, :3] == 5).all()),
        }
    return found


def uncompressed_at_high_rank(groups: Groups) -> dict[str, Any]:
    """At full rank, gradients are exact."""
    local = gradients(dist.get_rank(), 0)
    mean = {name: exact_mean(gradient, groups[4]) for name, gradient in local.items()}
    powersgd = PowerSGD(50, groups[4], groups[4])
    assert powersgd.reduce(local, [])
    return {
        "distance": max(distance(local[name], mean[name]) for name in SHAPES),
        "traffic": powersgd.traffic,
        "errors": list(powersgd.error_means()),
    }


def invariant(groups: Groups) -> dict[str, Any]:
    found = {}
    for size, group in groups.items():
        run = Run(group).updates()
        found[str(size)] = {"gap": run.gap(), "invariant": run.invariant()}
    return found


def error_feedback(groups: Groups) -> dict[str, Any]:
    without = Run(groups[4], error_feedback=False).updates()
    return {
        "with": Run(groups[4]).updates().gap(),
        "without": without.gap(),
        "kept without": list(without.powersgd.error_means()),
    }


def bfloat16(groups: Groups) -> dict[str, Any]:
    plain, wire = Run(groups[4]), Run(groups[4], wire_dtype=torch.bfloat16)
    first = plain.update(0), wire.update(0)
    buffers = Run(groups[4], error_dtype=torch.bfloat16).updates()
    huge = torch.tensor([3.4e38, -3.4e38])  # finite in float32 alone
    clamped, finite = wire.powersgd._mean([huge], torch.bfloat16)
    return {
        "first step": max(distance(first[1][name], first[0][name]) for name in COMPRESSED),
        "factors": [run.powersgd.traffic.factors for run in (plain, wire)],
        "complete": [run.powersgd.traffic.uncompressed for run in (plain, wire)],
        "invariant": wire.updates(1).invariant(),
        "invariant of bfloat16 buffers": buffers.invariant(),
        "clamped": [float(x) for x in clamped[0]],
        "clamped is finite": bool(finite),
    }


def not_finite(groups: Groups) -> dict[str, Any]:
    """Two machines of two processes: rank 3 fails, so the other ranks must not apply anything either."""

    def infinite_matrix(local: Gradients, other: Tensor, flag: Tensor) -> None:
        local["tall"][5, 3] = torch.inf

    def nan_elsewhere(local: Gradients, other: Tensor, flag: Tensor) -> None:
        other[2] = torch.nan

    def flagged(local: Gradients, other: Tensor, flag: Tensor) -> None:
        flag.fill_(False)

    def overflow(local: Gradients, other: Tensor, flag: Tensor) -> None:
        local["wide"].fill_(3e38)  # finite, but P is not

    found = {}
    for spoil in (infinite_matrix, nan_elsewhere, flagged, overflow):
        powersgd = PowerSGD(RANK, groups[2], None)
        steps = []
        for step in range(3):
            local, other, flag = gradients(dist.get_rank(), step), vector(dist.get_rank(), step), torch.tensor(True)
            before = {name: error.clone() for name, error in powersgd._errors.items()}
            if step == 1 and dist.get_rank() == 3:
                spoil(local, other, flag)
            steps.append(powersgd.reduce(local, [other], flag))
            if step == 1:
                retained = all(torch.equal(before[name], error) for name, error in powersgd._errors.items())
        applied = all(bool(gradient.isfinite().all()) for gradient in local.values())
        found[spoil.__name__] = {"returned": steps, "kept": retained and len(before) == 3, "applied": applied}
    return found


def broken_buffer(groups: Groups) -> dict[str, Any]:
    """A non-finite buffer is reset to zero, all others are retained."""
    powersgd = PowerSGD(RANK, groups[2], None)
    powersgd.reduce(gradients(dist.get_rank(), 0), [])
    means = powersgd.error_means()
    if dist.get_rank() == 0:
        means["tall"][0, 0] = torch.nan
    powersgd.load_error_means(means)
    first = powersgd.reduce(gradients(dist.get_rank(), 1), [])
    zero = {name: bool((error == 0).all()) for name, error in powersgd._errors.items()}
    return {"returned": [first, powersgd.reduce(gradients(dist.get_rank(), 2), [])], "zero": zero}


def traffic(groups: Groups) -> dict[str, Any]:
    powersgd = PowerSGD(RANK, groups[2], groups[2])
    counted = []
    reduce = dist.all_reduce

    def count(tensor: Tensor, *arguments: Any, **options: Any) -> None:
        counted.append(tensor.numel() * tensor.itemsize)
        reduce(tensor, *arguments, **options)

    dist.all_reduce = count
    powersgd.reduce(gradients(dist.get_rank(), 0), [vector(dist.get_rank(), 0)])
    dist.all_reduce = reduce
    assert powersgd.traffic is not None
    return {
        "traffic": powersgd.traffic,
        "sent": powersgd.traffic.sent,
        "rate": powersgd.traffic.compression_rate,
        "counted": counted,
    }


def save_on_four_load_on_two(groups: Groups) -> dict[str, Any]:
    four = Run(groups[4]).updates(0, 6)
    pending = four.powersgd.error_means()
    two = Run(groups[2], before=four)
    two.powersgd.load_error_means(pending)
    loaded = two.powersgd.error_means()
    uncompressed = Run(groups[2], before=four, rank=20)  # more than any matrix is compressed to
    uncompressed.powersgd.load_error_means(pending)
    return {
        "same": max(distance(loaded[name], pending[name]) for name in COMPRESSED),
        "invariant": two.updates(6, 12).invariant(),
        "all sent at a higher rank": uncompressed.updates(6, 8).gap(),
        "left at a higher rank": list(uncompressed.powersgd.error_means()),
        "size of what was pending": max(
            distance(two.exact[name] - pending[name], two.exact[name]) for name in pending
        ),
    }


def determinism(groups: Groups) -> dict[str, Any]:
    first, second, other = Run(groups[4]).updates(), Run(groups[4]).updates(), Run(groups[4], seed=1).updates()
    across = dict(first.applied)
    for name in across:
        across[name] = across[name].clone()
        dist.broadcast(across[name], 0)
    return {
        "again": all(torch.equal(first.applied[name], second.applied[name]) for name in SHAPES),
        "on all machines": all(torch.equal(first.applied[name], across[name]) for name in SHAPES),
        "another seed": all(torch.equal(first.applied[name], other.applied[name]) for name in COMPRESSED),
    }


def half_gradients(groups: Groups) -> dict[str, Any]:
    """Gradients of bfloat16 weights: sums with errors are still float32."""
    powersgd = PowerSGD(RANK, groups[2], groups[2])
    applied, exact = torch.zeros(24, 40, dtype=torch.float64), torch.zeros(24, 40, dtype=torch.float64)
    for step in range(STEPS):
        local = {"wide": gradients(dist.get_rank(), step)["wide"].bfloat16()}
        exact += exact_mean(local["wide"], groups[2])
        assert powersgd.reduce(local, [])
        applied += local["wide"].double()
    return {"invariant": distance(applied + powersgd.error_means()["wide"], exact), "dtype": str(local["wide"].dtype)}


def refusals(groups: Groups) -> dict[str, Any]:
    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    powersgd = PowerSGD(RANK, groups[1], groups[1])
    powersgd.load_error_means({"w": torch.zeros(24, 40)})
    off = PowerSGD(RANK, groups[1], groups[1], error_feedback=False)
    return {
        "nothing": message(lambda: powersgd.reduce({}, [])),
        "dimensions": message(lambda: powersgd.reduce({"w": torch.zeros(24, 40, 1)})),
        "shape": message(lambda: powersgd.reduce({"w": torch.zeros(24, 41)})),
        "missing": message(lambda: powersgd.reduce({"v": torch.zeros(24, 40)})),
        "off": message(lambda: off.load_error_means({})),
    }


SCENARIOS: tuple[Callable[[Groups], dict[str, Any]], ...] = (
    exact_for_low_rank, uncompressed_at_high_rank, invariant, error_feedback, bfloat16, not_finite, broken_buffer,
    traffic, save_on_four_load_on_two, determinism, half_gradients, refusals,
)  # fmt: skip


def work(rank: int, folder: Path) -> None:
    """Runs one process."""
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups: Groups = {}
    for size in (1, 2, 4):
        for first in range(0, WORLD, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                groups[size] = group
    found = {scenario.__name__: scenario(groups) for scenario in SCENARIOS}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Forks the processes and exits with the number of failed ones."""
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                work(rank, Path(sys.argv[1]))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))


if __name__ == "__main__":
    main()
