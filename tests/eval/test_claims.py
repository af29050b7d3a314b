"""Claims of feature chunks: any number of processes compute each chunk once; a killed process releases its claims."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageBatch
from torch import Tensor

from dalle_zoo.sharing import Share

SAMPLES, CHUNK = 40, 2
ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from dalle_zoo.claims import Claims
assert Claims().take(Path(sys.argv[1]), wait=False)
print("mine", flush=True)
time.sleep(600)
"""


class Colors:
    """Images of one color each."""

    identity: dict[str, Any] = {"kind": "colors"}  # noqa: RUF012
    counts = [1]  # noqa: RUF012

    def __len__(self) -> int:
        return SAMPLES

    def load(self, indices: Sequence[int]) -> ImageBatch:
        images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in indices]
        return ImageBatch(images={1: images}, chosen={1: [0] * len(images)}, captions=[""] * len(images), others=[])


class Slow:
    """A slow extractor that records its inputs."""

    name = "slow"
    record: dict[str, str | int] = {"sha256": "0"}  # noqa: RUF012

    def __init__(self, seconds: float) -> None:
        self.seconds, self.seen = seconds, Counter[int]()

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        self.seen.update(images[:, 0, 0, 0].tolist())
        return {"features": images.float().flatten(1)}


def test_processes_of_different_speed_compute_each_chunk_once(tmp_path: Path) -> None:
    network = {rank: Slow(seconds) for rank, seconds in enumerate((0.001, 0.02, 0.04))}

    def work(rank: int) -> None:
        measured = FeatureStore(Colors(), {"slow": network[rank]}, (0,), CHUNK, tmp_path)
        measured.run(Share(rank=rank, world=3), label=f"process {rank}")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in network]
    for thread in threads:
        thread.start()
    threads[0].join()  # the first process ends with everything measured
    assert len(list(tmp_path.rglob("*.safetensors"))) == SAMPLES // CHUNK
    for thread in threads[1:]:
        thread.join()
    assert sum((slow.seen for slow in network.values()), Counter()) == dict.fromkeys(range(SAMPLES), 1)
    assert len(network[0].seen) > len(network[2].seen) > 0
    assert not list(tmp_path.rglob("*.claim"))


def test_claims_of_killed_process_are_computed_by_the_first(tmp_path: Path) -> None:
    network = Slow(0)
    measured = FeatureStore(Colors(), {"slow": network}, (0,), CHUNK, tmp_path)
    path = measured.path("slow", 3).with_suffix(".claim")
    path.parent.mkdir()
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"}
    with subprocess.Popen([sys.executable, "-c", OWNER, str(path)], env=environment, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        first = threading.Thread(target=measured.run, args=(Share(),), kwargs={"label": "first"})
        first.start()
        while len(network.seen) < SAMPLES - CHUNK:
            time.sleep(0.01)
        first.join(0.2)
        assert first.is_alive()  # it waits for the other one
        assert not measured.path("slow", 3).exists()
        owner.send_signal(signal.SIGKILL)
        first.join(20)
    assert not first.is_alive()
    assert network.seen == dict.fromkeys(range(SAMPLES), 1)


def test_error_releases_claims(tmp_path: Path) -> None:
    class Broken(Slow):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        FeatureStore(Colors(), {"slow": Broken(0)}, (0,), CHUNK, tmp_path).run(Share(), label="broken")
    network = Slow(0)
    FeatureStore(Colors(), {"slow": network}, (0,), CHUNK, tmp_path).run(Share(), label="again")
    assert len(network.seen) == SAMPLES
