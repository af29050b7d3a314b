"""Kills commands at random moments, often with two of them at once, and compares what the next call makes of it.

    python tools/kill_commands.py --kills 300
    python tools/kill_commands.py --kills 20 --only encode --seed 1     # Ctrl-C ends it with a report

A trial starts a command in a folder of its own, in two of five trials twice, and sends SIGKILL at a random moment.
Where a result is replaced in one step, it must then be the old or the new one, completely. The same command is run
again, and its result must equal that of an undisturbed run, with nothing left next to it. Publishing goes to a local
server.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]
TOKEN = "hf_owner"
HIDDEN = (".sha256.json", ".cache")
"""Hidden files that belong to results: the list of `generate --folder`, and the features of `eval`."""


# ---------------------------------------------------------------- commands, in forks of a process with all imports


def serve() -> None:
    """Starts commands on request, in forked processes that share the imports of this one."""
    import dalle_zoo_eval.compare
    import huggingface_hub

    import dalle_zoo.cli.fit
    import dalle_zoo.cli.main
    import dalle_zoo.pipeline

    assert dalle_zoo.pipeline, (dalle_zoo_eval.compare, huggingface_hub, dalle_zoo.cli.fit)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            reply = os.waitstatus_to_exitcode(status)
        else:
            reply = os.fork()
            if reply == 0:
                os.setsid()  # a group of its own, so that a kill takes its workers too
                os.chdir(request["folder"])
                log = os.open("../log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ["DALLE_ZOO_CACHE"] = str(Path("cache").resolve())
                os._exit(dalle_zoo.cli.main.main(request["arguments"]))
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


class Server:
    """The process that starts commands."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _ask(self, **request: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: list[str], folder: Path) -> int:
        """Starts a command in a folder; returns its process id."""
        return self._ask(arguments=arguments, folder=str(folder))

    def wait(self, process: int) -> int:
        """Waits for a command; returns its exit status, or minus the signal that ended it."""
        return self._ask(wait=process)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, the folder that it starts with, and what of its results counts."""

    arguments: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    """Fills the folder, for example with an older result."""
    result: Callable[[Path], Any]
    """What must be equal to the result of an undisturbed run."""
    atomic: bool = False
    """Whether the result is replaced in one step."""


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder, by their paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".claim" not in path.name)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def copied(source: Path, name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(source, folder / name)

    return copy


def make_inputs(root: Path) -> None:
    """A tiny model, images with captions, weights of another code base, and a protocol."""
    from dalle_zoo import DallePipeline
    from dalle_zoo.models.dvae import DVAE, DVAEConfig
    from dalle_zoo.models.prior import Prior, PriorConfig
    from dalle_zoo.models.ranker import Ranker, RankerConfig
    from dalle_zoo.tokenizers import ByteTokenizer

    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=4, num_groups=3, blocks_per_group=1, decoder_stem=4, codebook_size=8))
    prior = PriorConfig(
        text_length=12, text_vocab=256, image_height=4, image_width=4, codebook_size=8, width=16, num_layers=1,
        num_heads=2, masks="row",
    )  # fmt: skip
    ranker = RankerConfig(
        image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=1, text_width=8, text_layers=1,
        text_heads=1, embed_dim=8, text_length=12, text_vocab=256,
    )  # fmt: skip
    tokenizer = ByteTokenizer()
    pipe = DallePipeline(dvae, Prior(prior), tokenizer, Ranker.create(ranker, tokenizer))
    for name in ("model", "older"):
        record = {"description": name, "license": "Apache-2.0", "data": "noise"}
        pipe.save_pretrained(root / name, record=record)
    (root / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(24):
        path = root / f"images/{number:02d}.png"
        Image.fromarray(noise.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"noise number {number}")
    vqgan_weights = runpy.run_path(str(ROOT / "tools/fuzz_files.py"))["vqgan_weights"]
    for name in ("external", "external-older"):
        (root / name).mkdir()
        torch.save(vqgan_weights(), root / name / "last.ckpt")
    protocol = {
        "name": "noise", "title": "Noise", "groups": {"all": {"dataset": {"source": str(root / "images")}}},
        "captions": {"rule": "first"}, "image": {"size": None, "chunk": 4}, "selfcheck": False,
        "sampling": {"candidates": 2, "chunk": 2, "seeds": "chunk"}, "extractors": {"ranker": {"optional": True}},
        "metrics": [
            "psnr", {"frechet": {"extractor": "ranker", "images": ["reconstructed", "generated"], "interval": False}},
        ],
    }  # fmt: skip
    (root / "noise.yaml").write_text(yaml.safe_dump(protocol))


def make_cases(root: Path, run: Callable[[list[str]], None]) -> dict[str, Case]:
    """Returns the cases by name.

    Args:
        root: Folder of `make_inputs`.
        run: Runs a command in this folder, for older results.
    """
    model, images = str(root / "model"), str(root / "images")
    fit = ["fit", "dvae/tiny", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "1", "--checkpoint.every",
           "2", "--trainer.enable_model_summary", "false", "--run"]  # fmt: skip
    encode = ["encode", images, "--model", model, "--samples-per-shard", "7", "--batch-size", "2", "--out"]
    tokenizer = ["tokenizer", images, "--out", "made", "--overwrite", "--vocab-size"]
    export = ["export", *(f"--{part}={model}" for part in ("dvae", "prior", "tokenizer")), "--out"]
    generate = ["generate", "a cat", "--model", model, "--seed", "1", "--out", "grid.png", "--folder", "made"]
    run([*fit, "run", "--data.batch_size", "4"])
    run([*encode, "codes", "--seed", "6"])
    run(["tokenizer", images, "--out", "tokenizer", "--vocab-size", "260"])
    run([*export, "exported", "--dtype", "bfloat16"])
    run(["convert", str(root / "external-older"), "--out", "converted"])
    run([*generate[:-1], "generated", "-n", "4"])

    def with_other_image(folder: Path) -> None:
        shutil.copytree(root / "generated", folder / "made")
        (folder / "made/holiday.png").write_text("mine")

    def made(folder: Path) -> Any:
        return tree(folder / "made")

    def trained(folder: Path) -> Any:
        return tree(folder / "made/model"), sorted(path.name for path in (folder / "made/checkpoints").glob("*"))

    def result(folder: Path) -> Any:
        """The result file, without how long and when it was, and of which commit."""
        path = folder / "made/result.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        return {key: value for key, value in found.items() if key not in ("speed", "run", "date", "code_version")}

    replaced = ["--overwrite"]
    return {
        "fit": Case(arguments=[*fit, "made"], result=trained),
        "fit --overwrite": Case(
            arguments=[*fit, "made", *replaced], prepare=copied(root / "run", "made"), result=trained
        ),
        "encode": Case(arguments=[*encode, "made"], result=made),
        "encode --overwrite": Case(
            arguments=[*encode, "made", *replaced], prepare=copied(root / "codes", "made"), result=made, atomic=True
        ),
        "filter": Case(
            arguments=["filter", images, "--any-language", "--samples-per-shard", "7", "--out", "made"], result=made
        ),
        "tokenizer": Case(
            arguments=[*tokenizer, "266"], prepare=copied(root / "tokenizer", "made"), result=made, atomic=True
        ),
        "export": Case(
            arguments=[*export, "made", *replaced], prepare=copied(root / "exported", "made"), result=made, atomic=True
        ),
        "convert": Case(
            arguments=["convert", str(root / "external"), "--out", "made", *replaced],
            prepare=copied(root / "converted", "made"), result=made, atomic=True,
        ),
        "cached conversion": Case(
            arguments=["reconstruct", f"{images}/00.png", "--model", str(root / "external"), "--out", "made/grid.png",
                       *replaced],
            result=lambda folder: (tree(folder / "cache"), made(folder)),
        ),
        "generate": Case(arguments=[*generate, "-n", "2", *replaced], prepare=with_other_image, result=made),
        "eval": Case(
            arguments=["eval", str(root / "noise.yaml"), "--model", model, "--out", "made"], result=result
        ),
        "compare": Case(
            arguments=["compare", model, images, "--metrics", "frechet:pixels,vendi:pixels", "--out", "made"],
            result=result,
        ),
    }  # fmt: skip


def publish_case(root: Path, hub: Any) -> Case:
    """Publishing over an older publication, on a local server."""
    from dalle_zoo.publish import prepare

    files = prepare(root / "older", "org/toy").files
    older = {path: file if isinstance(file, bytes) else file.read_bytes() for path, file in files.items()}

    def published(_: Path) -> Any:
        return {path: hashlib.sha256(data).hexdigest() for path, data in hub.files("org/toy").items()}

    return Case(
        arguments=["publish", str(root / "model"), "org/toy"],
        prepare=lambda _: hub.add("org/toy", older | {"LICENSE": b"text"}),
        result=published,
        atomic=True,
    )


# ---------------------------------------------------------------- trials


class Trials:
    """Trials of one case.

    Args:
        case: The case.
        server: Starts the commands.
        folder: Folder for all trials.
        seed: Seed of the moments.
    """

    def __init__(self, case: Case, server: Server, folder: Path, seed: int) -> None:
        self.case, self.server, self.folder, self.random = case, server, folder, random.Random(seed)
        self.number = self.kills = 0
        self.failures: list[str] = []
        alone = self._new_folder()
        self.before = case.result(alone)
        begin = time.monotonic()
        status = server.wait(server.start(case.arguments, alone))
        self.seconds = time.monotonic() - begin
        assert status == 0, (folder / "log.txt").read_text()
        self.wanted = case.result(alone)
        assert self.wanted != self.before, f"{case.arguments} changes nothing"

    def _new_folder(self) -> Path:
        folder = self.folder / f"{self.number:04d}"
        self.number += 1
        folder.mkdir(parents=True)
        self.case.prepare(folder)
        return folder

    def run(self) -> None:
        """One trial."""
        folder, at = self._new_folder(), self.random.uniform(0, 1.1) * self.seconds
        processes = [self.server.start(self.case.arguments, folder)]
        if self.random.random() < 0.4:
            delay = self.random.uniform(0, at)
            time.sleep(delay)
            at -= delay
            processes.append(self.server.start(self.case.arguments, folder))
        time.sleep(at)
        for process in self.random.sample(processes, self.random.randint(1, len(processes))):
            with suppress(ProcessLookupError):  # it was forked just now, and its group is not there yet
                os.killpg(process, signal.SIGKILL)  # a process that has ended waits for its status
        statuses = [self.server.wait(process) for process in processes]
        self.kills += statuses.count(-signal.SIGKILL)
        problem = self._problem(folder, statuses)
        if problem:
            self.failures.append(f"{folder}: {problem} (statuses {statuses})")
        else:
            shutil.rmtree(folder)

    def _problem(self, folder: Path, statuses: list[int]) -> str | None:
        if not set(statuses) <= {0, 2, -signal.SIGKILL}:
            return "a command failed"
        if self.case.atomic and self.case.result(folder) not in (self.before, self.wanted):
            return "neither the old nor the new result"
        status = self.server.wait(self.server.start(self.case.arguments, folder))
        if status not in (0, 2):
            return f"the next call failed with status {status}"
        if self.case.result(folder) != self.wanted:
            return f"the result of the next call (status {status}) is another one"
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name not in HIDDEN]
        return f"the next call left {left}" if left else None


def run_trials(kills: int, seed: int, only: str | None, folder: Path) -> tuple[Counter[str], list[str]]:
    """Runs trials of all cases in turn until there were enough kills; returns kills by case, and the failures."""
    hub = runpy.run_path(str(ROOT / "tests/hub/conftest.py"))["LocalHub"]()
    hub.handle_error = lambda *_: None  # connections of killed clients
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    server = Server(
        {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
         "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(folder / "hub")},
    )  # fmt: skip

    def run(arguments: list[str]) -> None:
        assert server.wait(server.start(arguments, folder / "inputs")) == 0, (folder / "log.txt").read_text()

    try:
        (folder / "inputs").mkdir()
        make_inputs(folder / "inputs")
        cases = make_cases(folder / "inputs", run) | {"publish": publish_case(folder / "inputs", hub)}
        chosen = {name: case for name, case in cases.items() if only in (None, name)}
        trials = {
            name: Trials(case, server, folder / "trials" / str(number), seed + number)
            for number, (name, case) in enumerate(chosen.items())
        }
        with suppress(KeyboardInterrupt):  # reports what it has
            while sum(trial.kills for trial in trials.values()) < kills:
                for trial in trials.values():
                    trial.run()
    finally:
        server.close()
        hub.shutdown()
    counts = Counter({name: trial.kills for name, trial in trials.items()})
    return counts, [f"{name}: {line}" for name, trial in trials.items() for line in trial.failures]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="number of kills [300]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments [0]")
    parser.add_argument("--only", help="name of the only case [all]")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    folder = Path(tempfile.mkdtemp(prefix="kill-commands-"))
    counts, failures = run_trials(options.kills, options.seed, options.only, folder)
    for name, count in counts.items():
        print(f"{count:6,} {name}")
    print(f"{counts.total():6,} kills, {len(failures)} failures", *failures, sep="\n")
    if not failures:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
