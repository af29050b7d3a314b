"""Published scores: complete tables with family, setting and source; wrong tables raise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from dalle_zoo_eval.data_files import DataFileError
from dalle_zoo_eval.published import (
    MARKS,
    SCORE_FAMILIES,
    PublishedRow,
    find_published,
    list_published,
    read_published,
)

from dalle_zoo.registry import UnknownNameError
from tools.published_page import DOCUMENT, page

FIGURE = "DALL-E paper, figure 9({}), digitised"


def rows(table: str, **wanted: Any) -> list[PublishedRow]:
    return [r for r in find_published(table).rows if all(getattr(r, n) == v for n, v in wanted.items())]


def value(table: str, **wanted: Any) -> float:
    (row,) = rows(table, **wanted)
    return row.value


def test_tables_have_all_scores() -> None:
    assert list_published() == ["coco", "cub"]
    counts = {
        name: Counter((row.metric, row.family) for row in find_published(name).rows) for name in list_published()
    }
    assert counts["coco"] == {
        ("fid", "dmgan"): 89,
        ("fid", "inception-2015"): 19,
        ("fid", "unknown"): 16,
        ("is", "inception-2015"): 39,
        ("is", "unknown"): 3,
        ("clip_score", "unknown"): 1,
        ("caption_loss", "cogview"): 4,
        ("human_realism", "human"): 6,
        ("human_match", "human"): 6,
        ("human_quality", "human"): 1,
    }
    assert counts["cub"] == {
        ("fid", "dmgan"): 45,
        ("fid", "inception-2015"): 3,
        ("is", "stackgan-birds"): 23,
        ("is", "inception-2015"): 1,
    }
    # Figure 9: four systems, five radii, two sets of references and one inception score; ten numbers of candidates.
    assert len(rows("coco", source=FIGURE.format("a"))) == len(rows("cub", source=FIGURE.format("b"))) == 60
    assert len(rows("coco", source=FIGURE.format("c"))) == 20


@pytest.mark.parametrize(
    ("table", "wanted", "expected"),
    [
        ("coco", {"system": "DALL-E 12 B", "overlap": "original", "blur": 0}, 28.5),
        ("coco", {"system": "DALL-E 12 B", "overlap": "deduplicated", "blur": 1, "quoted": False}, 27.9),
        ("coco", {"system": "DALL-E 12 B", "overlap": "original", "blur": 8}, 87.1),
        ("coco", {"system": "DM-GAN", "overlap": "original", "blur": 4}, 120.9),
        ("coco", {"system": "DF-GAN", "overlap": "deduplicated", "blur": 2, "quoted": False}, 55.5),
        ("coco", {"system": "AttnGAN", "metric": "is", "blur": 2}, 14.2),
        ("coco", {"source": FIGURE.format("c"), "metric": "fid", "candidates": 1}, 34.63),
        ("coco", {"source": FIGURE.format("c"), "metric": "fid", "candidates": 128}, 27.38),
        ("coco", {"source": FIGURE.format("c"), "metric": "is", "candidates": 512}, 17.86),
        ("coco", {"system": "CogView 4 B", "metric": "fid", "blur": 2}, 13.9),
        ("coco", {"system": "AttnGAN", "quoted": True, "blur": 8}, 100.0),
        ("coco", {"system": "AttnGAN", "metric": "fid", "family": "inception-2015"}, 29.53),
        ("coco", {"system": "DM-GAN", "setting": "trained on COCO, paper", "metric": "fid"}, 32.64),
        ("coco", {"system": "DF-GAN", "source": "DF-GAN README"}, 15.41),
        ("coco", {"system": "LAFITE", "blur": 8}, 14.79),
        ("coco", {"system": "Parti 20 B", "setting": "zero-shot"}, 7.23),
        ("coco", {"system": "Imagen"}, 7.27),
        ("coco", {"system": "minDALL-E 1.3 B", "family": "dmgan"}, 24.6),
        ("coco", {"system": "minDALL-E 1.3 B", "family": "unknown", "metric": "fid"}, 14.7),
        ("coco", {"system": "LDM-KL-8 1.45 B", "value": 23.35}, 23.35),
        ("coco", {"system": "Make-A-Scene 4 B", "metric": "human_match"}, 65.9),
        ("cub", {"system": "DALL-E 12 B", "overlap": "original", "blur": 0}, 56.1),
        ("cub", {"system": "DALL-E 12 B", "overlap": "deduplicated", "blur": 4}, 75.6),
        ("cub", {"system": "DM-GAN", "overlap": "original", "blur": 0}, 18.8),
        ("cub", {"system": "DALL-E 12 B", "metric": "is", "blur": 2}, 2.89),
        ("cub", {"system": "DM-GAN", "family": "inception-2015"}, 11.91),
        ("cub", {"system": "DF-GAN", "setting": "trained on CUB, released weights"}, 12.10),
        ("cub", {"system": "LAFITE", "metric": "fid"}, 10.48),
    ],
)  # fmt: skip
def test_tables_have_expected_values(table: str, wanted: dict[str, Any], expected: float) -> None:
    assert value(table, **wanted) == expected


@pytest.mark.parametrize("table", list_published())
def test_every_score_states_its_origin(table: str) -> None:
    found = find_published(table)
    assert len({row.key for row in found.rows}) == len(found.rows)
    for row in found.rows:
        assert row.family in SCORE_FAMILIES
        assert row.setting
        assert row.source
        assert set(row.marks.split("/")) <= set(MARKS)
        assert (row.error is not None) == ("digitised" in row.source), f"{row.system}: error bound of {row.source}"
        assert row.value > 0


def test_families_are_not_mixed() -> None:
    # Where the code is not stated, nothing may be compared.
    assert rows("coco", system="XMC-GAN")[0].family == "unknown"
    assert rows("coco", system="Kandinsky 12 B (ruDALL-E family)")[0].family == "unknown"
    for name in list_published():
        table = find_published(name)
        assert not table.comparable_rows("fid", "unknown", deduplicated=False)
        for family in ("dmgan", "inception-2015"):
            comparable = table.comparable_rows("fid", family, deduplicated=False)
            assert comparable
            assert {(row.metric, row.family) for row in comparable} == {("fid", family)}
            assert "deduplicated" not in {row.overlap for row in comparable}
        assert not {row.overlap for row in table.comparable_rows("fid", "dmgan", deduplicated=True)} & {"original"}
    # The inception score of birds comes from a network that knows birds.
    assert {r.family for r in rows("cub", metric="is", setting="zero-shot")} == {"stackgan-birds"}


def test_rejected_score_is_never_shown() -> None:
    (rejected,) = [row for name in list_published() for row in find_published(name).rows if row.do_not_use]
    assert (rejected.system, rejected.value) == ("DALL-E 12 B", 17.89)
    assert "inception score" in rejected.do_not_use
    table = find_published("coco")
    for family in SCORE_FAMILIES:
        for deduplicated in (False, True):
            assert 17.89 not in {row.value for row in table.comparable_rows("fid", family, deduplicated=deduplicated)}
    # Not even if its family were known.
    moved = PublishedRow(**{**vars(rejected), "family": "dmgan"})
    other = type(table)(name="x", title="x", samples=None, rows=(moved,))
    assert other.comparable_rows("fid", "dmgan", deduplicated=False) == ()


GROUP: dict[str, Any] = {
    "source": "a paper", "marks": "P", "metric": "fid", "family": "dmgan", "setting": "zero-shot",
    "rows": [{"system": "A", "value": 3.5}],
}  # fmt: skip


def written(path: Path, *groups: Any, **others: Any) -> Path:
    table = {"title": "T", "samples": None, "groups": list(groups), **others}
    path.write_text(yaml.safe_dump(table))
    return path


def test_row_overrides_its_group_and_series_becomes_rows(tmp_path: Path) -> None:
    group = {
        **GROUP, "over": "blur",
        "rows": [{"system": "A", "values": {0: 3.5, 2: 4}}, {"system": "B", "value": 1, "family": "unknown"}],
    }  # fmt: skip
    found = read_published(written(tmp_path / "t.yaml", group)).rows
    assert [(r.system, r.blur, r.value, r.family) for r in found] == [
        ("A", 0, 3.5, "dmgan"), ("A", 2, 4, "dmgan"), ("B", 0, 1, "unknown"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"familly": "dmgan"}, "group 1, row 1: unknown field 'familly'. Did you mean 'family'"),
        ({"family": "dm-gan"}, "unknown family 'dm-gan'. Did you mean 'dmgan'"),
        ({"metric": "fidd"}, "unknown metric 'fidd'. Did you mean 'fid'"),
        ({"overlap": "orignal"}, "unknown overlap 'orignal'. Did you mean 'original'"),
        ({"marks": "Q"}, "marks must be of P, F, C, R, S"),
        ({"setting": ""}, "setting must be text"),
        ({"rows": []}, "rows must be a list of rows"),
        ({"rows": [{"system": "A"}]}, "group 1, row 1: the field 'value' is required"),
        ({"rows": [{"value": 2}]}, "group 1, row 1: the field 'system' is required"),
        ({"rows": [{"system": "A", "value": "3"}]}, "value must be a number of at least 0, got '3'"),
        ({"rows": [{"system": "A", "value": float("nan")}]}, "value must be a number"),
        ({"rows": [{"system": "A", "value": 1, "blur": -1}]}, "blur must be an integer of at least 0"),
        ({"rows": [{"system": "A", "value": 1, "quoted": 1}]}, "quoted must be true or false"),
        ({"rows": [{"system": "A", "values": {0: 1}}]}, "values must map numbers of blur or candidates"),
        ({"rows": [{"system": "A", "value": 1}, {"system": "A", "value": 2}]}, "fid at blur 0 appears twice"),
    ],
)
def test_wrong_row_raises_with_its_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "t.yaml", {**GROUP, **changes})
    with pytest.raises(DataFileError, match=message) as caught:
        read_published(path)
    assert str(path) in str(caught.value)


def test_wrong_table_raises_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"unknown field 'sampels'\. Did you mean 'samples'"):
        read_published(written(tmp_path / "t.yaml", GROUP, sampels=3))
    with pytest.raises(DataFileError, match="groups must be a list"):
        read_published(written(tmp_path / "t.yaml", GROUP, groups="none"))
    with pytest.raises(UnknownNameError, match="Did you mean 'coco'"):
        find_published("cocoa")


def test_the_page_of_published_scores_is_that_of_the_tables() -> None:
    assert DOCUMENT.read_text() == page(), "run python tools/published_page.py"
    number = sum(not row.do_not_use for name in list_published() for row in find_published(name).rows)
    lines = [line for line in page().splitlines() if line.startswith("| ") and line.endswith("] |")]
    assert len(lines) == number > 200
