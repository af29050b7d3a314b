"""Plots of masks."""

import math
from pathlib import Path

import numpy as np
import pytest

from dalle_zoo.masks import MASKS, TextImageLayout, plot_masks

pytest.importorskip("matplotlib", reason="plotting needs matplotlib")
from matplotlib import image as reader
from matplotlib.figure import Figure

LAYOUT = TextImageLayout(text=6, height=4, width=4)


def test_plots_every_registered_mask(tmp_path: Path) -> None:
    path = tmp_path / "new" / "masks.png"
    plot_masks(MASKS, LAYOUT, path)
    pixels = reader.imread(path)
    height, width = pixels.shape[:2]
    assert width > 1000
    assert height / math.ceil(len(MASKS) / 4) < 0.6 * width  # rows of four: a reader sees many masks at once
    colors = {tuple(color) for color in np.unique(pixels[::7, ::7, :3].reshape(-1, 3), axis=0)}
    assert len(colors) >= 6  # the five kinds of cell and the query
    assert [file.name for file in path.parent.iterdir()] == ["masks.png"]


def test_plots_of_different_masks_differ(tmp_path: Path) -> None:
    images = []
    for spec in ("row", "column", "conv(kernel=3)"):
        plot_masks([spec], LAYOUT, tmp_path / "one.png")
        images.append(reader.imread(tmp_path / "one.png"))
    assert not np.array_equal(images[0][150:], images[1][150:])  # below the header
    assert not np.array_equal(images[1][150:], images[2][150:])


def test_the_smallest_layout_and_the_other_formats(tmp_path: Path) -> None:
    plot_masks(["row"], TextImageLayout(1, 1, 1), tmp_path / "small.svg")
    assert "</svg>" in (tmp_path / "small.svg").read_text()


@pytest.mark.parametrize(
    ("specs", "name", "message"),
    [
        (["row"], "masks.gif", r"must end in one of \.png"),
        (["row"], "masks", r"must end in one of \.png"),
        ([], "masks.png", "specs is empty"),
        (["row", "colum"], "masks.png", "Did you mean 'column'"),
    ],
)
def test_invalid_input_raises_and_writes_nothing(tmp_path: Path, specs: list[str], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_masks(specs, LAYOUT, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "masks.png"
    path.write_bytes(b"old")

    def half(self: Figure, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"ha")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plot_masks(["row"], LAYOUT, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
