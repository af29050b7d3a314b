"""Parsing of mask specs and schedules, and errors for invalid ones."""

from collections import Counter

import pytest

from dalle_zoo.masks import Mask, MaskSpec, TextImageLayout, layer_masks


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("row", "row"),
        ("  row ", "row"),
        ("row()", "row"),
        ("conv", "conv"),
        ("conv(kernel=3)", "conv(kernel=3)"),
        (" conv ( kernel = 3 ) ", "conv(kernel=3)"),
    ],
)
def test_spec_has_one_canonical_text(text: str, canonical: str) -> None:
    assert str(MaskSpec.parse(text)) == canonical
    assert Mask.from_spec(text, TextImageLayout(2, 4, 4)).spec == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colum", "unknown attention mask 'colum'. Did you mean 'column'"),
        ("conv(kernl=3)", "unknown conv option 'kernl'. Did you mean 'kernel'"),
        ("row(kernel=3)", "unknown row option 'kernel'. Known: none"),
        ("conv(3)", "an option of 'conv' is written 'option=integer'.* got '3'"),
        ("conv(kernel=3.5)", "got 'kernel=3.5'"),
        ("conv(kernel=three)", "got 'kernel=three'"),
        ("conv(kernel=3,)", "got ''"),
        ("conv(kernel=3, kernel=5)", "'kernel' is given twice"),
        ("conv(kernel=3", "a mask is written"),
        ("conv kernel=3", "a mask is written"),
        ("conv(kernel=3)x", "a mask is written"),
        ("", "a mask is written"),
        ("conv(kernel=4)", "kernel of the conv mask must be odd"),
        ("conv(layout=4)", "unknown conv option 'layout'"),
    ],
)
def test_invalid_specs_raise_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mask.from_spec(text, TextImageLayout(2, 4, 4))


def test_paper_schedule() -> None:
    layers = layer_masks("paper", 64)
    assert Counter(layers) == {"row": 47, "column": 16, "conv": 1}
    assert [i for i, spec in enumerate(layers, start=1) if spec == "column"] == list(range(2, 63, 4))
    assert layers[-1] == "conv"
    assert layer_masks(" paper(kernel = 5) ", 64) == (*layers[:-1], "conv(kernel=5)")


def test_paper_schedule_of_few_layers() -> None:
    assert layer_masks("paper", 1) == ("conv",)
    assert layer_masks("paper", 2) == ("row", "conv")
    assert layer_masks("paper", 3) == ("row", "column", "conv")


def test_a_list_of_masks_is_repeated() -> None:
    assert layer_masks("full", 3) == ("full", "full", "full")
    assert layer_masks("row,column", 3) == ("row", "column", "row")
    assert layer_masks("conv( kernel=3 ), row", 3) == ("conv(kernel=3)", "row", "conv(kernel=3)")
    assert layer_masks("row, column, conv", 2) == ("row", "column")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("papr", "unknown schedule or mask 'papr'. Did you mean 'paper'"),
        ("row, colum", "unknown schedule or mask 'colum'. Did you mean 'column'"),
        ("paper(kernl=5)", "unknown conv option 'kernl'. Did you mean 'kernel'"),
        ("row, conv(kernl=5)", "unknown conv option 'kernl'. Did you mean 'kernel'"),
        ("paper, row", "'paper' is a complete schedule and cannot be part of a list"),
        ("row,,column", "a mask is written"),
        ("", "a mask is written"),
    ],
)
def test_invalid_schedules_raise_with_a_suggestion(schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_masks(schedule, 4)


@pytest.mark.parametrize("num_layers", [0, -3])
def test_schedules_without_layers_raise(num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"num_layers must be an integer of at least 1, got {num_layers}"):
        layer_masks("paper", num_layers)
