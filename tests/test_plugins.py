"""Another distribution joins the registries: really built, installed, found by entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plugin installed, without the network."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
            *("--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder)),
            str(ROOT / "tests/plugin"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def run(site: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a new Python that has the plugin; its log goes to standard error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_mask_joins_by_name(site: Path) -> None:
    done = run(
        site,
        """
import sys
from dalle_zoo.masks import MASKS, Mask, TextImageLayout
assert {"diagonal", "full", "row"} <= set(MASKS), list(MASKS)
assert "dalle_zoo_plugin_example" not in sys.modules, "listing loaded the plugin"
layout = TextImageLayout(text=2, height=3, width=3)
print(Mask.from_spec("diagonal(steps=1)", layout).dense()[2:, 2:].int().tolist())
assert Mask.from_spec("diagonal(steps=2)", layout).dense()[10, 2]
""",
    )
    # By hand: each cell reads itself and the one W + 1 before it in raster order.
    reads = {0: [0], 1: [1], 2: [2], 3: [3], 4: [0, 4], 5: [1, 5], 6: [2, 6], 7: [3, 7], 8: [4, 8]}
    expected = [[int(key in reads[query]) for key in range(9)] for query in range(9)]
    assert done.stdout.strip() == str(expected)


def test_a_taken_name_is_refused_with_a_warning(site: Path) -> None:
    done = run(
        site,
        """
from dalle_zoo.masks import MASKS, row
list(MASKS)
assert MASKS["row"] is row
""",
    )
    assert (
        "attention mask 'row' of dalle_zoo_plugin_example:diagonal is ignored: the name is already registered"
        in done.stderr
    )


def test_tokenizers_join_by_name(site: Path) -> None:
    run(
        site,
        """
import tempfile, torch
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS
from dalle_zoo.tokenizers import TEXT_TOKENIZERS, load_text_tokenizer
text = TEXT_TOKENIZERS["letters"]()
assert text.encode("A cab!") == [0, 26, 2, 0, 1]
with tempfile.TemporaryDirectory() as folder:
    text.save(folder)
    assert type(load_text_tokenizer(folder)) is type(text)
kind = IMAGE_TOKENIZERS["brightness"]
images = kind(kind.config_class())
codes = torch.arange(16).reshape(1, 4, 4)
assert images.encode(images.decode(codes)).equal(codes)
""",
    )


@pytest.mark.parametrize(
    ("registry", "base"),
    [
        ("dalle_zoo.tokenizers.TEXT_TOKENIZERS", "TextTokenizer"),
        ("dalle_zoo.models.tokenizer.IMAGE_TOKENIZERS", "ImageTokenizer"),
    ],
)
def test_a_tokenizer_without_the_base_class_raises(site: Path, registry: str, base: str) -> None:
    module, _, name = registry.rpartition(".")
    done = run(
        site,
        f"""
from {module} import {name} as registry
try:
    registry["no_base"]
except TypeError as error:
    print(error)
""",
    )
    assert f"'no_base' must derive from {base}" in done.stdout
