"""Recipes: every one parses and its network can be built; the tiny ones run to the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_zoo.cli.fit import ZooCLI, check_keys
from dalle_zoo.cli.main import main, quiet_third_parties
from dalle_zoo.cli.train import read_recipe
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.models.ranker import Ranker, RankerConfig
from dalle_zoo.recipes import find_part, find_recipe, list_recipes, recipe_header
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.tokenizers import load_text_tokenizer
from dalle_zoo.zoo import find_component

RECIPES = list_recipes()
BUILDERS: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    "dvae": lambda fields: DVAE(DVAEConfig(**fields)),
    "prior": lambda fields: Prior(PriorConfig(**fields)),
    "ranker": lambda fields: Ranker.create(RankerConfig(**fields), text_tokenizer()),
}
PARAMETERS = {"dvae/paper": 53_786_240 + 43_829_766, "prior/paper-12b": sum(PriorConfig().count_parameters().values())}
"""Of the paper's shapes."""


def text_tokenizer() -> Any:
    return load_text_tokenizer(find_component("emoji64", "tokenizer"))


class Parsed(ZooCLI):
    """Reads a recipe and builds nothing."""

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_the_recipes_that_the_project_promises_are_there() -> None:
    stages = {f"{stage}/{size}" for stage in ("dvae", "prior", "ranker") for size in ("tiny", "emoji64")}
    assert stages | PARAMETERS.keys() <= set(RECIPES)
    assert len(RECIPES) >= 5


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("name", RECIPES)
def test_it_parses_and_builds_on_the_meta_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dalle-zoo"])
    monkeypatch.setattr("dalle_zoo.cli.fit.machine_memory", lambda: 10**15)  # nothing is built
    quiet_third_parties()
    check_keys("fit", {find_recipe(name): read_recipe(find_recipe(name))}, [])
    parsed = Parsed(tmp_path / "run", False, ["fit", f"--config={find_recipe(name)}"])
    own = parsed.config["fit"]
    stage = name.split("/")[0]
    assert own.model.class_path.endswith(
        {"dvae": "DVAEModule", "prior": "PriorModule", "ranker": "RankerModule"}[stage]
    )
    with torch.device("meta"):
        net = BUILDERS[stage](vars(own.model.init_args.config))
    count = sum(p.numel() for p in net.parameters())
    assert all(p.is_meta for p in net.parameters())
    assert count == PARAMETERS.get(name, count)
    assert not (tmp_path / "run").exists()


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
        assert len(list((run / "pictures").iterdir())) == 2


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
