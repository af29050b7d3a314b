"""Works out what preparing 250 million pairs takes: ``python benchmarks/data_hours.py`` prints the tables of
docs/train/data-at-scale.md, and ``--write`` puts them there.

CPU rates are those of benchmarks/results/data_at_scale.json. Everything else is an assumption, stated as a constant.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from dalle_zoo.files import atomic_write  # noqa: E402 (a checkout runs uninstalled)
from dalle_zoo.models.dvae import DVAEConfig  # noqa: E402
from dalle_zoo.planning.dvae import DVAEWorkload  # noqa: E402
from dalle_zoo.planning.hardware import find_gpu  # noqa: E402

RESULT, PAGE = Path(__file__).parent / "results/data_at_scale.json", ROOT / "docs/train/data-at-scale.md"

PAIRS = 250_000_000
IMAGE = 60_000
"""Bytes of a JPEG whose short side is 384 pixels."""
OVERHEAD = 2_500
"""Bytes of the caption, of img2dataset's JSON, and of the headers and padding of three members."""
PER_SHARD, PER_CODE_SHARD = 10_000, 16_384
CODE_BYTES, CAPTION_BYTES = 2 * 32 * 32, 100
PIECES = 14
"""Words and signs of a caption."""
CORES, READ = 64, 2e9
"""Cores of a CPU node, and bytes per second that it reads and writes."""
NODES = (1, 16)
GPUS = {"v100-16gb": "float32", "a100-40gb": "bfloat16", "h100-80gb": "bfloat16"}
"""GPUs with the fastest dtype that they and `dalle-zoo encode` have."""
MFU = 0.3
"""Share of a GPU's peak rate that convolutions are assumed to reach."""
READERS = 64 * 4
"""Reading processes of a run on 64 GPUs with 4 workers each."""

HOUR = 3600


def encoder_flops() -> int:
    """Operations that encode an image of 256 x 256 pixels with the paper's dVAE."""
    return int(DVAEWorkload(DVAEConfig()).flops.forward["encoder"])


def steps(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """CPU seconds, bytes and files of each step that runs on CPUs."""
    rates, filtering = result["rates"], result["processes"]["filter"]["CPU seconds per sample"]
    shards = PAIRS * (IMAGE + OVERHEAD)
    return [
        {"step": "`manifest`", "cpu": PAIRS * rates["counting samples"], "read": PAIRS * 3 * 512, "written": 2e6,
         "files": 1},
        {"step": "`filter`", "cpu": PAIRS * filtering, "read": 2 * shards, "written": shards,
         "files": -(-PAIRS // PER_SHARD)},
        {"step": "`tokenizer`, counting", "cpu": PAIRS * rates["counting captions"], "read": PAIRS * OVERHEAD,
         "written": 5e9, "files": -(-PAIRS // 50_000)},
        {"step": "`tokenizer`, training on one core", "cpu": PAIRS * PIECES * rates["vocabulary, per piece"],
         "read": 5e9, "written": 2e6, "files": 3, "single": True},
        {"step": "`encode`, reading and decoding", "cpu": PAIRS * filtering, "read": shards,
         "written": PAIRS * (CODE_BYTES + CAPTION_BYTES), "files": -(-PAIRS // PER_CODE_SHARD)},
    ]  # fmt: skip


def hours(step: Mapping[str, Any], nodes: int) -> float:
    """Hours on CPU nodes: of computing, or of reading and writing if that takes longer."""
    cores = 1 if step.get("single") else nodes * CORES
    return max(step["cpu"] / cores, (step["read"] + step["written"]) / (READ * nodes)) / HOUR


def size(count: float) -> str:
    return f"{count / 1e12:.1f} TB" if count >= 1e12 else f"{count / 1e9:.0f} GB" if count >= 1e9 else "under 1 GB"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else "< 0.1"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def render(result: Mapping[str, Any]) -> str:
    """Renders all tables."""
    on_cpus = table(
        ["step", "core-hours", "read", "written", "files", *(f"hours, {n} node{'s' * (n > 1)}" for n in NODES)],
        [
            [step["step"], short(step["cpu"] / HOUR), size(step["read"]), size(step["written"]), f"{step['files']:,}",
             *(short(hours(step, nodes)) for nodes in NODES)]
            for step in steps(result)
        ],
    )  # fmt: skip
    flops, filtering = encoder_flops(), result["processes"]["filter"]["CPU seconds per sample"]
    rows, restart = [], []
    for name, dtype in GPUS.items():
        rate = find_gpu(name).tflops[dtype] * 1e12 * MFU / flops
        rows.append([
            name, dtype, f"{rate:,.0f}", *(short(PAIRS / rate / count / HOUR) for count in (1, 8, 64)),
            f"{math.ceil(1 + rate * filtering)}",
        ])  # fmt: skip
        seconds = PER_CODE_SHARD * (filtering + 1 / rate)  # a process decodes, then encodes
        restart.append([f"`encode`, a process on one {name}", f"{seconds:,.0f} s for one shard"])
    on_gpus = table(
        ["GPU", "dtype", "images per second", "hours, 1 GPU", "8 GPUs", "64 GPUs", "processes per GPU"],
        rows,
    )
    order = result["rates"]["order of a resumed run"]
    lost = table(
        ["what is lost", "costs"],
        [
            ["`filter`, a process", f"{PER_SHARD * filtering:,.0f} s for one part of {PER_SHARD:,} samples"],
            *restart,
            ["`filter`, memory of the process that finds duplicates", size(PAIRS * (8 + 8 + 8 + 8 + 2))],
            [
                "`fit`, resuming at the end of an epoch on 64 GPUs with 4 readers each",
                f"{PAIRS / READERS * order:.1f} s for the order of {PAIRS // READERS:,} samples per reader",
            ],
        ],
    )
    resume = table(
        ["resumed after", "passed records", "s until the first batch", "s to read what was passed"],
        [
            [f"99 % of {row['records']:,} {what}", f"{row['passed']:,}", f"{row['resume']['cpu']:.1f}",
             f"{row['reading what was passed']['cpu']:.1f}"]
            for what, row in (("code records", result["resume"]["codes"]), ("images", result["resume"]["images"]))
        ],
    )  # fmt: skip
    processes = table(
        ["command", "wall time of 1 process / 2", "CPU time of 2 processes / 1", "same bytes"],
        [
            [f"`{name}`", f"{row['wall ratio, 1 process to 2']:.2f}", f"{row['CPU ratio, 2 processes to 1']:.2f}",
             "yes" if row["same bytes"] else "**no**"]
            for name, row in result["processes"].items()
        ],
    )  # fmt: skip
    measured = (
        f"`{result['command']}`: {result['device']}, {result['cores']} cores at a load of {result['load']:.1f}, "
        f"torch {result['torch']}, {result['date']}."
    )
    operations = f"Encoding an image takes {flops / 1e9:.0f} billion operations."
    return "\n\n".join(
        ["**On CPUs.**", on_cpus, "**`encode` on GPUs.**", operations, on_gpus, "**After a failure.**", lost,
         "**Measured: resuming.** CPU seconds.", resume, "**Measured: processes that share work.**", processes,
         measured]
    )  # fmt: skip


def filled(page: str, text: str) -> str:
    """Returns the page with the tables."""
    return re.sub(r"<!-- hours -->.*<!-- end -->", f"<!-- hours -->\n\n{text}\n\n<!-- end -->", page, flags=re.DOTALL)


def main() -> None:
    """Prints the tables, or writes them to the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/train/data-at-scale.md")
    options = parser.parse_args()
    text = render(json.loads(RESULT.read_text(encoding="utf-8")))
    print(text)
    if options.write:
        with atomic_write(PAGE) as temporary:
            temporary.write_text(filled(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
