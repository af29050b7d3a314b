"""Runs the short trials on which the choices in the emoji64 recipes are based.

    python tools/trials.py dvae
    python tools/trials.py prior

Each trial is a recipe with a few fields changed, trained for a fixed number of steps on one thread. The table shows
the final validation figures. Trials that the file already contains are not repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dalle_zoo.cli.runs import read_curves
from dalle_zoo.files import read_json, write_json

MODEL = "--model.init_args."
CONFIG = f"{MODEL}config."


def common(steps: int) -> list[str]:
    """One process, raw weights (so few steps are not averaged), one validation at the end."""
    return [
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.callbacks=[]",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        "--images.enabled=false",
    ]


def dvae(steps: int) -> dict[str, list[str]]:
    """Grid, vocabulary, and how the codes are found."""
    schedules = [
        *common(steps),
        f"{MODEL}temperature.steps={steps * 6 // 10}",
        f"{MODEL}learning_rate.decay_steps={steps - 100}",
    ]
    warm = [*schedules, f"{MODEL}warm_start.steps={steps * 3 // 10}"]
    cold = [*schedules, f"{MODEL}warm_start=null", f"{MODEL}kl_weight.steps={steps * 6 // 10}"]
    rising = [f"{MODEL}kl_weight.start=0", f"{MODEL}kl_weight.end=6.6"]
    falling = [f"{MODEL}kl_weight.start=4", f"{MODEL}kl_weight.end=0.2"]
    grid_16 = [f"{CONFIG}num_groups=3", f"{CONFIG}codebook_size=512"]
    return {
        "8x8 of 2048, warm start (chosen)": warm,
        "8x8 of 2048, KL rising 0 to 6.6 (the paper's)": [*cold, *rising],
        "8x8 of 2048, KL falling 4 to 0.2": [*cold, *falling],
        "8x8 of 512, warm start": [*warm, f"{CONFIG}codebook_size=512"],
        "16x16 of 512, warm start": [*warm, *grid_16],
        "16x16 of 512, KL falling 4 to 0.2": [*cold, *falling, *grid_16],
    }


def prior(steps: int) -> dict[str, list[str]]:
    """Masks, width and depth."""
    schedules = [
        *common(steps),
        f"{MODEL}image_tokenizer=null",  # the codes are on disk, and nothing is sampled
        f"{MODEL}learning_rate.decay_steps={steps}",
        f"{MODEL}learning_rate.warmup_steps=50",
    ]
    return {
        "paper masks with kernel 5, 8 layers of 192 (chosen)": schedules,
        "full masks, 8 layers of 192": [*schedules, f"{CONFIG}masks=full"],
        "paper masks with kernel 5, 4 layers of 272": [
            *schedules, f"{CONFIG}num_layers=4", f"{CONFIG}width=272", f"{CONFIG}num_heads=4",
        ],
    }  # fmt: skip


STAGES = {"dvae": (dvae, "dvae/emoji64"), "prior": (prior, "prior/emoji64")}


def run_trial(name: str, recipe: str, overrides: list[str], runs: Path) -> dict[str, object]:
    """Trains one trial in its own process; returns its row, with the figures of its last validation."""
    folder = runs / "".join(c if c.isalnum() else "-" for c in name)
    command = [sys.executable, "-c", "import sys; from dalle_zoo.cli.main import main; sys.exit(main())"]
    subprocess.run(
        [*command, "fit", recipe, "--run", str(folder), "--overwrite", *overrides],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    curves = read_curves(folder)
    figures = {k.removeprefix("val/"): list(v.values())[-1] for k, v in curves.items() if k.startswith("val/")}
    rounded = {key: round(value, 3) for key, value in figures.items()}
    return {"trial": name, **rounded}


def main() -> None:
    """Runs the trials of a stage that the table does not have yet."""
    parser = argparse.ArgumentParser(description="Run the trials of a stage.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int, default=1000, help="steps of every trial (1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/trials"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("recipes/trials/emoji64.json"), help="table, added to")
    options = parser.parse_args()
    trials, recipe = STAGES[options.stage]
    command = f"python tools/trials.py {options.stage} --steps {options.steps}"
    title = f"{recipe}: {options.steps} steps on one thread, `{command}`"
    for name, overrides in trials(options.steps).items():
        table = read_json(options.out) if options.out.exists() else {}
        rows = table.setdefault(title, [])
        if any(row["trial"] == name for row in rows):
            continue
        rows.append(run_trial(name, recipe, overrides, options.runs / options.stage))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, table)
        print(rows[-1])


if __name__ == "__main__":
    main()
