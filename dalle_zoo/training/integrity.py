"""Finds damage in checkpoints, and the newest checkpoint of a run that is intact.

A checkpoint file is a zip archive of PyTorch, which has a CRC-32 of every tensor. A folder of shards lists the size
and the SHA-256 of each shard in its ``state.pt``.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from pathlib import Path

from dalle_zoo.files import sha256_file
from dalle_zoo.training.sharded import DIGESTS, STATE, read_state

log = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint is cut, empty or changed."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("*.ckpt"))


def newest_intact(run: Path) -> Path | None:
    """The checkpoint of the highest step in a run folder that is not damaged; warns about each damaged one.

    Of shards, only the sizes are compared: each process compares the digests of its part when it loads them.

    Raises:
        DamagedCheckpointError: There are checkpoints, and all are damaged.
    """
    found: list[str] = []
    for path in reversed(list_checkpoints(run / "checkpoints")):
        damage = damage_of(path)
        if damage is None:
            return path
        log.warning("%s is damaged (%s): taking the checkpoint before it", path, damage)
        found.append(f"{path} ({damage})")
    if found:
        listed = ", ".join(found)
        raise DamagedCheckpointError(
            f"all checkpoints are damaged: {listed}. Restore one from a copy, or begin again with --overwrite"
        )
    return None


def check_intact(path: Path) -> None:
    """Raises `DamagedCheckpointError` if a checkpoint, a file or a folder of shards, is damaged."""
    damage = damage_of(path, digests=True)
    if damage is not None:
        raise damaged(path, damage)


def damaged(path: Path, damage: str) -> DamagedCheckpointError:
    """Returns the error that names a damaged checkpoint, and says what to do."""
    return DamagedCheckpointError(
        f"{path} is damaged ({damage}): remove it, and the same command takes the checkpoint before it"
    )


def damage_of(path: Path, part: int = 0, parts: int = 1, *, digests: bool = False) -> str | None:
    """Describes the damage of a checkpoint, None if there is none.

    Args:
        path: A file, or a folder of shards.
        part: Which of ``parts`` equal shares of the shards to read. Defaults to all.
        parts: Number of shares.
        digests: Whether to compare the digests of shards, and not only their sizes. Defaults to False.
    """
    if not path.is_dir():
        return _damage_of_zip(path)
    damage = _damage_of_zip(path / STATE)
    if damage is not None:
        return f"{STATE}: {damage}"
    listed = read_state(path).get(DIGESTS)
    if listed is None:
        log.warning("%s has no digests, so that only its structure is checked", path)
        return None if any(path.glob("*.safetensors")) else "it has no shards"
    for number, (name, (size, digest)) in enumerate(sorted(listed.items())):
        shard = path / name
        if not shard.is_file():
            return f"{name} is missing"
        if shard.stat().st_size != size:
            return f"{name} has {shard.stat().st_size} bytes, expected {size}"
        if digests and number % parts == part and sha256_file(shard) != digest:
            return f"{name} was changed: its digest is another one"
    return None


def _damage_of_zip(path: Path) -> str | None:
    """Compares the checksums of all members of a file that ``torch.save`` wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        return f"{path.stat().st_size} bytes that are not a complete archive: {error}"
    return None if changed is None else f"its part {changed!r} was changed"
