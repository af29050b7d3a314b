"""Plots of training curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dalle_zoo.plots import GRADIENT_SCALES, plot_curves


def test_curves_are_plotted(tmp_path: Path) -> None:
    curves = {"train/loss": {0: 2.0, 10: 1.0}, "val/loss": {10: 1.5}, "schedule/rate": {0: 0.1}}
    out = plot_curves(curves, tmp_path / "new/curves.png", title="runs/toy")
    with Image.open(out) as image:
        assert image.width > image.height  # two panels in a row
    assert [p.name for p in out.parent.iterdir()] == ["curves.png"]
    with pytest.raises(ValueError, match="logged nothing"):
        plot_curves({}, out)


def test_gradient_scales_are_plotted_by_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve layers as many names; they share one panel, each kind of block with its own marks."""
    from matplotlib.axes import Axes

    plotted: list[tuple[list[float], list[float], str]] = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *_, label, **__: plotted.append((x, y, label)))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    names = [f"layers.{layer}.{kind}" for layer in range(12) for kind in ("attention", "mlp")]
    curves = {f"{GRADIENT_SCALES}{name}": {0: 13.0, 9: float(number)} for number, name in enumerate(names, 1)}
    plot_curves(dict(sorted(curves.items())), tmp_path / "curves.png")
    odd, even = [*range(1, 25, 2)], [*range(2, 25, 2)]
    assert plotted == [(odd, odd, "attention"), (even, even, "mlp")]
