"""Parameters and shards against the networks themselves."""

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
from dalle_zoo.planning.dvae import DVAEWork
from dalle_zoo.planning.parameters import ROOT, Parameter, by_kind, held, unit_sizes
from dalle_zoo.planning.prior import PriorWork

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
def test_the_prior_has_these_parameters(config: PriorConfig) -> None:
    with torch.device("meta"):
        net = Prior(config)
    assert planned(PriorWork(config).parameters) == shapes(net)
    kinds, counted = by_kind(PriorWork(config).parameters), config.count_parameters()
    assert kinds["text and padding tokens"] == counted.pop("text tokens") + counted.pop("padding tokens")
    assert {name: kinds[name] for name in counted} == counted


@pytest.mark.parametrize("config", [DVAEConfig(), DVAEConfig(width=8, num_groups=2, blocks_per_group=3)])
def test_the_dvae_has_these_parameters(config: DVAEConfig) -> None:
    with torch.device("meta"):
        net = DVAE(config)
    assert planned(DVAEWork(config).parameters) == shapes(net)


@pytest.mark.parametrize(("width", "size"), [(1920, 2.8e9), (2688, 5.6e9), (3968, 12.0e9)])
def test_table_1_of_the_paper(width: int, size: float) -> None:
    kinds = by_kind(PriorWork(PriorConfig(width=width, num_heads=width // 64)).parameters)
    assert kinds["matrices"] == pytest.approx(size, rel=0.012)  # it gives two digits


def test_units_are_those_of_the_residual_blocks() -> None:
    net = Prior(SMALL)
    sizes = unit_sizes(PriorWork(SMALL).parameters)
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

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
config = PriorConfig(**eval(sys.argv[3]))
net = Prior(config)
mesh = init_device_mesh("cpu", (2,))
second = {p for name, p in net.named_parameters() if name.endswith("mlp.output.weight")}
options = dict(mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p in second else 0))
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
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1] + said[1][1]
    parameters = PriorWork(SMALL).parameters
    weights = 4 * held(parameters, 2)
    assert [int(word) for word in said[0][0].split()] == [weights, weights, 2 * weights]  # the larger shards
    smaller = [int(word) for word in said[1][0].split()]
    assert smaller[0] + weights == 4 * held(parameters)
    assert smaller[0] < weights  # 11 and 7 and 3 and 5 rows do not divide by two
