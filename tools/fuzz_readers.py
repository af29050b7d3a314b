"""Damages files at random and reads them; the readers may raise only the errors that `fuzz_files` lists.

The files are weights of other code bases, configurations, weights and indexes of models, shards, manifests,
checkpoints, result files and recipes.

    python -m tools.fuzz_readers --seconds 60
    python -m tools.fuzz_readers --seed 0 --case 1234     # repeats one case and prints its traceback

A case depends only on the seed and its number. It fails with any other exception, after more than `CASE_SECONDS`, or
if all cases together use more memory than `MEMORY`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.fuzz_files import Original, originals

CASE_SECONDS = 10
MEMORY = 4 * 2**30
"""Bytes of address space in addition to that of the process at the start."""
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]
OPCODES = b"(.012FGIJKLMNPQRSTUVXabcdeghijlopqrstu)]}" + bytes(range(0x80, 0x99))


class TooSlowError(BaseException):
    """A case that takes too long. No `Exception`, so that no reader takes it for damage."""


def too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {CASE_SECONDS} s")


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


STRANGE: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 10**15, 10**400, "", "x", "../x", [], {}, [None], {"a": 1}, float("nan"),
    "9" * 5000, ["x"] * 3000,
]  # fmt: skip
"""Values that replace those of a JSON file."""


def changed(value: Any, rng: random.Random) -> Any:
    """JSON with some values replaced, removed, repeated, or nested deeply."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    for node, key in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 5)))):
        match rng.randrange(6):
            case 0:
                node[key] = json.loads(json.dumps(rng.choice(places)[0]))
            case 1 if isinstance(node, dict):
                node.pop(key, None)
            case 2 if isinstance(node, dict):
                node[rng.choice(("x", "", "type", "model_type"))] = rng.choice(STRANGE)
            case 3:
                depth = rng.choice((10, 80, 200))
                node[key] = json.loads("[" * depth + "]" * depth)
            case _:
                node[key] = rng.choice(STRANGE)
    return value


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


def make(number: int, seed: int, files: Mapping[str, Original]) -> tuple[str, bytes]:
    """Name and content of a case."""
    rng = random.Random(f"{seed}-{number}")
    name = rng.choice(sorted(files))
    data = files[name].data
    if name.endswith(".pickle") and rng.random() < 0.5:
        return name, program(rng)
    if name == "module.zip" and rng.random() < 0.1:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("module/data.pkl", many_calls(rng))
        return name, file.getvalue()
    if name.endswith(".zip") and rng.random() < 0.6:
        return name, damaged_within(data, rng)
    if name == "shard.tar" and rng.random() < 0.7:
        return name, damaged_header(data, rng)
    if name.endswith(".json") and rng.random() < 0.7:
        return name, json.dumps(changed(json.loads(data), rng)).encode()
    return name, damaged(data, rng)


# ---------------------------------------------------------------- reading


def run(seed: int, cases: range, seconds: float, folder: Path, report: Any = print) -> int:
    """Reads cases until they or the time are at an end; returns how many failed."""
    files, outcomes, failures = originals(), Counter[str](), 0
    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, too_slow)
    for number in cases:
        if time.monotonic() - begin > seconds:
            break
        name, data = make(number, seed, files)
        signal.alarm(CASE_SECONDS)
        try:
            with tempfile.TemporaryDirectory(dir=folder) as own:
                files[name].read(data, Path(own))
            outcomes["read"] += 1
        except files[name].errors:
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
    logging.disable(logging.CRITICAL)  # readers name each damaged shard in a line of the log
    with tempfile.TemporaryDirectory() as folder:
        return int(run(options.seed, cases, options.seconds, Path(folder)) > 0)


if __name__ == "__main__":
    sys.exit(main())
