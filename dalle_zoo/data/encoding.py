"""Encodes a source as the code shards of `dalle_zoo.data.codes`, resumable after an interruption."""

from __future__ import annotations

import io
import itertools
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dalle_zoo.claims import CLAIM
from dalle_zoo.data.checks import changed_settings, check_positive
from dalle_zoo.data.code_files import FORMAT, MANIFEST, UNFINISHED
from dalle_zoo.data.codes import CodeShardWriter, read_member
from dalle_zoo.data.datasets import crop_of
from dalle_zoo.data.decoding import CorruptImageError
from dalle_zoo.data.samples import SampleSource, Skipped, captioned
from dalle_zoo.data.transforms import TRANSFORMS, Transform
from dalle_zoo.files import atomic_write, parse_json, sha256_file, try_read_json, write_json
from dalle_zoo.sharing import Share, complete_parts, remove_claims
from dalle_zoo.workspaces import RESUMABLE, SUFFIX, claimed_folder, place_folder, recover, workspace

log = logging.getLogger(__name__)

MAX_NAMED = 10_000
"""Skipped samples that the manifest names, whose size is limited; each shard names all of its own."""

Encode = Callable[[Tensor], Tensor]
"""Pixels in [0, 1], float32 (B, 3, size, size), to codes, integers (B, h, w)."""
_Encoded = tuple[str, Sequence[str], Tensor]
"""Key, captions, and crops (variants, 3, size, size) or codes (variants, h, w)."""


@dataclass(frozen=True)
class _Encoding:
    """All settings that determine the contents of a shard."""

    source: SampleSource
    encode: Encode
    transform: Transform
    size: int
    seed: int
    variants: int
    batch_size: int

    def samples(self, start: int, stop: int, lost: dict[str, str]) -> Iterator[_Encoded]:
        """Encodes samples ``start .. stop - 1``; reasons for unusable ones are added to ``lost``."""
        crops = self._crops(start, stop, lost)
        while group := list(itertools.islice(crops, max(1, self.batch_size // self.variants))):
            pixels = torch.cat([pixels for _, _, pixels in group]).float().div_(255)
            codes = torch.cat([self.encode(part) for part in torch.split(pixels, self.batch_size)])
            for (key, captions, _), own in zip(group, torch.split(codes, self.variants), strict=True):
                yield key, captions, own

    def _crops(self, start: int, stop: int, lost: dict[str, str]) -> Iterator[_Encoded]:
        for record in self.source.read(seed=None, epoch=0, start=start, stop=stop):
            try:
                usable = captioned(record)
                if isinstance(usable, Skipped):
                    raise CorruptImageError(usable.reason)
                crops = [
                    crop_of(usable, self.transform, self.size, self.seed, variant) for variant in range(self.variants)
                ]
            except CorruptImageError as error:
                if record.key not in lost:  # a shard has one key for all samples that it lacks
                    log.warning("skipped %s: %s", record.key, error)
                lost.setdefault(record.key, str(error))
            else:
                yield usable.key, usable.captions, torch.stack(crops)


def encode_source(
    source: SampleSource,
    encode: Encode,
    out: str | Path,
    *,
    size: int,
    info: Mapping[str, Any],
    variants: int = 1,
    seed: int = 0,
    transform: str = "prior",
    batch_size: int = 64,
    samples_per_shard: int = 16384,
    chunk: int = 256,
    progress: bool = True,
    overwrite: bool = False,
    share: Share | None = None,
) -> dict[str, Any]:
    """Encodes every captioned image of a source as code shards.

    Variant v of a sample is the crop that training on images uses in epoch v. Samples without a caption or with a
    corrupt image are skipped, and named in a warning and in the manifest. After an interruption, the same call
    continues after the last complete shard and writes the same files as an uninterrupted one.

    Args:
        source: The images.
        encode: The image tokenizer's ``encode``, on any device.
        out: Folder of the shards; created if it does not exist.
        size: Side of the crops, pixels.
        info: Plain data about the tokenizer for the manifest: ``codebook_size`` (required), its name, the SHA-256 of
            its weights.
        variants: Crops per image. Defaults to 1.
        seed: Seed of the crops. Defaults to 0.
        transform: Name in `TRANSFORMS`. Defaults to that of stage 2.
        batch_size: Maximum number of crops per call of ``encode``. Defaults to 64.
        samples_per_shard: Listed samples per shard. Defaults to 16384.
        chunk: Samples per member of a shard. Defaults to 256.
        progress: Whether to show a progress bar. Defaults to True.
        overwrite: Whether to replace the code shards in ``out``. A finished encoding is replaced once the new one is
            finished; until then, that is in a hidden folder next to it. Defaults to False.
        share: Which shards this process begins with, if several processes make the same call (`dalle_zoo.sharing`).
            Each returns when all shards are complete. Defaults to all shards, and to being the only process.

    Returns:
        The content of ``manifest.json``.

    Raises:
        ClaimedError: Another process, which does not share the work, encodes into the same folder.
        ValueError: An option is invalid, the folder has other contents, or no sample is usable.

    Example:
        >>> import tempfile
        >>> from dalle_zoo.data import CodeDataset, FolderSource
        >>> def encode(pixels: Tensor) -> Tensor:  # codes of 0 to 15: the brightness of every pixel
        ...     return (pixels.mean(1) * 15).round().long()
        >>> with tempfile.TemporaryDirectory() as images, tempfile.TemporaryDirectory() as out:
        ...     _ = Path(images, "dot.ppm").write_bytes(b"P6 1 1 255 " + bytes([255, 255, 255]))
        ...     _ = Path(images, "dot.txt").write_text("a white dot")
        ...     info = {"codebook_size": 16}
        ...     _ = encode_source(FolderSource(Path(images)), encode, out, size=2, info=info, progress=False)
        ...     next(iter(CodeDataset(out)))
        {'key': 'dot', 'codes': tensor([[15, 15],
                [15, 15]]), 'caption': 'a white dot'}
    """
    check_positive(
        size=size,
        variants=variants,
        batch_size=batch_size,
        samples_per_shard=samples_per_shard,
        chunk=chunk,
    )
    codebook_size = info.get("codebook_size")
    if not isinstance(codebook_size, int):
        raise ValueError(f"info must have an integer codebook_size, the number of codes, got {dict(info)}")
    encoding = _Encoding(source, encode, TRANSFORMS[transform], size, seed, variants, batch_size)
    settings = {
        "format": FORMAT,
        "size": size,
        "variants": variants,
        "seed": seed,
        "transform": transform,
        "samples_per_shard": samples_per_shard,
        "chunk": chunk,
        "source": source.fingerprint(),
        "tokenizer": dict(info),
    }
    folder = Path(out).resolve()  # two names of one folder are one destination
    if share is not None and share.world > 1:
        if overwrite:
            raise ValueError(f"overwrite is for one process, got {share.world}: remove {str(folder)!r} first")
        return _encode_together(folder, encoding, settings, progress, share)
    recover(folder)
    replaces = overwrite and (try_read_json(folder / MANIFEST) or {}).get("format") == FORMAT
    if not replaces:
        return _encode_into(folder, encoding, settings, progress, overwrite)
    _refuse_unknown_files(folder)
    with workspace(folder, wait=False) as aside:
        manifest = _encode_into(aside / RESUMABLE, encoding, settings, progress, overwrite)
        _refuse_unknown_files(folder)  # and what came in the meantime
        place_folder(aside / RESUMABLE, folder, replace=True)
    return manifest


def _encode_into(
    folder: Path, encoding: _Encoding, settings: Mapping[str, Any], progress: bool, overwrite: bool
) -> dict[str, Any]:
    with claimed_folder(folder):
        finished = _begin(folder, settings, overwrite)
        if finished is not None:
            return finished
        paths = _encode_shards(folder, encoding, settings, progress, Share())
        return _finish(folder, settings, paths)


def _encode_together(
    folder: Path, encoding: _Encoding, settings: Mapping[str, Any], progress: bool, share: Share
) -> dict[str, Any]:
    """Encodes with other processes, which claim single shards; one of them writes the manifest."""
    with claimed_folder(folder, wait=True):
        finished = _finished(folder, settings) or _begin(folder, settings, overwrite=False)
    if finished is not None:
        return finished
    paths = _encode_shards(folder, encoding, settings, progress, share)
    with claimed_folder(folder, wait=True):
        return _finished(folder, settings) or _finish(folder, settings, paths)


def _finished(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the manifest of a finished encoding with the same settings."""
    manifest = try_read_json(folder / MANIFEST)
    same = manifest is not None and all(manifest.get(name) == value for name, value in settings.items())
    return manifest if same and not (folder / UNFINISHED).exists() else None


def _encode_shards(
    folder: Path, encoding: _Encoding, settings: Mapping[str, Any], progress: bool, share: Share
) -> list[Path]:
    """Encodes the shards that are missing, and returns the paths of all."""
    total = encoding.source.num_samples
    starts = range(0, total, settings["samples_per_shard"])
    paths = [folder / f"codes-{number:05d}.tar" for number in range(len(starts))]
    stops = [*starts[1:], total]
    with tqdm(total=total, desc="encode", unit="image", disable=None if progress else True) as bar:
        complete = 0

        def make(number: int) -> None:
            path = paths[number]
            with atomic_write(path) as temporary:
                with CodeShardWriter(
                    temporary, codebook_size=settings["tokenizer"]["codebook_size"], chunk=settings["chunk"]
                ) as writer:
                    _fill(writer, encoding, starts[number], stops[number], bar)
                # Before the shard: once all shards exist, another process finishes and removes the descriptions.
                write_json(_description(path), asdict(replace(_measure(temporary), file=path.name)))

        def done(number: int) -> None:
            nonlocal complete
            complete += stops[number] - starts[number]
            bar.update(complete - bar.n)

        complete_parts(paths, make, share, done=done)
    return paths


def _fill(writer: CodeShardWriter, encoding: _Encoding, start: int, stop: int, bar: tqdm[Any]) -> None:
    lost: dict[str, str] = {}
    for key, captions, codes in encoding.samples(start, stop, lost):
        writer.add(key, captions, codes)
        bar.update()
    writer.finish(lost)


def _finish(folder: Path, settings: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    remove_claims(folder)
    shards = [_describe(path) for path in paths]
    skipped = {key: reason for shard in shards for key, reason in shard.skipped.items()}
    grids = {tuple(shard.grid) for shard in shards if shard.grid is not None}
    if len(grids) != 1:
        _remove_code_files(folder)
        named = "; ".join(f"{key}: {reason}" for key, reason in list(skipped.items())[:3])
        raise ValueError(
            f"no sample of the source can be used: {named}"
            if not grids
            else f"encode must give one grid of codes for all images, got {sorted(grids)}"
        )
    manifest = {
        **settings,
        "count": sum(shard.samples for shard in shards),
        "grid": list(grids.pop()),
        "num_skipped": len(skipped),
        "skipped": dict(itertools.islice(skipped.items(), MAX_NAMED)),
        "shards": [{"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in shards],
    }
    write_json(folder / MANIFEST, manifest)
    _end(folder)
    return manifest


def _end(folder: Path) -> None:
    """Removes what only an unfinished encoding needs. Another process may have done so, where there are no locks."""
    for description in folder.glob("codes-*.json"):
        description.unlink(missing_ok=True)
    (folder / UNFINISHED).unlink(missing_ok=True)


def _begin(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Prepares a claimed folder for an encoding, or raises `ValueError`.

    Returns:
        The manifest if the same encoding was interrupted after writing it, else None.
    """
    unfinished = try_read_json(folder / UNFINISHED)
    finished = try_read_json(folder / MANIFEST)
    if unfinished == settings:
        if finished is not None:
            _end(folder)
        return finished
    if unfinished is not None and not overwrite:
        raise ValueError(
            f"out {str(folder)!r} holds an unfinished encoding with other settings "
            f"({changed_settings(unfinished, settings)}): use those settings, choose another folder, or overwrite"
        )
    if finished is not None and not overwrite:
        raise ValueError(f"out {str(folder)!r} holds a finished encoding: choose another folder, or overwrite")
    _refuse_unknown_files(folder)
    if not overwrite and any(path.name.startswith("codes-") for path in folder.iterdir()):
        raise ValueError(f"out {str(folder)!r} holds code shards without a manifest: choose an empty folder")
    _remove_code_files(folder)
    write_json(folder / UNFINISHED, settings)
    return None


def _refuse_unknown_files(folder: Path) -> None:
    others = [path.name for path in folder.iterdir() if not path.name.endswith((CLAIM, SUFFIX))]
    unknown = sorted(name for name in others if not _is_code_file(name))
    manifest = try_read_json(folder / MANIFEST)
    unknown += [MANIFEST] if manifest is not None and manifest.get("format") != FORMAT else []
    if unknown:
        raise ValueError(f"out {str(folder)!r} holds other files ({', '.join(unknown[:3])}): choose an empty folder")


def _is_code_file(name: str) -> bool:
    return name in (MANIFEST, UNFINISHED) or re.fullmatch(r"codes-\d{5,}\.(tar|json)", name) is not None


def _remove_code_files(folder: Path) -> None:
    # The manifest first: without it, shards do not count as a finished encoding.
    found = [path for path in folder.iterdir() if _is_code_file(path.name)]
    for path in sorted(found, key=lambda path: path.name != MANIFEST):
        path.unlink()


@dataclass(frozen=True)
class _Shard:
    file: str
    samples: int
    bytes: int
    sha256: str
    grid: Sequence[int] | None
    """Height and width of the code grid; None if no sample of the shard was usable."""
    skipped: dict[str, str]


def _description(path: Path) -> Path:
    return path.with_suffix(".json")


def _describe(path: Path) -> _Shard:
    """Describes a shard, as the process that wrote it did: one process alone would take long to read all of them."""
    known = try_read_json(_description(path))
    return _measure(path) if known is None else _Shard(**known)


def _measure(path: Path) -> _Shard:
    samples, grid, skipped = 0, None, {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.name.endswith(".npy"):
                shape = np.load(io.BytesIO(read_member(archive, member)), allow_pickle=False).shape
                samples, grid = samples + shape[0], shape[2:]
            elif member.name == "skipped.json":
                skipped = parse_json(read_member(archive, member), f"{path}: {member.name}")
    return _Shard(path.name, samples, path.stat().st_size, sha256_file(path), grid, skipped)
