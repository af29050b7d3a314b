"""Recipes: every one parses and its network can be built; the tiny ones run to the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_zoo.cli.fit import ZooCLI, check_keys
from dalle_zoo.cli.main import main, quiet_third_parties
from dalle_zoo.files import write_json
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.external.mindalle import MinDALLEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.recipes import (
    find_part,
    find_recipe,
    list_recipes,
    merge,
    override,
    read_recipe,
    recipe_header,
    resolve,
    resolve_shares,
    split_arguments,
)
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import load_text_tokenizer
from dalle_zoo.zoo import find_component

RECIPES = list_recipes()
BUILDERS: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    "dvae": lambda fields: DVAE(DVAEConfig(**fields)),
    "prior": lambda fields: Prior(PriorConfig(**fields)),
    "ranker": lambda fields: Ranker.create(RankerConfig(**fields), text_tokenizer()),
}
PARAMETERS = {
    "dvae/paper": 53_786_240 + 43_829_766,
    "prior/cc-30m": 30_734_336,
    "prior/cc-300m": 302_874_624,
    "prior/cc-1.2b": 1_209_673_728,
    "prior/paper-2.8b": 2_928_262_656,
    "prior/paper-5.6b": 5_685_004_800,
    "prior/paper-12b": 12_292_840_960,
}
"""Of those that were not trained here."""
MATRICES = {"prior/paper-2.8b": 2_831_155_200, "prior/paper-5.6b": 5_549_064_192, "prior/paper-12b": 12_092_178_432}
"""12 d^2 in each of 64 layers, for the widths of table 1."""


def parts_in_header(name: str) -> list[str]:
    """Parts that a recipe's header names behind the word."""
    listed = re.search(r"\bparts ((?:[\w.-]+, )*[\w-]+)", recipe_header(name).replace("\n", " "))
    return listed.group(1).split(", ") if listed else []


COMBINATIONS = [(name, part) for name in RECIPES for part in parts_in_header(name)]
FITS = [
    ("prior/cc-30m", ["--gpu-memory", "24"]),
    ("prior/cc-1.2b", ["--gpu-memory", "80"]),
    ("prior/paper-5.6b", ["--gpu-memory", "16", "--trainer.strategy", "hsdp_powersgd(rank=640, shard_size=16)"]),
    ("prior/paper-12b", ["--gpu-memory", "16", "--trainer.strategy", "hsdp_powersgd(rank=896, shard_size=32)"]),
    ("prior/paper-12b", ["--parts", "8x80gb"]),
]
"""What headers claim besides."""


def text_tokenizer() -> Any:
    return load_text_tokenizer(find_component("composition", "tokenizer"))


class Parsed(ZooCLI):
    """Reads a recipe and builds nothing."""

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_the_recipes_that_the_project_promises_are_there() -> None:
    stages = {f"{stage}/{size}" for stage in ("dvae", "prior", "ranker") for size in ("tiny", "composition")}
    assert stages | PARAMETERS.keys() <= set(RECIPES)


def parse(name: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The resolved keys of a recipe with parts, as `dalle-zoo fit` reads them."""
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    monkeypatch.setattr("dalle_zoo.cli.fit.machine_memory", lambda: 10**15)  # nothing is built
    quiet_third_parties()
    files = [find_recipe(name), *map(find_part, parts)]
    contents = {file: read_recipe(file) for file in files}
    check_keys("fit", contents, [])
    arguments = ["fit", f"--config={json.dumps(resolve_shares(resolve(contents.values())))}"]
    return Parsed(tmp_path / "run", False, ExitStack(), arguments).config["fit"]


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("name", RECIPES)
def test_it_parses_and_builds_on_the_meta_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = parse(name, [], tmp_path, monkeypatch)
    stage = name.split("/")[0]
    assert own.model.class_path.endswith(
        {"dvae": "DVAEModule", "prior": "PriorModule", "ranker": "RankerModule"}[stage]
    )
    if own.model.init_args.config is None:
        assert own.model.init_args.init_from
        return  # the architecture is that of a model, which tests/training/test_finetuning.py opens
    with torch.device("meta"):
        net = BUILDERS[stage](vars(own.model.init_args.config))
    count = sum(p.numel() for p in net.parameters())
    assert all(p.is_meta for p in net.parameters())
    assert count == PARAMETERS.get(name, count)
    if name in MATRICES:
        assert isinstance(net, Prior)
        matrices = [p for block in net.residual_blocks() for p in block.branch.parameters() if p.ndim == 2]
        assert sum(p.numel() for p in matrices) == MATRICES[name]
    assert not (tmp_path / "run").exists()


def test_headers_name_parts() -> None:
    named = {name for name, _ in COMBINATIONS}
    assert {"dvae/paper", "prior/cc-30m", "prior/cc-300m", "prior/cc-1.2b"} <= named
    assert {part for _, part in COMBINATIONS} >= {"1gpu", "8gpu", "8x16gb", "8x80gb", "64x80gb"}


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize(("name", "part"), COMBINATIONS)
def test_parts_that_a_header_names_fit_on_the_recipe_and_on_the_hardware(
    name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, stated = parse(name, [part], tmp_path, monkeypatch), read_recipe(find_part(part))["trainer"]
    assert {key: own.trainer[key] for key in stated} == stated
    file = tmp_path / "plan.json"
    memory = [] if part.endswith("gb") else ["--gpu-memory", "80"]
    assert main(["plan", name, "--parts", part, *memory, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["fits"], "the header names hardware on which it does not fit"


@pytest.mark.parametrize(("name", "options"), FITS)
def test_what_headers_say_of_memory_is_what_the_plan_says(name: str, options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", name, *options, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["fits"]


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("ranker/")])
def test_each_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prior = Path("models/mindalle/prior")  # which prior/finetune-cub starts from: of a plan it needs the config only
    prior.mkdir(parents=True)
    write_json(prior / "config.json", {"type": "mindalle", **asdict(MinDALLEConfig())})
    assert main(["plan", name, "--gpu", "a100-80gb"]) == 0
    printed = capsys.readouterr().out
    assert f"{PARAMETERS[name]:,}" in printed if name in PARAMETERS else "parameters" in printed
    assert "FITS" in printed


@pytest.mark.parametrize("name", RECIPES)
def test_its_header_says_how_it_is_run_and_what_to_expect(name: str) -> None:
    header = recipe_header(name)
    assert f"dalle-zoo fit {name}" in header
    for word in ("command", "hardware", "score"):
        assert any(line.startswith(word) for line in header.splitlines()), f"{name} does not state {word}"
    assert not header.splitlines()[0].startswith("command")


def test_what_was_not_trained_says_so() -> None:
    for name in PARAMETERS:
        assert "not trained here" in recipe_header(name)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("/tiny")])
def test_tiny_recipes_run_to_the_end(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    assert main(["fit", name, "--run", str(run), *options]) == 0
    stage = name.split("/")[0]
    assert {path.name for path in (run / "model" / stage).iterdir()} >= {"config.json", "model.safetensors"}
    assert {"config.yaml", "checkpoints", "metrics", "model"} <= {path.name for path in run.iterdir()}
    if stage != "ranker":
        assert len(list((run / "images").iterdir())) == 2


def test_a_recipe_by_name_or_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("seed_everything: 0\n")
    assert find_recipe(str(own)) == own
    assert find_recipe("dvae/tiny").read_text().startswith("# A dVAE")
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'dvae/tinny'\. Did you mean 'dvae/tiny'\?"):
        find_recipe("dvae/tinny")
    assert find_part(str(own)) == own
    with pytest.raises(UnknownNameError, match="unknown recipe part 'gpuu'"):
        find_part("gpuu")


# ------------------------------------------------------------ one interpretation


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("{a: 1e-3, b: 10, c: -.5, d: 1_000, e: '1e-3', f: 10:00:00, g: 2024-01-01, h: 4.5e+2, i: 1.e3}")
    expected = {"a": 1e-3, "b": 10, "c": -0.5, "d": 1000, "e": "1e-3", "f": "10:00:00", "g": "2024-01-01", "h": 450.0}
    assert read_recipe(own) == expected | {"i": 1000.0}


def test_keys_of_the_command_line() -> None:
    line = ["--trainer.max_steps", "-1", "x", "--data.batch_size=4", "--help", "--model", "PriorModule"]
    keys, others = split_arguments(line, reserved=["--help"])
    assert keys == [("trainer.max_steps", "-1"), ("data.batch_size", "4"), ("model", "PriorModule")]
    assert others == ["x", "--help"]
    for arguments in (["--a"], ["--a", "--b", "1"]):
        with pytest.raises(ValueError, match="--a has no value"):
            resolve([], split_arguments(arguments)[0])
    assert override("trainer.max_steps", "-1") == {"trainer": {"max_steps": -1}}
    assert override("data.init_args.text", "null") == {"data": {"init_args": {"text": None}}}
    assert override("data.train", "a: [") == {"data": {"init_args": {"train": "a: ["}}}


def test_later_keys_win() -> None:
    callbacks = [{"class_path": "A"}, {"class_path": "B", "init_args": {"decay": 0.5}}]
    recipe = {"model": {"class_path": "X", "init_args": {"a": 1, "b": 2}}, "trainer": {"callbacks": callbacks}}
    part = {"model": {"init_args": {"b": 3}}, "trainer": {"callbacks+": ["C"]}}
    merged = resolve([recipe, part], [("model.a", "4")])
    assert merged["model"] == {"class_path": "X", "init_args": {"a": 4, "b": 3}}
    assert merged["trainer"]["callbacks"] == [*callbacks, "C"]
    assert recipe["model"] == {"class_path": "X", "init_args": {"a": 1, "b": 2}}, "files are left as they are"
    for key in ("trainer.callbacks.decay", "trainer.callbacks.init_args.decay"):
        last = resolve([recipe], [(key, "0.9")])["trainer"]["callbacks"]
        assert last == [callbacks[0], {"class_path": "B", "init_args": {"decay": 0.9}}]


def test_another_class_discards_the_arguments_of_the_old_one() -> None:
    below = {"model": {"class_path": "X", "init_args": {"a": 1}}, "other": 1}
    assert merge(below, {"model": {"class_path": "X"}}) == below
    for above in ({"model": {"class_path": "Y"}}, override("model", "Y"), override("model.class_path", "Y")):
        assert merge(below, above) == {"model": {"class_path": "Y"}, "other": 1}


@pytest.mark.parametrize("seed", [None, True, 5])
def test_the_common_seed_goes_to_native_classes_without_one(seed: Any) -> None:
    recipe = {
        "seed_everything": seed,
        "model": {"class_path": "PriorModule", "init_args": {}},
        "data": {"class_path": "ImageDataModule", "init_args": {"seed": 1}},
    }
    resolved = resolve([recipe])
    assert resolved["data"]["init_args"] == {"seed": 1}
    assert resolved["model"]["init_args"] == ({"seed": 5} if seed == 5 else {})
    external = {"model": {"class_path": "package.Module"}}
    assert resolve([recipe, external])["model"] == external["model"]


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}\n", "trainer", (1, 3)),
        ("model:\n  init_args:\n    seed: 1\n    seed: 2\n", "seed", (3, 4)),
        ("trainer:\n  callbacks:\n    - {class_path: A, class_path: B}\n", "class_path", (3, 3)),
    ],
)
def test_a_key_given_twice_is_refused(text: str, key: str, lines: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"key {key!r} is given twice, in line {lines[0]} and in line {lines[1]}"):
        read_recipe(path)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("model: &one {a: 1, b: 2}\ndata: {<<: *one, b: 3}\n")
    assert read_recipe(path) == {"model": {"a": 1, "b": 2}, "data": {"a": 1, "b": 3}}


def test_arguments_follow_the_class_that_was_appended() -> None:
    given = [("trainer.callbacks+", "EarlyStopping"), ("trainer.callbacks.monitor", "val/loss")]
    early = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}
    assert resolve([{"trainer": {}}], given) == {"trainer": {"callbacks": [early]}}


# ------------------------------------------------------------ shares of a run


def test_shares_are_steps_of_the_run() -> None:
    recipe = {
        "model": {
            "init_args": {"learning_rate": {"warmup_steps": "2%", "decay_steps": "97.5 %"}, "warm_start": {"steps": 7}}
        },
        "data": {"init_args": {"train": "50%"}},
        "trainer": {
            "max_steps": 400,
            "val_check_interval": "10%",
            "callbacks": [{"class_path": "WeightEMA", "init_args": {"start": "50.25%", "every": "0.01%"}}],
        },
        "samples": {"prompts": ["50%"]},
    }
    keys = resolve_shares(resolve([recipe], [("checkpoint.every", "100%")]))
    assert keys["model"]["init_args"] == {
        "learning_rate": {"warmup_steps": 8, "decay_steps": 390}, "warm_start": {"steps": 7},
    }  # fmt: skip
    assert keys["trainer"]["val_check_interval"] == 40
    assert keys["trainer"]["callbacks"][0]["init_args"] == {"start": 201, "every": 1}, "at least one step"
    assert keys["checkpoint"]["every"] == 400
    assert keys["data"]["init_args"]["train"] == "50%", "no number of steps"
    assert keys["samples"]["prompts"] == ["50%"]
    assert resolve_shares(recipe, length=100)["trainer"]["val_check_interval"] == 10
    accumulated = resolve_shares(resolve([recipe], [("trainer.accumulate_grad_batches", "3")]))
    assert accumulated["trainer"]["val_check_interval"] == 3 * 40, "which Lightning counts in batches"


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"max_steps": 10, "val_check_interval": "101%"},
            "trainer.val_check_interval is 101% of the run: expected",
        ),
        ({"val_check_interval": "5%"}, "is a share of trainer.max_steps, which is None: set it"),
        ({"max_steps": -1, "val_check_interval": "5%"}, "is a share of trainer.max_steps, which is -1: set it"),
    ],
)
def test_shares_of_nothing_are_refused(trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_shares({"trainer": trainer})


def test_schedules_of_recipes_follow_the_length_of_the_run() -> None:
    for name in ("dvae/tiny", "prior/cc-300m", "ranker/composition"):
        recipe = read_recipe(find_recipe(name))
        own, longer = (resolve_shares(recipe, n * recipe["trainer"]["max_steps"]) for n in (1, 2))
        rates = [keys["model"]["init_args"]["learning_rate"] for keys in (own, longer)]
        for key in ("warmup_steps", "decay_steps"):
            assert rates[1][key] == pytest.approx(2 * rates[0][key], abs=1), name
