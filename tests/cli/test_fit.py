"""``dalle-zoo fit``: run folders and messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.fit import ZooCLI
from dalle_zoo.cli.main import main
from dalle_zoo.cli.run_folder import differences, read_run
from dalle_zoo.cli.train import run_folder
from dalle_zoo.recipes import find_recipe
from dalle_zoo.workspaces import claimed_folder

SHORT = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.enable_model_summary", "false"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
TINY = ["fit", "dvae/tiny", *SHORT]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*TINY, "--run", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one step, which tests may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def own_recipe(path: Path, **changes: Any) -> Path:
    recipe = yaml.safe_load(find_recipe("dvae/tiny").read_text())
    for key, value in changes.items():
        place = recipe
        *above, last = key.split("__")
        for name in above:
            place = place[name]
        place[last] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_run_folder_is_named_after_its_recipe(scratch: Path, finished: Path) -> None:
    # In a separate process, since pytest configures logging.
    script = "import sys; from dalle_zoo.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *TINY], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in scratch.iterdir()] == ["runs"]
    assert contents(scratch / "runs/dvae/tiny/model") == contents(finished / "model")
    # Every line once, without advertisements of libraries.
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert [line for line in lines if "Seed set" in line] == ["Seed set to 0"]
    assert "weights are in runs/dvae/tiny/model/dvae" in lines
    noise = ("Tip:", "Warning", "weights_only", "FLOPs", "sync_dist", "KernelPreference", "/-2")
    assert not [line for line in lines if any(word in line for word in noise)]
    assert any("train/loss" in line for line in lines), "the progress bar"


def test_recipe_from_another_folder_runs_in_runs(scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = own_recipe(tmp_path_factory.mktemp("elsewhere") / "mine.yaml")
    assert main(["fit", str(recipe), *SHORT]) == 0
    assert (scratch / "runs" / "mine" / "model" / "dvae" / "model.safetensors").is_file()
    assert [path.name for path in recipe.parent.iterdir()] == ["mine.yaml"]


def test_run_stores_resolved_recipe(run: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The run of a copied folder with its own recipe resumes and gives the same weights.
    weights = contents(run / "model")
    assert main(["fit", str(run / "config.yaml"), "--run", str(run)]) == 0
    assert contents(run / "model") == weights
    assert main([*TINY, "--run", str(run)]) == 0
    config = read_run(run)
    assert config is not None
    assert config["trainer"]["max_steps"] == 1
    assert config["model"]["init_args"]["adamw"]["beta1"] == 0.9, "defaults are part of it"
    assert "error" not in capsys.readouterr().err


def test_other_recipe_raises_with_differences(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    other = ["--data.batch_size", "4", "--model.config.width", "12"]
    assert main([*TINY, *other, "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert "holds a run of another recipe" in said
    assert "data.init_args.batch_size: 8 → 4" in said
    assert "model.init_args.config.width: 8 → 12" in said
    assert "--overwrite" in said
    assert contents(run) == before


def test_run_that_never_began_accepts_other_options(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(self: ZooCLI) -> None:
        raise UserError("built")

    monkeypatch.setattr(ZooCLI, "before_fit", built)
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    assert main([*TINY, "--data.batch_size", "4", "--run", str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "dalle-zoo fit: built"
    (run / "metrics").mkdir()
    assert main([*TINY, "--data.batch_size", "4", "--run", str(run)]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_overwrite_deletes_old_run(run: Path) -> None:
    (run / "notes.txt").write_text("old")
    assert main([*TINY, "--data.batch_size", "4", "--run", str(run), "--overwrite"]) == 0
    config = read_run(run)
    assert config is not None
    assert config["data"]["init_args"]["batch_size"] == 4
    assert not (run / "notes.txt").exists()
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_overwrite_deletes_only_when_new_run_can_begin(run: Path) -> None:
    before = contents(run)
    assert main([*TINY, "--data.batch_size", "4000", "--run", str(run), "--overwrite"]) == 2
    assert contents(run) == before


@pytest.mark.parametrize("config", [None, "a: 1\n", "]["])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_unrelated_folder_is_not_changed(
    config: str | None, overwrite: list[str], scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scratch / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    before = contents(folder)
    assert main([*TINY, "--run", str(folder), *overwrite]) == 2
    assert "is not a run" in capsys.readouterr().err
    assert contents(folder) == before


def test_file_is_not_changed(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "file").write_text("mine")
    assert main([*TINY, "--run", "file", "--overwrite"]) == 2
    assert "file is a file" in capsys.readouterr().err
    assert (scratch / "file").read_text() == "mine"


def test_run_killed_at_its_beginning_starts_again(scratch: Path) -> None:
    (scratch / "run" / ".config.yaml.writing").mkdir(parents=True)
    (scratch / "run" / ".config.yaml.writing" / "0123").write_text("trai")
    (scratch / "run" / ".claim").write_text("process 1 on another machine")
    assert main([*TINY, "--run", "run"]) == 0
    assert read_run(scratch / "run") is not None
    assert not [path.name for path in (scratch / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_second_process_for_same_run_raises(
    overwrite: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed_folder(run):
        before = contents(run)
        assert main([*TINY, "--run", str(run), *overwrite]) == 2
        assert f"writes {run}: wait until it ends, or choose another destination" in capsys.readouterr().err
        assert contents(run) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train", "nowhere"], "location 'nowhere' does not exist"),
        (["--data.batch_size", "4000"], "needs at least 4000 samples, got 1000: lower it to at most 1000"),
        (["--data.image_size", "64"], "data.init_args.image_size is 64, the dVAE's config.image_size 32"),
        (["--model.config.width", "5"], "width must be a multiple of 4"),
        (["--checkpoint.every", "0"], "every must be at least 1"),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "99"], "gpu"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--trainer.logger", "false"], "trainer.logger cannot be False"),
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing cannot be False"),
        (["--trainer.reload_dataloaders_every_n_epochs", "1"], "would repeat epoch 0"),
        (["--trainer.fast_dev_run", "true"], "use --trainer.max_steps 2"),
        (["--trainer.barebones", "true"], "turns off checkpoints"),
        (["--model.warm_start.steps", "40"], "ends at step 1 inside the warm start of 40 steps"),
        (["--trainer.default_root_dir", "elsewhere"], "use --run FOLDER"),
    ],
)
def test_impossible_run_leaves_no_folder(
    options: list[str], message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *options, "--run", "new/run"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert list(scratch.iterdir()) == []


def test_empty_run_name_raises(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*TINY, "--run", ""])
    assert "--run: expected a folder, got nothing" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", [".", "./", "..", "new"])
def test_run_folder_has_a_name_for_relative_paths(name: str, scratch: Path) -> None:
    folder = run_folder(name)
    assert folder.name not in ("", "..")
    assert folder.resolve() == (scratch / name).resolve()


@pytest.mark.parametrize(
    ("location", "message"),
    [("\N{RED APPLE}", "'\N{RED APPLE}' does not exist"), ("caf\udce9", r"'caf\udce9' is not valid Unicode")],
)
def test_non_ascii_text_reaches_the_recipe(
    location: str, message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--data.train", location, "--run", "r"]) == 2
    assert message in capsys.readouterr().err


def test_validation_without_data_raises(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "dvae/tiny", "--data.val", "null", "--run", str(finished)]) == 2
    assert "validate needs validation data, and the recipe has none: set data.val" in capsys.readouterr().err


def test_bundled_weights_can_be_trained_further(
    scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(self: ZooCLI) -> None:
        raise UserError("built")

    page = (Path(__file__).parents[2] / "docs/train/recipes.md").read_text()
    options = ["--model.init_from composition", "--model.warm_start null"]
    assert all(f"`{option}`" in page for option in options)
    monkeypatch.setattr(ZooCLI, "before_fit", built)
    words = [word for option in options for word in option.split()]
    assert main(["fit", "dvae/composition", *words, "--trainer.devices", "1", "--trainer.strategy", "auto"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "dalle-zoo fit: built"


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("ranker/tiny", ["--data.init_args.text", "null"], "the ranker is trained on captions"),
        (
            "prior/paper-12b",
            ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"],
            "weights + gradients + AdamW + average in float32",
        ),
    ],
)
def test_impossible_stage_raises_before_claiming_a_folder(
    recipe: str,
    options: list[str],
    message: str,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dalle_zoo.cli.fit.machine_memory", lambda: 16 * 10**9)
    assert main(["fit", recipe, *options, "--run", "run"]) == 2
    assert message in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


def test_predict_with_ranker_raises(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "ranker/tiny", "--run", "run"]) == 2
    assert "RankerModule has nothing to generate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (0, 0)),
        (["--seed_everything", "7"], (7, 7)),
        (["--seed_everything=7", "--data.seed", "3"], (7, 3)),
        (["--model.init_args.seed=4", "--seed_everything", "7"], (4, 7)),
    ],
)
def test_one_seed_sets_all_seeds_unless_stated(
    options: list[str], expected: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "dvae/tiny", *options, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert tuple(config[part]["init_args"]["seed"] for part in ("model", "data")) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, "modle: unknown key 'modle'. Did you mean 'model'?"),
        ({"model__init_args__confg": {}}, "model.init_args.confg: unknown key 'confg'. Did you mean 'config'?"),
        ({"model__init_args__kl_weight__strat": 1}, "unknown key 'strat'. Did you mean 'start'?"),
        ({"trainer__gradient_clip_vale": 1}, "unknown key 'gradient_clip_vale'. Did you mean 'gradient_clip_val'?"),
        ({"model__class_path": "DVAModule"}, "unknown class 'DVAModule'. Did you mean 'DVAEModule'?"),
        ({"model": 3}, "model must have class_path and init_args, got 3"),
    ],
)
def test_typo_in_recipe_raises_with_file_and_key(
    changes: dict[str, Any], message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = own_recipe(scratch / "mine.yaml", **changes)
    assert main(["fit", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert str(recipe) in said
    assert message in said
    assert [path.name for path in scratch.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not valid YAML"), ("- 1", "expected keys such as model")])
def test_file_that_is_no_recipe_raises(
    text: str, message: str, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "mine.yaml").write_text(text)
    assert main(["fit", "mine.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_recipe_without_data_raises(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(find_recipe("dvae/tiny").read_text())
    del recipe["data"]
    (scratch / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "mine.yaml"]) == 2
    assert "the recipe has no data" in capsys.readouterr().err
    assert [path.name for path in scratch.iterdir()] == ["mine.yaml"]


def test_parts_override_the_recipe(scratch: Path) -> None:
    (scratch / "small.yaml").write_text("data: {init_args: {batch_size: 2}}\n")
    assert main(["fit", "dvae/tiny", "--parts", "small.yaml", *SHORT, "--run", "run"]) == 0
    config = read_run(scratch / "run")
    assert config is not None
    assert config["data"]["init_args"]["batch_size"] == 2
    assert config["data"]["init_args"]["image_size"] == 32


def test_process_arguments_are_not_changed(finished: Path, run: Path) -> None:
    before = list(sys.argv)
    assert main([*TINY, "--run", str(run)]) == 0
    assert sys.argv == before, "lightning starts further processes with them"


def test_differences_list_every_leaf() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}
    assert differences(old, new) == ["a.c: [1] → [2]", "d: 2 → None", "e: None → 3"]
    assert differences(old, old) == []


@pytest.mark.slow
def test_two_processes_train_together(scratch: Path) -> None:
    script = scratch / "command.py"
    script.write_text("import sys\nfrom dalle_zoo.cli.main import main\n\nsys.exit(main())\n")
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--run", "run"]
    done = subprocess.run(
        [sys.executable, str(script), *TINY, *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (scratch / "run" / "model" / "dvae" / "model.safetensors").is_file()
