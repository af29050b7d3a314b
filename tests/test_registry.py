"""The contract of every registry."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.convert.family import FAMILIES, families
from dalle_zoo.masks import MASKS
from dalle_zoo.registry import PluginError, Registry, UnknownNameError, suggest

GROUP = "dalle_zoo_tests.things"


class Base:
    """What members derive from."""


class Member(Base):
    """A member."""


@pytest.fixture
def registry() -> Registry[Callable[..., Any]]:
    """Two members, no plugin."""
    made: Registry[Callable[..., Any]] = Registry("thing", group=GROUP)
    made.register("row")(max)
    made.register("column")(min)
    return made


class Point:
    """Stands for an entry point; counts how often it is loaded."""

    def __init__(self, name: str, thing: object) -> None:
        self.name, self.value, self.thing, self.loads = name, f"other.package:{name}", thing, 0

    def load(self) -> object:
        self.loads += 1
        return self.thing


class Plugins:
    """Stands for the installed distributions; counts how often it is asked."""

    def __init__(self, *points: Point) -> None:
        self.points, self.asked = points, 0

    def __call__(self, *, group: str) -> tuple[Point, ...]:
        self.asked += 1
        return self.points if group == GROUP else ()


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> Plugins:
    plugins = Plugins(*points)
    monkeypatch.setattr(importlib.metadata, "entry_points", plugins)
    return plugins


def test_is_a_mapping_in_order_of_names(registry: Registry[Any]) -> None:
    assert isinstance(registry, Mapping)
    assert dict(registry) == {"column": min, "row": max}
    assert list(registry) == ["column", "row"]
    assert len(registry) == 2
    assert registry.get("missing") is None
    assert "row" in registry
    assert "missing" not in registry
    assert repr(registry) == "Registry('thing': column, row)"


def test_the_decorator_returns_what_it_was_given(registry: Registry[Any]) -> None:
    def thing() -> None: ...

    assert registry.register("thing")(thing) is thing
    assert registry["thing"] is thing


def test_a_taken_name_raises_and_keeps_the_first(registry: Registry[Any]) -> None:
    with pytest.raises(ValueError, match=r"thing 'row' is already registered as .*choose another name"):
        registry.register("row")(sum)
    assert registry["row"] is max


def test_registering_the_same_thing_again_changes_nothing(registry: Registry[Any]) -> None:
    registry.register("row")(max)  # what a module that is loaded twice does
    assert len(registry) == 2


@pytest.mark.parametrize("error", [KeyError, ValueError, UnknownNameError])
def test_an_unknown_name_suggests_the_nearest(registry: Registry[Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        registry["colum"]
    assert str(caught.value) == ("unknown thing 'colum'. Did you mean 'column'? Known: column, row")


def test_a_far_off_name_suggests_nothing() -> None:
    assert suggest("thing", "zzz", ["row"]) == "unknown thing 'zzz'. Known: row"
    assert suggest("thing", "row", []) == "unknown thing 'row'. Known: none"


@pytest.mark.parametrize("wrong", [object, Base(), Member(), len])
def test_a_base_refuses_others(wrong: Any) -> None:
    registry: Registry[type[Base]] = Registry("thing", group=GROUP, base=Base)
    with pytest.raises(TypeError, match=r"thing 'wrong' must derive from Base"):
        registry.register("wrong")(wrong)
    assert "wrong" not in registry
    registry.register("right")(Member)
    assert registry["right"] is Member


def test_a_member_must_be_callable(registry: Registry[Any]) -> None:
    with pytest.raises(TypeError, match=r"thing 'five' must be callable, got 5"):
        registry.register("five")(5)


def test_plugins_are_read_when_needed_and_loaded_once(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point("other", sorted)
    plugins = install(monkeypatch, point)
    assert registry["row"] is max
    assert plugins.asked == 0  # a native name needs no list of what is installed
    assert list(registry) == ["column", "other", "row"]
    assert "other" in registry
    assert len(registry) == 3
    assert (plugins.asked, point.loads) == (1, 0)  # listing loads no external code
    assert registry["other"] is sorted
    assert registry["other"] is sorted
    assert (plugins.asked, point.loads) == (1, 1)


def test_an_unknown_name_suggests_plugins_too(registry: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Point("diagonal", sorted))
    with pytest.raises(UnknownNameError, match="Did you mean 'diagonal'"):
        registry["diagnal"]


def test_a_plugin_never_replaces_a_member(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Point("other", sorted), Point("other", reversed)
    install(monkeypatch, Point("row", sorted), first, second)
    with caplog.at_level(logging.WARNING, logger="dalle_zoo.registry"):
        assert registry["other"] is sorted
    assert registry["row"] is max
    assert [record.getMessage() for record in caplog.records] == [
        "thing 'row' of other.package:row is ignored: the name is already registered",
        "thing 'other' of other.package:other is ignored: the name is already registered",
    ]


def test_a_plugin_of_the_wrong_base_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[type[Base]] = Registry("thing", group=GROUP, base=Base)
    install(monkeypatch, Point("wrong", object))
    with pytest.raises(TypeError, match=r"thing 'wrong' must derive from Base"):
        registry["wrong"]


class Broken(Point):
    """An entry point whose module cannot be imported."""

    def load(self) -> object:
        raise RuntimeError("no such driver")


def test_a_broken_plugin_is_named_and_stops_nothing_else(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Broken("bad", None), Point("other", sorted))
    with pytest.raises(PluginError, match=r"thing 'bad' of another distribution \(other.package:bad\) cannot"):
        registry["bad"]
    assert registry.name_of(max) == "row"
    assert not caplog.records, "native members need no plug-in"
    assert dict(registry.loadable()) == {"column": min, "row": max, "other": sorted}
    assert "skipped: thing 'bad' of another distribution" in caplog.text
    assert "RuntimeError: no such driver. Repair or uninstall" in caplog.text
    assert registry.name_of(sorted) == "other"
    with pytest.raises(UnknownNameError, match="not a registered thing"):
        registry.name_of(len)


def test_commands_that_list_members_skip_a_broken_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    points = {"bad": Broken("bad", None)}
    monkeypatch.setattr(MASKS, "_plugins", points)
    monkeypatch.setattr(FAMILIES, "_plugins", points)
    assert main(["masks"]) == 0
    assert "row" in capsys.readouterr().out
    assert "bad" not in [family.name for family in families()]
    assert caplog.text.count("skipped: ") == 2
    assert main(["masks", "bad"]) == 2
    assert "attention mask 'bad' of another distribution" in capsys.readouterr().err
