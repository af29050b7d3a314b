"""Damages files at random and reads them: weights may raise only `WeightFileError`, shards and manifests `ValueError`.

    python tools/fuzz_readers.py --seconds 60
    python tools/fuzz_readers.py --seed 0 --case 1234     # repeats one case and prints its traceback

A case depends only on the seed and its number. It fails with any other exception, after more than `CASE_SECONDS`, or
if all cases together use more memory than `MEMORY`.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save

from dalle_zoo.convert import WeightFileError, inspect_files, open_checkpoint, recognize
from dalle_zoo.convert.object_pickles import load_objects
from dalle_zoo.data import CodeDataset, ShardSource, Skipped
from dalle_zoo.data.code_files import FORMAT
from dalle_zoo.files import FileError
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.external.vqgan import VQGAN, VQGANConfig

CASE_SECONDS = 10
MEMORY = 4 * 2**30
"""Bytes of address space in addition to that of the process at the start."""
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]
OPCODES = b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu)]}" + bytes(range(0x80, 0x99))


class TooSlowError(BaseException):
    """A case that takes too long. No `Exception`, so that no reader takes it for damage."""


def too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {CASE_SECONDS} s")


# ---------------------------------------------------------------- undamaged files


def dvae_weights() -> dict[str, torch.Tensor]:
    """A small dVAE under the names of transformers."""
    config = DVAEConfig(image_size=16, width=4, num_groups=2, blocks_per_group=1, decoder_stem=4, codebook_size=6)
    names = {}
    for name, tensor in DVAE(config).encoder.state_dict().items():
        name = (
            name.replace("skip", "id_path").replace("conv_", "res_path.path.conv_").replace("block_", "group.block_")
        )
        name = name.removeprefix("groups.").replace("output.", "output.conv.")
        names[f"blocks.{name}"] = tensor
    return names


def vqgan_weights() -> dict[str, torch.Tensor]:
    """A small VQGAN, whose names are those of taming-transformers."""
    config = VQGANConfig(
        image_size=8,
        width=32,
        multipliers=(1, 1),
        blocks_per_level=1,
        attention_sizes=(),
        code_channels=4,
        codebook_size=8,
    )
    return VQGAN(config).state_dict()


def packed(value: Any) -> bytes:
    """MessagePack of mappings and arrays, as Flax writes them."""
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
        return head + b"".join(packed(name) + packed(one) for name, one in value.items())
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else bytes([0xD9, len(text)])) + text
    shape = b"".join(bytes([n]) if n < 128 else b"\xcd" + struct.pack(">H", n) for n in value.shape)
    numbers: bytes = value.contiguous().numpy().tobytes()
    kind = packed(str(value.dtype).removeprefix("torch."))
    content = bytes([0x93, 0x90 | value.ndim]) + shape + kind + b"\xc6" + struct.pack(">I", len(numbers)) + numbers
    return b"\xc9" + struct.pack(">I", len(content)) + b"\x01" + content


def flax_weights() -> dict[str, Any]:
    """Some of DALL-E mini's, by its names: tables, and tensors of two layers in one."""

    def stack(width: int) -> dict[str, Any]:
        unit = {"LayerNorm_0": {"bias": torch.rand(2, width)}, "Dense_0": {"kernel": torch.rand(2, width, 6)}}
        return {"LayerNorm_0": {"bias": torch.rand(2, width)}, "GLU_0": unit}

    parts = {
        part: {
            "embed_tokens": {"embedding": torch.rand(tokens, 4)},
            "embed_positions": {"embedding": torch.rand(4, 4)},
            "layers": {f"FlaxBart{part.title()}Layers": stack(4)},
        }
        for part, tokens in (("encoder", 7), ("decoder", 9))
    }
    return {"lm_head": {"kernel": torch.rand(4, 9)}, "model": parts}


def originals() -> dict[str, bytes]:
    """Undamaged files by their name; the ending tells how they are read."""
    torch.manual_seed(0)
    plain = {"a": [1, 2.5, None, True, 2**70], "b": ("text", b"raw"), "c": OrderedDict(k=1), "d": Namespace(width=8)}
    weights, module = dvae_weights(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    files = {f"plain{protocol}.pickle": pickle.dumps(plain, protocol) for protocol in range(2, 6)}
    for name, value in {"dvae": weights, "vqgan": {"state_dict": vqgan_weights()}, "module": module}.items():
        for form, new in (("zip", True), ("legacy", False)):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=new)
            files[f"{name}.{form}"] = file.getvalue()
    files["dvae.safetensors"] = save(weights)
    files["dalle_mini.msgpack"] = packed(flax_weights())
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 4, "ddconfig": {"ch": 32}}}}
    files["config.json"] = json.dumps(config).encode()
    files["config.yaml"] = yaml.safe_dump(config).encode()
    files["shard.tar"] = shard(tarfile.GNU_FORMAT)
    files["shard.tgz"] = gzip.compress(shard(tarfile.PAX_FORMAT))
    counts = {"shards": [{"file": "shard.tar", "bytes": len(files["shard.tar"]), "samples": 3}]}
    codes = {"format": FORMAT, "variants": 1, "chunk": 3, "grid": [2, 2], "tokenizer": {"codebook_size": 8}}
    files["manifest.json"] = json.dumps(counts | codes).encode()
    return files


def shard(form: int) -> bytes:
    """Three samples with long names, which need extended headers."""
    file, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for key in ("a", "b" * 120, "c"):
            for ending, data in (
                ("png", image.getvalue()),
                ("json", b'{"captions": ["one", "two"]}'),
                ("txt", b"one"),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


# ---------------------------------------------------------------- damage


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated, or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            break
        # The beginning holds headers and tables, the rest numbers.
        limit = rng.choice((16, 256, 4096, len(changed)))
        at = rng.randrange(min(limit, len(changed)))
        if rng.random() < 0.2:  # and so does the end of an archive
            at = len(changed) - 1 - at
        length = rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                changed[at] = rng.choice(OPCODES)
            case 3:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))[: rng.choice((1, 2, 4, 8))]
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 6:
                changed[at:at] = bytes(rng.choice(OPCODES) for _ in range(length))
            case 7:
                del changed[at:]
    return bytes(changed)


def damaged_within(data: bytes, rng: random.Random) -> bytes:
    """An archive in good order around damaged entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            hurt = info.filename.endswith("data.pkl") or rng.random() < 0.1
            new.writestr(info.filename, damaged(content, rng) if hurt else content)
    return file.getvalue()


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A shard with a damaged header that has the right checksum."""
    changed = bytearray(data)
    at = 512 * rng.randrange(len(data) // 512)
    header = bytearray(changed[at : at + 512])
    match rng.randrange(4):
        case 0:
            header[124:136] = rng.choice((b"\x80", b"\xff")) + rng.randbytes(11)
        case 1:
            header[124:136] = b"%011o\0" % rng.choice(INTERESTING[:9])
        case 2:
            header[156] = rng.choice(b"0123456xgLKSV7")
        case 3:
            header[rng.randrange(512)] = rng.randrange(256)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    changed[at : at + 512] = header
    return bytes(changed)


def program(rng: random.Random) -> bytes:
    """A random row of instructions of a pickle, with the strings and numbers that some of them take."""
    names = [b"os", b"system", b"torch", b"FloatStorage", b"torch._utils", b"_rebuild_tensor_v2", b"a.b", b"storage"]
    parts = [b"\x80\x04"]
    for _ in range(rng.randrange(60)):
        code = rng.choice(OPCODES)
        parts.append(bytes([code]))
        if code in b"ciPSVIFLgp":
            parts.append(b"\n".join(rng.choice(names) for _ in range(2 if code in b"ci" else 1)) + b"\n")
        elif code in b"X\x8c":
            text = rng.choice(names)
            parts.append((struct.pack("<I", len(text)) if code == ord("X") else bytes([len(text)])) + text)
        elif code in b"Khq\x80\x82":
            parts.append(bytes([rng.randrange(4)]))
    return b"".join([*parts, b"."])


def many_calls(rng: random.Random) -> bytes:
    """A pickle that calls one function any number of times with one large argument, of which each makes a copy."""
    large = rng.randrange(1, 200_000)
    text = b"X" + struct.pack("<I", large) + b"a" * large
    module, function, argument = rng.choice(
        [
            (b"_codecs", b"encode", text + b"q\x01X\x06\x00\x00\x00latin1"),
            (b"torch", b"Size", b"](" + b"K\x01" * large + b"eq\x01"),
            (b"collections", b"OrderedDict", b"](" + b"K\x00N\x86" * large + b"eq\x01"),
            (b"a.b", b"Thing", b"](" + b"N" * large + b"eq\x01"),
        ]
    )
    again = b"h\x00h\x01" + (b"h\x02\x86R" if function == b"encode" else b"\x85R")
    first = b"c" + module + b"\n" + function + b"\nq\x00" + argument + (b"q\x02" if function == b"encode" else b"")
    return b"\x80\x02" + first + b"(" + again * rng.randrange(1, 20_000) + b"t."


def make(number: int, seed: int, files: dict[str, bytes]) -> tuple[str, bytes]:
    """Name and content of a case."""
    rng = random.Random(f"{seed}-{number}")
    name = rng.choice(sorted(files))
    if name.endswith(".pickle") and rng.random() < 0.5:
        return name, program(rng)
    if name == "module.zip" and rng.random() < 0.1:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("module/data.pkl", many_calls(rng))
        return name, file.getvalue()
    if name.endswith(".zip") and rng.random() < 0.6:
        return name, damaged_within(files[name], rng)
    if name == "shard.tar" and rng.random() < 0.7:
        return name, damaged_header(files[name], rng)
    return name, damaged(files[name], rng)


# ---------------------------------------------------------------- reading


def read(name: str, data: bytes, folder: Path) -> None:
    """Reads a case as the package would."""
    if name.endswith(".pickle"):
        load_objects(io.BytesIO(data), len(data))
        return
    path = folder / name
    path.write_bytes(data)
    if name.startswith(("shard", "manifest")):
        read_data(path)
        return
    if name.startswith("config"):
        location = inspect_files(path)  # which keeps the reason in place of raising it
        for reason in {**location.unread, **location.damaged}.values():
            raise WeightFileError(reason)
        return
    for tensor in open_checkpoint(path).tensors.values():
        tensor.read()
    recognize(path)


def read_data(path: Path) -> None:
    """Reads a shard, or a manifest as that of code shards and of shards."""
    if path.suffix == ".json":
        CodeDataset(path.parent)
    source = ShardSource([path.parent / "shard.tar" if path.suffix == ".json" else path])
    for record in source.read(seed=None, epoch=0, start=0, stop=source.num_samples):
        if isinstance(record, Skipped):
            raise FileError(record.reason)


def run(seed: int, cases: range, seconds: float, folder: Path, report: Any = print) -> int:
    """Reads cases until they or the time are at an end; returns how many failed."""
    files, outcomes, failures = originals(), Counter[str](), 0
    (folder / "shard.tar").write_bytes(files["shard.tar"])  # to which the manifest belongs
    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, too_slow)
    for number in cases:
        if time.monotonic() - begin > seconds:
            break
        name, data = make(number, seed, files)
        expected = ValueError if name.startswith(("shard", "manifest")) else WeightFileError
        signal.alarm(CASE_SECONDS)
        try:
            read(name, data, folder)
            outcomes["read"] += 1
        except expected:
            outcomes["refused"] += 1
        except (Exception, TooSlowError):
            failures += 1
            report(f"case {number} of seed {seed} ({name}, {len(data)} bytes):\n{traceback.format_exc()}")
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    taken = time.monotonic() - begin
    total = sum(outcomes.values()) + failures
    report(
        f"{total} cases in {taken:.1f} s, {total / max(taken, 1e-9):.0f} a second: {outcomes['refused']} refused, "
        f"{outcomes['read']} read, {failures} failed"
    )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (60)")
    parser.add_argument("--cases", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seed", type=int, default=0, help="what the cases follow from (0)")
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    cases = range(options.cases) if options.case is None else range(options.case, options.case + 1)
    with tempfile.TemporaryDirectory() as folder:
        return int(run(options.seed, cases, options.seconds, Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
