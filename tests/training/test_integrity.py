"""Damaged checkpoints are reported, and earlier ones are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle_zoo.files import sha256_file
from dalle_zoo.training.checkpoints import AtomicCheckpointIO, consolidate
from dalle_zoo.training.integrity import DamagedCheckpointError, check_intact, damage_of, newest_intact
from dalle_zoo.training.sharded import DIGESTS, STATE


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Changes a byte inside of a tensor."""
    data = bytearray(path.read_bytes())
    where = data.find(torch.arange(1000.0).numpy().tobytes()[400:440])
    assert where > 0
    data[where] ^= 0xFF
    path.write_bytes(data)


DAMAGES: list[Callable[[Path], None]] = [cut, empty, flip]


def save(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "state_dict": {"net.x": torch.arange(1000.0)}}, path)
    return path


def save_shards(run: Path, step: int) -> Path:
    """A checkpoint folder of a sharded strategy."""
    path = run / "checkpoints" / f"{step:08d}.ckpt"
    path.mkdir(parents=True)
    shards = [path / f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in (1, 2)]
    for shard in shards:
        save_file({"model/net.x": torch.arange(1000.0)}, shard)
    listed = {shard.name: [shard.stat().st_size, sha256_file(shard)] for shard in shards}
    torch.save({"global_step": step, DIGESTS: listed}, path / STATE)
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_before_damaged_one_is_used(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 3), save(tmp_path, 6)
    assert newest_intact(tmp_path) == newer
    damage(newer)
    assert newest_intact(tmp_path) == older
    assert f"{newer} is damaged" in caplog.text
    with pytest.raises(DamagedCheckpointError, match=r"00000006.ckpt is damaged \(.*\): remove it"):
        consolidate(newer, tmp_path)
    damage(older)
    with pytest.raises(DamagedCheckpointError, match=r"all checkpoints are damaged: .*00000006.*00000003"):
        newest_intact(tmp_path)
    assert newest_intact(tmp_path / "none") is None


def test_damaged_shards_raise_with_their_names(tmp_path: Path) -> None:
    older, newer = save_shards(tmp_path, 3), save_shards(tmp_path, 6)
    shard = sorted(newer.glob("*.safetensors"))[1]
    check_intact(newer)
    flip(shard)
    assert newest_intact(tmp_path) == newer, "digests are compared when the shards are loaded, by all processes"
    assert damage_of(newer, part=0, parts=2, digests=True) is None
    assert "shard-00002" in str(damage_of(newer, part=1, parts=2, digests=True))
    with pytest.raises(DamagedCheckpointError, match=r"shard-00002.* was changed"):
        check_intact(newer)
    cut(shard)
    assert newest_intact(tmp_path) == older
    shard.unlink()
    assert "is missing" in str(damage_of(newer))
    cut(newer / STATE)
    assert "state.pt: " in str(damage_of(newer))


def test_shards_without_digests_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_shards(tmp_path, 3)
    torch.save({"global_step": 3}, path / STATE)
    assert newest_intact(tmp_path) == path
    assert "has no digests" in caplog.text
