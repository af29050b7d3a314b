"""Sharded weights: loading restores them exactly, rejects damaged files before reading, and needs little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_zoo.model_folder import ModelFolderError
from dalle_zoo.models.prior import Prior
from dalle_zoo.networks import load_prior, save_network
from dalle_zoo.weights import load_weights, save_weights, without_storage

Maker = Callable[..., Prior]

ROOT = Path(__file__).parents[1]
PEAK = 1.15
"""Peak memory that loading may take, relative to the size of the weights."""


@pytest.fixture
def sharded(random_prior: Maker, tmp_path: Path) -> Path:
    """Folder of a prior in shards of at most 4 kB, except for larger tensors."""
    save_network(random_prior(), "prior", tmp_path, shard_bytes=4096)
    return tmp_path


def index(folder: Path) -> dict[str, str]:
    where: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return where


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ------------------------------------------------------------ shards


def test_shards_come_back_bit_by_bit(sharded: Path, random_prior: Maker) -> None:
    prior, files = random_prior(), shards(sharded)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (sharded / "model.safetensors").exists()
    assert set(index(sharded)) == set(prior.state_dict())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 4096
    back = load_prior(sharded)
    for name, tensor in prior.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    text, codes = torch.tensor([[1, 2, 12, 13]]), torch.zeros(1, 3, 4, dtype=torch.long)
    assert torch.equal(back(text, codes).image, prior(text, codes).image)
    assert all(p.requires_grad for p in back.parameters()), "it can be trained on"


def test_a_network_with_storage_is_filled_in_place(sharded: Path, random_prior: Maker) -> None:
    net = random_prior(seed=1)
    place = net.image_head.weight.data_ptr()
    load_weights(net, sharded / "model.safetensors")
    assert net.image_head.weight.data_ptr() == place, "an optimizer may hold it"
    assert torch.equal(net.image_head.weight, random_prior().image_head.weight)


def test_saving_takes_away_the_files_of_before(sharded: Path, random_prior: Maker) -> None:
    save_network(random_prior(), "prior", sharded)
    assert [p.name for p in shards(sharded)] == ["model.safetensors"]
    assert not (sharded / "model.safetensors.index.json").exists()
    save_network(random_prior(), "prior", sharded, shard_bytes=10**5)
    save_network(random_prior(seed=2), "prior", sharded, shard_bytes=4096)
    assert {p.name for p in shards(sharded)} == set(index(sharded).values())
    assert torch.equal(load_prior(sharded).start_of_text, random_prior(seed=2).start_of_text)
    (sharded / "model-ema.safetensors").write_bytes(b"mine")
    save_network(random_prior(), "prior", sharded)
    assert {path.name for path in sharded.glob("model*")} == {"model-ema.safetensors", "model.safetensors"}


def test_precision_when_loading(sharded: Path, random_prior: Maker) -> None:
    back = load_prior(sharded, dtype=torch.bfloat16)
    for name, tensor in random_prior().state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.bfloat16()), name
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        save_network(back, "prior", sharded, shard_bytes=0)


def test_buffers_that_no_file_holds_are_computed(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("ramp", torch.arange(3.0), persistent=False)

    assert without_storage(Net).ramp.tolist() == [0, 1, 2]
    save_weights(Net().state_dict(), {}, tmp_path, torch.float16)
    net = Net()
    net.count.zero_()
    load_weights(net, tmp_path / "model.safetensors")
    assert net.count == 3, "integers keep their kind when weights are stored in half precision"


# ------------------------------------------------------------ what is refused


def edit(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes one stored tensor."""
    path = folder / index(folder)[name]
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.long(), "start_of_text is stored as I64, expected F64 or F32 or F16 or BF16"),
        (lambda t: t.to(torch.float8_e4m3fn), "start_of_text is stored as F8_E4M3, expected"),
        (lambda t: t[:-1].clone(), r"start_of_text has shape \(15,\), expected \(16,\)"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("nan")), "not finite, in start_of_text"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("inf")), "not finite, in start_of_text"),
        (lambda t: t.half().index_fill(0, torch.tensor(3), -float("inf")), "not finite, in start_of_text"),
    ],
)
def test_broken_tensors_are_named(sharded: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    edit(sharded, "start_of_text", change)
    with pytest.raises(ModelFolderError, match=message):
        load_prior(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards(sharded)[1].unlink()
    with pytest.raises(ModelFolderError, match=r"model-00002-of-\d+.safetensors is missing: copy or download"):
        load_prior(sharded)


def test_a_shard_that_was_truncated_is_named(sharded: Path) -> None:
    path = shards(sharded)[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelFolderError, match=f"{path.name} is not a readable safetensors file"):
        load_prior(sharded)


def test_index_and_shards_that_differ_are_named(sharded: Path) -> None:
    path = shards(sharded)[0]
    save_file(load_file(path) | {"stray": torch.zeros(1)}, path)
    with pytest.raises(ModelFolderError, match=r"do not list the same tensors \(stray\)"):
        load_prior(sharded)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([], "has no weight_map"),
        ({"start_of_text": 3}, "has no weight_map"),
        ({"start_of_text": "../outside.safetensors"}, "names a file outside its folder"),
        ({"start_of_text": "/etc/hostname"}, "names a file outside its folder"),
    ],
)
def test_a_bad_index_is_refused(sharded: Path, where: object, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ModelFolderError, match=message):
        load_prior(sharded)


def test_nothing_is_read_unless_all_fits(sharded: Path, random_prior: Maker) -> None:
    net = random_prior(seed=1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    edit(sharded, "final_norm.weight", lambda t: t[:3].clone())
    with pytest.raises(ModelFolderError, match=r"final_norm.weight has shape"):
        load_weights(net, sharded / "model.safetensors")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


# ------------------------------------------------------------ memory


MEASURE = """
import sys
from pathlib import Path
import torch
from dalle_zoo.networks import load_prior, save_network
from dalle_zoo.weights import load_weights, save_weights, without_storage

def memory(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024

tiny, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
load_prior(tiny, dtype=dtype)  # what is imported and prepared on first use is not weights
before = memory("VmRSS")
prior = load_prior(folder, dtype=dtype)
print(memory("VmHWM") - before, sum(t.nbytes for t in prior.state_dict().values()))
"""


def peak(random_prior: Maker, tmp_path: Path, width: int, layers: int, dtype: str) -> float:
    """Peak memory while a separate process loads a prior, relative to the size of its weights."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured where Linux tells it")
    for name, sizes in (("tiny", {}), ("large", {"width": width, "num_layers": layers, "num_heads": 8})):
        (tmp_path / name).mkdir()
        save_network(random_prior(**sizes), "prior", tmp_path / name, shard_bytes=width * width * 40)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "large"), dtype],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    most, weights = map(int, done.stdout.split())
    assert weights > 50e6, "small things would drown in the noise"
    return most / weights


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_loading_takes_little_more_memory_than_the_weights(random_prior: Maker, tmp_path: Path, dtype: str) -> None:
    most = peak(random_prior, tmp_path, 512, 16 if dtype == "float32" else 32, dtype)
    assert 0.9 < most <= PEAK


@pytest.mark.slow
def test_a_model_of_a_gigabyte_takes_little_more_memory(random_prior: Maker, tmp_path: Path) -> None:
    assert 0.9 < peak(random_prior, tmp_path, 1024, 20, "float32") <= PEAK
