"""AdamW: like PyTorch's where nothing is clipped, by hand where it is, and on shards as on unsharded tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_zoo.training import AdamWConfig
from dalle_zoo.training import optimizer as module_under_test
from dalle_zoo.training.optimizer import ClippedAdamW, chunks, decayed_names, make_optimizer

ROOT = Path(__file__).parents[2]
SAME = {"rtol": 1e-7, "atol": 1e-7}
"""Both compute the same formula in float32."""
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.1}
UNREACHED = 1e6
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed: pip install dalle-zoo[moments]"
)
# torchao complains about torch's registration of its enumerations, and about extensions of other platforms.
quiet = pytest.mark.filterwarnings("ignore::Warning:torchao", "ignore::UserWarning", "ignore::FutureWarning")


def network(width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3))


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, updates: range) -> None:
    for seed in updates:
        give_gradients(net, seed)
        optimizer.step()


def clipped(net: nn.Module, **changes: Any) -> ClippedAdamW:
    return ClippedAdamW(net.parameters(), **{**SETTINGS, "variance_clip": UNREACHED, **changes})


def plain(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), **SETTINGS)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def make(config: AdamWConfig, net: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(net, config, 1e-2, decayed_names(net))


def test_without_clipping_equals_pytorch() -> None:
    left, right = network(), network()
    train(left, clipped(left), range(20))
    train(right, plain(right), range(20))
    torch.testing.assert_close(weights(left), weights(right), **SAME)
    assert not torch.allclose(left[0].weight, network()[0].weight)


@pytest.mark.parametrize("first", [clipped, plain])
@pytest.mark.parametrize("second", [clipped, plain])
def test_states_are_exchangeable_between_classes(first: Any, second: Any) -> None:
    net, twin = network(), network()
    train(twin, plain(twin), range(10))
    before = first(net)
    train(net, before, range(5))
    after = second(net)
    after.load_state_dict(before.state_dict())
    train(net, after, range(5, 10))
    torch.testing.assert_close(weights(net), weights(twin), **SAME)


def test_state_has_names_of_pytorch() -> None:
    left, right = network(), network()
    native, external = clipped(left), plain(right)
    train(left, native, range(1))
    train(right, external, range(1))
    left_states, right_states = native.state_dict()["state"], external.state_dict()["state"]
    assert left_states.keys() == right_states.keys()
    for index, state in left_states.items():
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in right_states[index].items()
        }


def test_clipped_variance_equals_manual_computation() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = ClippedAdamW([weight], lr=0.1, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, variance_clip=5.0)
    weight.grad = torch.tensor([4.0, 1.0])
    optimizer.step()
    # First value: m = 2, v = min(8, 5) = 5; the corrections divide both by 1/2: 0.1 * 4 / sqrt(10).
    # Second value: m = 0.5, v = 0.5, not clipped: 0.1 * 1 / 1.
    torch.testing.assert_close(weight.data, torch.tensor([1 - 0.1 * 4 / 10**0.5, 0.9]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], torch.tensor([5.0, 0.5]))
    weight.grad = torch.tensor([0.0, 0.0])
    before = weight.detach().clone()
    optimizer.step()
    # The stored variance was the clipped one: m = 1, v = 2.5, corrections of 3/4.
    moved = 0.1 * torch.tensor([1 / 0.75 / (2.5 / 0.75) ** 0.5, 0.25 / 0.75 / (0.25 / 0.75) ** 0.5])
    torch.testing.assert_close(weight.data, before - moved)
    assert optimizer.state[weight]["step"].item() == 2


@pytest.mark.parametrize("clip", [5.0, None])
def test_the_fused_update_equals_the_clipped_one(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(fused: bool) -> nn.Module:
        net = network()
        optimizer = clipped(net)
        optimizer.variance_clip = clip
        if not fused:
            monkeypatch.setattr(optimizer, "_clips_nothing", lambda *_: False)
        train(net, optimizer, range(20))
        return net

    torch.testing.assert_close(weights(trained(True)), weights(trained(False)), **SAME)


def test_large_gradients_are_not_updated_fused() -> None:
    optimizer = ClippedAdamW([nn.Parameter(torch.zeros(2))], lr=0.1, variance_clip=4.0)
    value = zeros = [torch.zeros(2)]

    def fused(*gradient: float, variance: float = 0.0) -> bool:
        return optimizer._clips_nothing(value, [torch.tensor(gradient)], zeros, [torch.tensor([0.0, variance])])

    assert fused(2.0, -2.0)
    assert not fused(0.0, -2.1)
    assert not fused(torch.nan, 0.0)
    assert fused(0.0, 0.0, variance=4.0)
    assert not fused(0.0, 0.0, variance=4.1)
    assert not optimizer._clips_nothing([torch.zeros(2, dtype=torch.float64)], zeros, zeros, zeros)


def test_a_loaded_variance_above_the_limit_is_clipped() -> None:
    net = network()
    before = plain(net)
    train(net, before, range(3))
    after = clipped(net, variance_clip=1e-4)
    after.load_state_dict(before.state_dict())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    after.step()
    assert max(float(state["exp_avg_sq"].max()) for state in after.state.values()) <= 1e-4


@pytest.mark.parametrize("clip", [UNREACHED, None])
def test_moments_in_another_memory_layout_are_loaded(clip: float | None) -> None:
    def resumed(layout: torch.memory_format) -> Tensor:
        net = nn.Conv2d(4, 5, 3, bias=False)
        net.weight = nn.Parameter(torch.linspace(-1, 1, 180).view(5, 4, 3, 3).to(memory_format=layout))
        optimizer = make_optimizer(net, AdamWConfig(variance_clip=clip), 0.1, frozenset())
        for update in range(3):
            net.zero_grad()
            (net(torch.linspace(-1, 1, 100).view(1, 4, 5, 5).sin()) * (update + 1)).square().sum().backward()
            optimizer.step()
            state = optimizer.state_dict()
            for moment in (s[name] for s in state["state"].values() for name in ("exp_avg", "exp_avg_sq")):
                moment.data = moment.contiguous()
            optimizer.load_state_dict(state)
        loaded = optimizer.state[net.weight]
        assert loaded["exp_avg"].stride() == loaded["exp_avg_sq"].stride() == net.weight.stride()
        return net.weight.detach()

    torch.testing.assert_close(resumed(torch.channels_last), resumed(torch.contiguous_format), rtol=1e-4, atol=1e-5)


def test_gradients_in_another_memory_layout_are_not_updated_fused() -> None:
    def trained(layout: torch.memory_format) -> Tensor:
        weight = nn.Parameter(torch.zeros(5, 4, 3, 3))
        optimizer = ClippedAdamW([weight], lr=0.1, variance_clip=UNREACHED)
        weight.grad = torch.linspace(-1, 1, 180).view(5, 4, 3, 3).to(memory_format=layout)
        optimizer.step()
        return weight.detach()

    torch.testing.assert_close(trained(torch.channels_last), trained(torch.contiguous_format))


@pytest.mark.parametrize("moments", ["float32", pytest.param("8bit", marks=[needs_torchao, quiet])])
def test_parameter_without_gradient_is_not_changed(moments: str) -> None:
    net = network(64)
    optimizer = clipped(net, moments=moments)
    train(net, optimizer, range(2))
    skipped, other = net[0].weight, net[2].weight
    before, moved = skipped.detach().clone(), other.detach().clone()
    moments_before = {name: v.clone() for name, v in optimizer.state_dict()["state"][0].items()}
    give_gradients(net, 2)
    skipped.grad = None
    optimizer.step()
    assert torch.equal(skipped, before), "no weight decay either"
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(after[name], moments_before[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert not torch.equal(other, moved)
    assert optimizer.state[other]["step"].item() == 3
    # Counts now differ between parameters, which are still updated together.
    twin = network(64)
    expected = clipped(twin, moments=moments)
    expected.load_state_dict(optimizer.state_dict())
    assert [s["step"].item() for s in expected.state.values()] == [2, 3, 3, 3, 3, 3]


def test_skipped_step_changes_nothing() -> None:
    net = network()
    optimizer = clipped(net)
    train(net, optimizer, range(2))
    before = weights(net)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))


def test_closure_computes_gradients_and_loss() -> None:
    net = network()
    optimizer = clipped(net)

    def closure() -> Tensor:
        loss = net(torch.ones(1, 8)).square().sum()
        loss.backward()
        return loss.detach()

    before = weights(net)
    assert float(optimizer.step(closure)) > 0  # type: ignore[arg-type]
    assert not torch.equal(before[0], net[0].weight)


def test_chunks_contain_all_parameters_within_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = network(), network()
    train(left, clipped(left), range(3))
    monkeypatch.setattr(module_under_test, "CHUNK", 70)
    parameters = list(right.parameters())
    found = list(chunks(parameters))
    assert [p.numel() for chunk in found for p in chunk] == [p.numel() for p in parameters]
    assert all(len(chunk) == 1 or sum(p.numel() for p in chunk) <= 70 for chunk in found)
    assert 1 < len(found) < len(parameters)
    train(right, clipped(right), range(3))
    torch.testing.assert_close(weights(left), weights(right), rtol=0, atol=0)


@needs_torchao
@quiet
@pytest.mark.parametrize("moments", ["8bit", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduced_moments_stay_near_float32(moments: str, dtype: torch.dtype) -> None:
    left, right = network(64).to(dtype), network(64).to(dtype)
    start = [p.float() for p in weights(right)]
    reduced = clipped(left, moments=moments, weight_decay=0.0)
    train(left, reduced, range(20))
    train(right, clipped(right, weight_decay=0.0), range(20))
    gap = left[0].weight.float() - right[0].weight.float()
    way = right[0].weight.float() - start[0]
    assert 0 < gap.norm() < 0.1 * way.norm()
    # One byte a value and a float32 for every 256; small tensors stay as they are.
    retained = reduced.state[left[0].weight]["exp_avg"]
    assert retained.codes.element_size() == 1
    assert retained.scale.numel() == 64 * 64 // 256
    assert type(reduced.state[left[1].weight]["exp_avg"]) is Tensor
    assert left[0].weight.dtype == dtype


@needs_torchao
@quiet
@pytest.mark.parametrize("moments", ["8bit", "fp8"])
def test_reduced_moments_are_clipped_too(moments: str) -> None:
    net = network(64)
    optimizer = clipped(net, moments=moments, variance_clip=1e-3)
    train(net, optimizer, range(3))
    variance = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    assert variance.max() == pytest.approx(1e-3)


@needs_torchao
@quiet
@pytest.mark.parametrize("moments", ["8bit", "fp8"])
def test_state_stores_reduced_moments_in_float32(moments: str, tmp_path: Path) -> None:
    net = network(64)
    optimizer = clipped(net, moments=moments)
    train(net, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {type(v) for values in state["state"].values() for v in values.values()} == {Tensor}
    assert {v.dtype for values in state["state"].values() for v in values.values()} == {torch.float32}
    again = clipped(net, moments=moments)
    again.load_state_dict(state)
    assert type(again.state[net[0].weight]["exp_avg"]) is type(optimizer.state[net[0].weight]["exp_avg"])
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = state["state"][0][name], again.state_dict()["state"][0][name]
        assert (before - after).norm() < 0.02 * before.norm()  # rounded once more
    plain(net).load_state_dict(state)


def test_only_matrices_decay() -> None:
    net = network()
    net[2].weight.requires_grad_(False)
    for config in (AdamWConfig(weight_decay=0.5), AdamWConfig(weight_decay=0.5, variance_clip=5.0)):
        optimizer = make(config, net)
        decayed, others = optimizer.param_groups
        assert [tuple(p.shape) for p in decayed["params"]] == [(8, 8)]
        assert [tuple(p.shape) for p in others["params"]] == [(8,), (8,), (8,), (3,)]
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2}


def test_names_instead_of_shapes_decide_decay() -> None:
    net = network()
    names = decayed_names(net)
    assert names == {"0.weight", "2.weight"}
    for p in net.parameters():
        p.data = p.data.flatten()  # as FSDP1 does
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", net)
    optimizer = make_optimizer(wrapped, AdamWConfig(variance_clip=5.0), 1e-2, names)
    assert [p.numel() for p in optimizer.param_groups[0]["params"]] == [64, 24]
    with pytest.raises(ValueError, match=r"no parameter '2\.weight': expected one of"):
        make_optimizer(net[:2], AdamWConfig(), 1e-2, names)


def test_optimizer_class_depends_on_settings() -> None:
    assert type(make(AdamWConfig(), network())) is torch.optim.AdamW
    optimizer = make(AdamWConfig(beta1=0.8, beta2=0.96, eps=1e-6, variance_clip=5.0), network())
    assert isinstance(optimizer, ClippedAdamW)
    assert optimizer.variance_clip == 5.0
    assert optimizer.defaults["betas"] == (0.8, 0.96)
    assert optimizer.defaults["eps"] == 1e-6


@pytest.mark.gpu
def test_adamw_on_gpu_is_fused_and_supports_scaling() -> None:
    net = network().cuda()
    optimizer = make(AdamWConfig(), net)
    assert optimizer.param_groups[0]["fused"]
    scaler = torch.amp.GradScaler(init_scale=2.0**10)
    scaler.scale(net(torch.ones(1, 8, device="cuda")).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    moved = make(AdamWConfig(variance_clip=5.0), net)
    moved.load_state_dict(optimizer.state_dict())
    assert {state["step"].device.type for state in moved.state.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1.0),
        ("weight_decay", -1.0),
        ("variance_clip", 0.0),
        ("moments", "4bit"),
    ],
)
def test_settings_out_of_range_raise(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must .*got {value!r}"):
        AdamWConfig(**{field: value})


def test_reduced_moments_without_torchao_raise_with_install_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao.optim.subclass_8bit", "torchao.optim.subclass_fp8"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"moments '8bit' needs torchao: pip install dalle-zoo\[moments\]"):
        make(AdamWConfig(moments="8bit"), network())


# The same steps on shards in two processes and on unsharded tensors in one; the state goes through a checkpoint
# folder.
SHARDED = """
import sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from dalle_zoo.training import AdamWConfig
from dalle_zoo.training.optimizer import decayed_names, make_optimizer

rank, moments, folder = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}.meet")
mesh = init_device_mesh("cpu", (2,))

def build(sharded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 63), nn.LayerNorm(63))  # 63 values do not divide
    if sharded:
        fully_shard(net, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.shape == (63, 512) else Shard(0))
    config = AdamWConfig(variance_clip=0.5, weight_decay=0.1, moments=moments)
    return net, make_optimizer(net, config, 1e-2, decayed_names(net))

def train(net, optimizer, updates):
    for update in updates:
        batch = torch.randn(5, 64, generator=torch.Generator().manual_seed(update))  # the same everywhere
        net(batch).square().sum().mul(100).backward()
        if update == 1:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()

def complete(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()

def same(left, right):
    if moments == "float32":
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    else:  # other blocks share a scale
        assert (left - right).norm() < 0.05 * (left.norm() + 1e-6), (left, right)

alone, single = build(False)
net, optimizer = build(True)
train(alone, single, range(4))
train(net, optimizer, range(4))
for left, right in zip(alone.parameters(), net.parameters(), strict=True):
    same(left.detach(), complete(right))
state = {"optimizer": get_optimizer_state_dict(net, optimizer)}
assert all(type(v["exp_avg"]) is DTensor and v["exp_avg"].dtype == torch.float32
           for v in state["optimizer"]["state"].values())
assert max(v["exp_avg_sq"].to_local().max() for v in state["optimizer"]["state"].values()) <= 0.5 * 1.001
dcp.save(state, checkpoint_id=folder)

# Into unsharded tensors, and into shards again: both go on alike.
for sharded in (False, True):
    other, again = build(sharded)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        p.data.copy_(q.data if sharded else complete(q))
    filled = {"optimizer": get_optimizer_state_dict(other, again)}
    dcp.load(filled, checkpoint_id=folder)
    set_optimizer_state_dict(other, again, filled["optimizer"])
    train(other, again, range(4, 6))
    if not sharded:
        from_unsharded = [p.detach() for p in other.parameters()]
for left, right in zip(from_unsharded, other.parameters(), strict=True):
    same(left, complete(right))
train(alone, single, range(4, 6))
for left, right in zip(alone.parameters(), from_unsharded, strict=True):
    same(left.detach(), right)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param("float32", marks=pytest.mark.slow),
        pytest.param("8bit", marks=[needs_torchao, pytest.mark.slow]),
    ],
)
def test_shards_are_updated_like_unsharded_tensors(moments: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), moments, str(tmp_path / "state")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err for _, err in said)
    assert all("done" in out for out, _ in said)
