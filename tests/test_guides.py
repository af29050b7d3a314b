"""What the guides in docs/ say: their numbers are the stored ones, their commands run."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from dalle_zoo.cli.fit import COMMANDS as TRAINING
from dalle_zoo.cli.fit import check_keys
from dalle_zoo.cli.keys import RESERVED
from dalle_zoo.cli.main import COMMANDS, DEBUG, main
from dalle_zoo.cli.run_folder import EXTENDABLE, SHARED, SHOWING
from dalle_zoo.recipes import find_part, find_recipe, read_recipe, split_arguments
from tools.reference.commands import SUBCOMMANDS, parser_of

ROOT = Path(__file__).parents[1]
MANY_GPUS, RESUME, PAPER_RUN, CAPTIONS, AT_SCALE = (
    (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    for name in (
        "train/many-gpus", "train/resume", "design/paper-run", "train/conceptual-captions", "train/data-at-scale",
    )
)  # fmt: skip
GUIDES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts
)
PAGES = pytest.mark.parametrize("page", GUIDES)
SIZES = ["cc-30m", "cc-300m", "cc-1.2b", "paper-2.8b", "paper-5.6b", "paper-12b"]
UNSAID = {"trainer.default_root_dir", "images"}
"""Keys that may change when a run is resumed and that the page need not mention."""
PARTS = ["8x16gb", "8x80gb", "64x80gb", "1024x16gb"]


class Command(NamedTuple):
    """One ``dalle-zoo`` command of a page."""

    name: str
    arguments: list[str]

    def __str__(self) -> str:
        return shlex.join([self.name, *self.arguments])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[Command]:
    """Commands of a page as ``dalle-zoo`` gets them, whoever launches it."""
    found = []
    for block in blocks(text, "sh"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip())
            launched = re.search(r"(?:^dalle-zoo|-m dalle_zoo --|^sbatch .*?train\.sbatch) (.+)", line)
            if launched:
                words = shlex.split(launched.group(1).partition(" > ")[0], comments=True)
                found.append(Command("fit", words) if line.startswith("sbatch") else Command(words[0], words[1:]))
    return found


def table(text: str, heading: str) -> str:
    """Rows of the table whose first line begins so."""
    assert heading in text
    return text.partition(heading)[2].partition("\n\n")[0].partition("|\n")[2].partition("\n")[2]


def stored(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
    return content


# ------------------------------------------------------------ numbers


def test_what_fits_is_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for size in SIZES:
        cells = []
        for part in PARTS:
            file = tmp_path / "plan.json"
            assert main(["plan", f"prior/{size}", "--parts", part, "--json", str(file), "--overwrite"]) == 0
            plan = json.loads(file.read_text())
            taken = f"{plan['memory_bytes']['total'] / 2**30:.1f}"
            cells.append(taken if plan["fits"] else f"**{taken}**")
        rows.append(f"| `prior/{size}` | {' | '.join(cells)} |")
    capsys.readouterr()
    assert table(MANY_GPUS, "| recipe | `8x16gb`") == "\n".join(rows)


def test_gradient_scales() -> None:
    rows = []
    for row in stored("gradient_scaling.json")["rows"]:
        errors = [row[f"error {which}"][-1] for which in ("without a scale", "with the best scale for all")]
        errors.append(row["error with a scale per block"][-1])
        cells = " | ".join(f"{100 * error:.0f} %" if error > 0.1 else f"{100 * error:.2g} %" for error in errors)
        rows.append(f"| 2^{row['log2 of the spread']:.0f} | {cells} |")
    assert table(PAPER_RUN, "| spread over the depth") == "\n".join(rows)


def test_powersgd() -> None:
    rows, results = [], stored("powersgd.json")["results"]
    for name, result in results.items():
        gap = result["train, last quarter, gap"]
        loss, seeds = result["train, last quarter"], ", ".join(f"{g:+.3f}" for g in gap["by seed"])
        rows.append(f"| {name} | {result['bytes per step']:,} | {loss:.3f} | {gap['mean']:+.3f} | {seeds} |")
    assert table(PAPER_RUN, "| gradients | bytes") == "\n".join(rows)
    gaps = {name: result["train, last quarter, gap"]["mean"] for name, result in results.items()}
    noise = abs(gaps["rank width / 8, bfloat16 wire"] - gaps["rank width / 8"])
    for name in ("rank width / 8, no error feedback", "rank width / 8, Q resampled", "rank width / 32"):
        assert gaps[name] - gaps["rank width / 8"] > noise, "the page says that these three lose"
    assert gaps["rank width / 8"] < noise, "the page says that this one does not"


def test_the_plan_on_the_page_is_part_of_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(MANY_GPUS, "console")
    command, *shown = block.splitlines()
    assert main(shlex.split(command.removeprefix("$ dalle-zoo "))) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    assert shown.count("…") >= 1
    for line in shown:  # in this order
        assert line == "…" or line in printed, f"the plan does not print {line!r}"


def test_the_constants_that_are_named() -> None:
    from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout

    from dalle_zoo.models.gradient_scaling import GradientScalingConfig
    from dalle_zoo.models.prior import PriorConfig
    from dalle_zoo.training.watch import RankWatch

    scales = GradientScalingConfig()
    assert (scales.start, scales.smallest, scales.largest) == (2**13, 2**7, 2**24)
    text = " ".join(RESUME.split())
    assert f"seconds in which nobody advances ({RankWatch().timeout:.0f})" in text
    assert f"{default_pg_timeout.total_seconds() / 60:.0f} minutes in Lightning" in text
    changeable = text.partition("These keys may change on resume:")[2].partition("| all else |")[0]
    for key in [*EXTENDABLE, *SHOWING, SHARED]:
        assert f"{key.replace('init_args.', '').removeprefix('trainer.')}`" in changeable or key in UNSAID, key
    parameters = PriorConfig().count_parameters()
    state = 16 * sum(parameters.values()) / 1e9
    assert f"{state:.0f} and {state + 4 * parameters['matrices'] / 1e9:.0f} GB for 12 billion" in text


def test_hours_and_bytes_of_a_large_set() -> None:
    hours = runpy.run_path(str(ROOT / "benchmarks/data_hours.py"))
    assert hours["filled"](AT_SCALE, hours["render"](stored("data_at_scale.json"))) == AT_SCALE, (
        "run python benchmarks/data_hours.py --write"
    )


def test_sizes_of_the_priors() -> None:
    from dalle_zoo.models.prior import PriorConfig

    rows = []
    for size in SIZES[:3]:
        content = read_recipe(find_recipe(f"prior/{size}"))
        config = PriorConfig(**content["model"]["init_args"]["config"])
        millions = sum(config.count_parameters().values()) / 1e6
        devices = content["trainer"]["devices"]
        batch = content["data"]["init_args"]["batch_size"] * devices
        where = " on one GPU" if devices == 1 else ""
        rows.append(
            f"| `prior/{size}` | {config.width:,}, {config.num_layers} | {millions:,.0f} million | {batch}{where} |"
        )
    assert table(CAPTIONS, "| recipe | width, layers") == "\n".join(rows)


# ------------------------------------------------------------ commands


def check_recipe(command: Command, known: argparse.Namespace, overrides: list[str]) -> None:
    paths = [find_recipe(known.recipe), *map(find_part, known.parts)]
    check_keys("fit", {path: read_recipe(path) for path in paths}, split_arguments(overrides, RESERVED)[0])


@PAGES
def test_every_command_is_accepted(page: str) -> None:
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        words = [word for word in command.arguments if word != DEBUG]
        if "..." in words or "--help" in words:
            continue
        first = words[:1] if command.name in SUBCOMMANDS else []
        parser = parser_of(command.name, *first)
        if command.name in (*TRAINING, "plan"):
            if Path(words[0]).suffix != ".yaml":  # a file that the reader writes
                check_recipe(command, *parser.parse_known_args(words))
        else:
            parser.parse_args(words[1:] if command.name in ("study", "benchmark") else words)


USAGE = re.compile(r"\.\.\.|\[--")
"""What a usage has and a command has not."""


@PAGES
def test_blocks_with_commands_are_marked_as_shell(page: str) -> None:
    """Blocks of other languages are not checked, and copy buttons would copy their prompts."""
    text = (ROOT / page).read_text(encoding="utf-8")
    marked = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    unmarked = [line for language, block in marked if language != "sh" for line in block.splitlines()]
    assert [line for line in unmarked if line.startswith("dalle-zoo ") and not USAGE.search(line)] == []


@pytest.mark.parametrize("page", [*GUIDES, "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_commands_in_sentences_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    if page == "docs/migration.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)  # the column of old names
    for span in re.findall(r"`dalle-zoo ([^`]+)`", text):
        name, *words = span.split()
        assert name in COMMANDS, span
        options = [word for word in words if word.startswith("--") and "." not in word]
        first = words[:1] if name in SUBCOMMANDS and words and words[0] in SUBCOMMANDS[name] else []
        parser = parser_of(name, *(["coco-30k"] if name == "eval" and options != ["--help"] else first))
        assert {"--help", *parser._option_string_actions} >= {*options}, span


def test_the_pages_have_commands() -> None:
    assert sum(len(commands((ROOT / page).read_text(encoding="utf-8"))) for page in GUIDES) > 100


def run_python(page: str) -> None:
    for block in blocks((ROOT / page).read_text(encoding="utf-8"), "python"):
        exec(compile(block, page, "exec"), {})


def test_the_python_of_the_page_of_masks_runs() -> None:
    run_python("docs/train/masks.md")


def test_the_python_of_the_page_of_sweeps_compares_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, loss in (("a", 3.5), ("b", 2.5)):
        curves = tmp_path / f"runs/sweep/{name}/metrics/metrics.csv"
        curves.parent.mkdir(parents=True)
        curves.write_text(f"step,train/loss,val/loss\n1,4.0,\n2,{loss},\n2,,5.0\n")
    run_python("docs/train/sweeps.md")
    assert capsys.readouterr().out == "a 3.5\nb 2.5\n"


def test_what_is_missing_is_missing() -> None:
    assert ("dalle-zoo publish" in CAPTIONS) == ("publish" in COMMANDS), "step 6 speaks of it"


@PAGES
def test_shell_scripts_can_be_read(page: str) -> None:
    script = "\n".join(blocks((ROOT / page).read_text(encoding="utf-8"), "sh"))
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), script


DVAE = {"image_size": 32, "width": 8, "num_groups": 3, "blocks_per_group": 1, "decoder_stem": 8, "codebook_size": 32}
PRIOR = {
    "width": 32, "num_layers": 2, "num_heads": 2, "masks": "row", "text_length": 12, "text_vocab": 280,
    "image_height": 8, "image_width": 8, "codebook_size": 32,
}  # fmt: skip
ON_CPU = {
    "trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "data.num_workers": 0,
    "data.batch_size": 4, "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
}  # fmt: skip
ALONE = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto", "trainer.precision": "32-true"}
SMALL_DVAE = {**{f"model.config.{key}": value for key, value in DVAE.items()}, "data.image_size": 32, **ON_CPU}
SMALL_PRIOR = {
    **{f"model.config.{key}": value for key, value in PRIOR.items()}, **ON_CPU,
    "data.text.length": 12, "trainer.val_check_interval": 2,
}  # fmt: skip
"""Appended to the options of the page, so that its command ends in seconds on a CPU."""


def options(keys: dict[str, Any]) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def write_shards(folder: Path, count: int, per_shard: int) -> None:
    """Shards as img2dataset writes them, with the other files that it writes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    words = ["a", "red", "blue", "green", "dog", "cat", "house", "on", "under", "the"]
    for first in range(0, count, per_shard):
        number = first // per_shard
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for key in (f"{number:05d}{index:04d}" for index in range(min(per_shard, count - first))):
                caption = " ".join(rng.choice(words, 5))
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(image, "JPEG")
                described = json.dumps({"caption": caption, "url": "?", "key": key, "status": "success"}, indent=4)
                for ending, data in (("jpg", image.getvalue()), ("txt", caption), ("json", described)):
                    content = data if isinstance(data, bytes) else data.encode()
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
        (folder / f"{number:05d}.parquet").write_bytes(b"not read")
        (folder / f"{number:05d}_stats.json").write_text("{}")


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Steps 1 to 4 of the page, without downloading and the dVAE."""
    monkeypatch.chdir(folder)
    write_shards(Path("cc/train"), 24, 10)
    write_shards(Path("cc/val"), 6, 10)


def run(command: Command, *more: str) -> None:
    assert main([command.name, *command.arguments, *more]) == 0, command


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|log_every_n_steps|treespec, LeafSpec).*")
def test_from_shards_to_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(monkeypatch, tmp_path)
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    steps = commands(CAPTIONS.partition("## On SLURM")[0])
    for counting in (step for step in steps if step.name == "manifest"):
        run(counting)
    assert "cc/train/manifest.json: 24 samples in 3 shards" in capsys.readouterr().out
    manifest = json.loads(Path("cc/train/manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 4]

    dvae, prior = (step for step in steps if step.name == "fit")
    run(dvae, *options(SMALL_DVAE | ALONE))
    (tokenizer,) = (step for step in steps if step.name == "tokenizer")
    run(tokenizer, "--vocab-size", "280")
    for encode in (step for step in steps if step.name == "encode"):
        run(encode, "--device", "cpu")
    run(prior, *options(SMALL_PRIOR | ALONE))
    assert main(["consolidate", "runs/cc/prior", "--out", "prior"]) == 0
    (export,) = (step for step in steps if step.name == "export")
    run(export)
    run(Command("export", [*export.arguments, "--prior", "prior", "--out", "models/other"]))
    (generate,) = (step for step in steps if step.name == "generate")
    run(generate, "-n", "2", "--out", "sampled.png")
    with Image.open("sampled.png") as generated:
        assert generated.size[1] >= DVAE["image_size"]
    capsys.readouterr()
    for scoring in (step for step in steps if step.name in ("eval", "overlap")):
        assert main([scoring.name, *scoring.arguments, *(["--device", "cpu"] * (scoring.name == "eval"))]) == 2
        assert "not given" not in capsys.readouterr().err, "the page leaves a network out"  # the files are not there


SRUN = """
import os, subprocess, sys
tasks = int(os.environ["SLURM_NTASKS"])
started = [
    subprocess.Popen(
        [sys.executable, "-m", "dalle_zoo", *sys.argv[sys.argv.index("dalle-zoo") + 1 :]],
        env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
    )
    for rank in range(tasks)
]
sys.exit(max(abs(process.wait()) for process in started))
"""
"""Stands for SLURM's: starts the tasks of one node."""


@pytest.mark.slow  # half a minute: two processes that load PyTorch, three times
def test_the_script_for_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, tmp_path)
    assert main(["tokenizer", "cc/train", "--vocab-size", "280", "--out", "cc/tokenizer"]) == 0
    for split in ("train", "val"):
        assert main(["encode", f"cc/{split}", "--model", "composition", "--out", f"cc/codes/{split}"]) == 0
    (script,) = (block for block in blocks(MANY_GPUS, "sh") if "srun" in block)
    bin_folder = tmp_path / ".venv/bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text("")
    (bin_folder / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (bin_folder / "srun").chmod(0o755)
    (tmp_path / "train.sbatch").write_text(script)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
        "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "prior", "SLURM_NNODES": "1", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    small = SMALL_PRIOR | {"model.config.codebook_size": 2048, "trainer.devices": 2, "trainer.num_nodes": 1}
    for steps in (2, 4):
        run = ["prior/cc-1.2b", "--parts", "64x80gb", "--run", "runs/prior", *options(small)]
        done = subprocess.run(
            ["bash", "train.sbatch", *run, "--trainer.max_steps", str(steps)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(path.name for path in Path("runs/prior/checkpoints").iterdir())[-1] == f"{steps:08d}.ckpt"
    assert "continuing from runs/prior/checkpoints/00000002.ckpt" in done.stderr
    assert len(list(Path("runs/prior/checkpoints/00000004.ckpt").glob("shard-*"))) == 2
