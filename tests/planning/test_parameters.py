"""Parameters and shards, compared with complete networks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.planning.dvae import DVAEWorkload
from dalle_zoo.planning.parameters import ROOT, Parameter, held, unit_sizes
from dalle_zoo.planning.prior import PriorWorkload

ROOT_FOLDER = Path(__file__).parents[2]
SMALL = PriorConfig(
    text_length=5, text_vocab=11, image_height=3, image_width=4, codebook_size=7, width=12, num_layers=2, num_heads=2,
    mlp_ratio=3,
)  # fmt: skip


def shapes(net: nn.Module) -> Counter[tuple[int, ...]]:
    return Counter(tuple(p.shape) for p in net.parameters())


def planned(parameters: tuple[Parameter, ...]) -> Counter[tuple[int, ...]]:
    return sum((Counter({p.shape: p.count}) for p in parameters), Counter())


@pytest.mark.parametrize("config", [SMALL, PriorConfig(), PriorConfig(width=1920, num_heads=30)])
def test_parameters_of_the_prior(config: PriorConfig) -> None:
    with torch.device("meta"):
        net = Prior(config)
    work = PriorWorkload(config)
    assert planned(work.parameters) == shapes(net)
    counted = config.count_parameters()
    assert work.counts["text and padding tokens"] == counted.pop("text tokens") + counted.pop("padding tokens")
    assert {name: work.counts[name] for name in counted} == counted
    assert sum(work.counts.values()) == held(work.parameters) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("config", [DVAEConfig(), DVAEConfig(width=8, num_groups=2, blocks_per_group=3)])
def test_parameters_of_the_dvae(config: DVAEConfig) -> None:
    with torch.device("meta"):
        net = DVAE(config)
    work = DVAEWorkload(config)
    assert planned(work.parameters) == shapes(net)
    assert sum(work.counts.values()) == held(work.parameters)


@pytest.mark.parametrize(("width", "size"), [(1920, 2.8e9), (2688, 5.6e9), (3968, 12.0e9)])
def test_table_1_of_the_paper(width: int, size: float) -> None:
    counts = PriorWorkload(PriorConfig(width=width, num_heads=width // 64)).counts
    assert counts["matrices"] == pytest.approx(size, rel=0.012)  # the table gives two digits


def test_units_are_those_of_the_residual_blocks() -> None:
    net = Prior(SMALL)
    sizes = unit_sizes(PriorWorkload(SMALL).parameters)
    blocks = net.residual_blocks()
    for block in blocks:
        assert sum(p.numel() for p in block.branch.parameters()) == sizes[block.name.rpartition(".")[2]]
    inside = sum(p.numel() for block in blocks for p in block.branch.parameters())
    assert sizes[ROOT] == sum(p.numel() for p in net.parameters()) - inside


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.residual import shard_axis

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
config = PriorConfig(**eval(sys.argv[3]))
net = Prior(config)
mesh = init_device_mesh("cpu", (2,))
axes = {p: shard_axis(name, p.shape, 2) for name, p in net.named_parameters()}
options = dict(mesh=mesh, shard_placement_fn=lambda p: Shard(axes.get(p, 0)))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
for block in net.residual_blocks():
    fully_shard(block.branch, mp_policy=policy, **options)
fully_shard(net, **options)
net.register_fsdp_forward = None
from torch.distributed.fsdp import register_fsdp_forward_method
register_fsdp_forward_method(net, "loss")
optimizer = torch.optim.AdamW(net.parameters())
text = torch.zeros(1, config.text_length, dtype=torch.int64)
codes = torch.zeros(1, config.image_height, config.image_width, dtype=torch.int64)
with torch.autocast("cpu", torch.bfloat16):
    loss = net.loss(text, codes).total
loss.backward()
optimizer.step()
local = lambda tensors: sum(t.to_local().nbytes for t in tensors)
parameters = list(net.parameters())
moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
print(local(parameters), local(p.grad for p in parameters), local(moments))
dist.destroy_process_group()
"""


@pytest.mark.slow  # several processes
def test_shards_are_those_of_fully_shard(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT_FOLDER), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store"), repr(asdict(SMALL))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1] + outputs[1][1]
    parameters = PriorWorkload(SMALL).parameters
    weights = 4 * held(parameters, 2)
    assert [int(word) for word in outputs[0][0].split()] == [weights, weights, 2 * weights]  # the larger shards
    smaller = [int(word) for word in outputs[1][0].split()]
    assert smaller[0] + weights == 4 * held(parameters)
    assert smaller[0] < weights  # 11 and 7 and 3 and 5 rows do not divide by two


def test_the_second_matrix_of_the_mlp_is_sharded_over_its_inputs_where_they_divide() -> None:
    matrix = Parameter(name="layers.0.mlp.output.weight", shape=(12, 36), unit="mlp")
    assert matrix.shard_shape(4) == (12, 9)
    assert matrix.shard_shape(5) == (3, 36)  # as fully_shard, which divides only the first axis unevenly
    assert Parameter(name="layers.0.mlp.hidden.weight", shape=(36, 12), unit="mlp").shard_shape(4) == (9, 12)
