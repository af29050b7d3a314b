"""JSON and YAML of unknown origin: what would exhaust time, memory or the stack is refused at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo.convert import inspect_files
from dalle_zoo.files import FileError, read_json, try_read_json
from dalle_zoo.model_results import results_of
from dalle_zoo.plain_data import MAX_BYTES, MAX_DEPTH, PlainDataError, json_value, unique_keys, yaml_value
from dalle_zoo.recipes import read_recipe
from dalle_zoo.results import ResultError, read_result

SECONDS = 3.0
"""Many times what a refusal takes."""
DEEP = "[" * 200_000


def nested(depth: int) -> str:
    return "[" * depth + "1" + "]" * depth


@pytest.mark.parametrize("parse", [lambda text: json_value(text.encode()), yaml_value], ids=["JSON", "YAML"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nests lists and mappings more than 64 deep"),
        ('{"a":' * 100_000, "nests lists and mappings more than 64 deep"),
        (nested(MAX_DEPTH + 1), "nests lists and mappings more than 64 deep"),
        ('{"a": ', "is not valid (JSON|YAML)"),
        ("[1] " * 400_000 + "x" * MAX_BYTES, "has more than .* bytes"),
    ],
)
def test_what_is_no_plain_data(parse: Callable[[str], Any], text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(PlainDataError, match=message):
        parse(text)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("parse", [lambda text: json_value(text.encode()), yaml_value], ids=["JSON", "YAML"])
def test_moderate_nesting_is_read(parse: Callable[[str], Any]) -> None:
    value, depth = parse(nested(MAX_DEPTH)), 0
    while isinstance(value, list):
        (value,), depth = value, depth + 1
    assert (value, depth) == (1, MAX_DEPTH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "it has the number NaN"),
        ("[-Infinity]", "it has the number -Infinity"),
        ("1e999", "1e999, which is beyond the range"),
        ("9" * 5000, "has a number of 5000 characters"),
    ],
)
def test_numbers_of_json(text: str, message: str) -> None:
    with pytest.raises(PlainDataError, match=message):
        json_value(text.encode())


def test_logs_of_other_programs_may_hold_nan() -> None:
    assert str(json_value(b'{"loss": NaN}', finite=False)) == "{'loss': nan}"


def test_a_key_twice() -> None:
    with pytest.raises(PlainDataError, match="has the key 'a' twice"):
        json_value(b'{"b": {"a": 1, "a": 2}}', pairs=unique_keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a", "has aliases"),
        ("1:" * 100_000 + "1", "has a number of 200001 characters"),  # base 60
        ("9" * 100_000, "has a number of 100000 characters"),
        ("a: 2024-99-01", "is not valid YAML"),
        ("\t- x", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_hostile_yaml(text: str, message: str) -> None:
    with pytest.raises(PlainDataError, match=message):
        yaml_value(text)


def test_aliases_in_files_of_the_user() -> None:
    assert yaml_value("a: &a [1]\nb: *a", aliases=True) == {"a": [1], "b": [1]}


READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "a.json": (read_json, FileError),
    "result.json": (read_result, ResultError),
    "recipe.yaml": (read_recipe, ValueError),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_name_the_file(name: str, tmp_path: Path) -> None:
    read, error = READERS[name]
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(error, match=f"{name} nests lists and mappings more than 64 deep"):
        read(tmp_path / name)


def test_readers_that_pass_over_damage(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in ("sha256.json", "results/a.json", "config.json"):
        (tmp_path / name).write_text(DEEP)
    assert try_read_json(tmp_path / "config.json") is None
    assert results_of(tmp_path) == {}
    assert "more than 64 deep" in inspect_files(tmp_path).damaged["config.json"]


def test_a_long_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # without blocks on disk
    with pytest.raises(FileError, match=r"a\.json has more than 16777216 bytes"):
        read_json(path)
