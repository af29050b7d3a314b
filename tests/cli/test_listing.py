"""``dalle-zoo list`` and the keys of a recipe: complete, and fast where nothing must be loaded."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.cli.registered import SOURCES, members


@pytest.mark.parametrize("kind", SOURCES)
def test_names_in_the_source_are_those_of_the_registry(kind: str) -> None:
    source = SOURCES[kind]
    module = source.place.removesuffix(".py").replace("/", ".")
    registry = getattr(importlib.import_module(module), source.registry)
    assert list(members(kind)) == list(registry)
    assert all(members(kind).values()), "every member says what it is"


def test_listing_loads_no_torch() -> None:
    script = (
        "import sys; from dalle_zoo.cli.main import main\n"
        f"for kind in {['', 'recipes', *SOURCES]}: main(['list', *kind.split()])\n"
        "sys.exit(', '.join({'torch', 'lightning', 'numpy', 'tokenizers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"masks", "row", "byte", "hsdp", "16-resblock", "cosine", "fid", "prior/tiny"} <= names


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["list", "mask"])
    assert "Did you mean 'masks'" in capsys.readouterr().err


def test_help_lists_the_keys_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "prior/tiny", "--model.seed", "3", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    places = [page.index(f"--{key} ") for key in ("model.config.width", "data.text.length", "samples.prompts")]
    assert places == sorted(places)
    assert places[-1] < page.index("--trainer.max_steps "), "those of Lightning are the last"
    assert "--model.config.width INT Model width d. [32 in the recipe, default 3968]" in page
    assert "[3 in the recipe, default 0]" in page
    assert "[80% in the recipe, default 1]" in page, "a share of the run, as it is written"
    assert "--model.adamw.beta2 FLOAT Decay of the running variance. [0.96]" in page, "the default of the stage"
    assert "--data.text.tokenizer STR Folder of a text tokenizer, a model that has one" in page
