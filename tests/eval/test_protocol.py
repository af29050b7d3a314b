"""Protocols: the shipped ones are complete, and a wrong one says what is wrong."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from dalle_zoo_eval import shipped
from dalle_zoo_eval.protocol import Protocol, ProtocolError, SamplingRule, find_protocol, list_protocols, read_protocol
from dalle_zoo_eval.published import find_published, list_published
from dalle_zoo_eval.data_files import DataFileError, read_yaml, bundled_folder

from dalle_zoo.registry import UnknownNameError

ROOT = Path(__file__).parents[2]
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RADII = (0, 1, 2, 4, 8)


def values(**changes: Any) -> dict[str, Any]:
    """A valid protocol as YAML has it, with changes."""
    least: dict[str, Any] = {
        "name": "mine", "title": "Mine", "benchmark": {"folder": "all"}, "captions": {"rule": "one"}
    }  # fmt: skip
    return {**least, **changes}


def test_the_shipped_protocols_are_those_of_the_paper() -> None:
    assert list_protocols("benchmark") == ["coco-30k", "coco-30k-dedup", "cub", "folder"]
    assert list_protocols() == ["coco-30k", "coco-30k-dedup", "cub", "emoji64", "folder"]
    coco, cub = find_protocol("coco-30k"), find_protocol("cub")
    assert (coco.layout, coco.split("coco"), coco.split("attngan")) == ("coco", "val2014", "test")
    assert (coco.captions.rule, coco.captions.count, coco.captions.exclusions) == ("one", 30000, False)
    assert (coco.image.crop, coco.image.size, coco.published) == ("center", 256, ("coco",))
    assert (cub.captions.rule, cub.captions.count, cub.image.crop) == ("unique", None, "box")
    assert coco.blur == cub.blur == RADII
    assert coco.sampling.curve == cub.sampling.curve == CURVE
    assert coco.fid_families == cub.fid_families == ("inception-2015", "dmgan")
    assert coco.is_splits == 10
    assert "is" in coco.metrics
    assert "is" not in cub.metrics, "the ImageNet network's score on birds compares with nothing"
    assert find_protocol("folder").published == ()


def test_the_deduplicated_variant_differs_in_nothing_else() -> None:
    plain, other = asdict(find_protocol("coco-30k")), asdict(find_protocol("coco-30k-dedup"))
    assert other["captions"].pop("exclusions")
    assert not plain["captions"].pop("exclusions")
    for name in ("name", "title", "notes"):
        plain.pop(name), other.pop(name)
    assert plain == other


@pytest.mark.parametrize("name", list_protocols("benchmark"))
def test_a_protocol_survives_a_result_file(name: str) -> None:
    protocol = find_protocol(name)
    assert protocol.name == name
    assert Protocol.from_dict(json.loads(json.dumps(asdict(protocol)))) == protocol
    assert read_protocol(bundled_folder("protocols") / f"{name}.yaml") == protocol
    assert set(protocol.published) <= set(list_published())


def test_no_statistics_are_recorded_that_nobody_measured() -> None:
    assert all(find_protocol(name).reference == () for name in list_protocols("benchmark"))


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    reference = [{"family": "inception-2015", "trace": 3.5, "tolerance": 0.01}]
    path.write_text(yaml.safe_dump(values(reference=reference, blur=[0, 3])))
    protocol = find_protocol(path)
    assert (protocol.name, protocol.blur, protocol.captions.count) == ("mine", (0, 3), None)
    assert (protocol.reference[0].trace, protocol.reference[0].mean_norm) == (3.5, None)


def test_an_unknown_name_answers_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'coco-30k'\?.*A YAML file works as well"):
        find_protocol("coco30k")
    with pytest.raises(UnknownNameError, match=r"cub: unknown layout 'coc'"):
        find_protocol("cub").split("coc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ["fid"]}, r"unknown field 'metric'. Did you mean 'metrics'"),
        ({"captions": {"rule": "one", "cuont": 3}}, r"captions: unknown field 'cuont'. Did you mean 'count'"),
        ({"captions": {"count": 3}}, "captions: rule missing"),
        ({"captions": {"rule": "uniqe"}}, "unknown captions.rule 'uniqe'. Did you mean 'unique'"),
        ({"captions": {"rule": "one", "count": 1}}, "captions.count must be an integer of at least 2, got 1"),
        ({"captions": {"rule": "one", "count": True}}, "captions.count must be an integer"),
        ({"captions": {"rule": "one", "exclusions": "yes"}}, "exclusions must be true or false, got 'yes'"),
        ({"captions": "one"}, "captions must be a mapping"),
        ({"image": {"crop": "centre"}}, "unknown image.crop 'centre'. Did you mean 'center'"),
        ({"image": {"size": 0}}, "image.size must be an integer of at least 1"),
        ({"sampling": {"curve": [1, 4, 2]}}, r"sampling.curve must rise, each number once, got \[1, 4, 2\]"),
        ({"sampling": {"curve": 4}}, "curve must be a list, got 4"),
        ({"sampling": {"candidates": 1.5}}, "sampling.candidates must be an integer"),
        ({"blur": [1, 2]}, "blur must begin with 0"),
        ({"blur": []}, "blur must begin with 0"),
        ({"blur": [0, -1]}, "blur must be an integer of at least 0, got -1"),
        ({"metrics": ["fdi"]}, "unknown metrics 'fdi'. Did you mean 'fid'"),
        ({"metrics": ["fid", "fid"]}, "metrics has a name twice"),
        ({"metrics": []}, "metrics is empty"),
        ({"metrics": ["is"]}, "fid_families must name at least one kind of FID where metrics has fid, else be empty"),
        ({"fid_families": ["dm-gan"]}, "unknown fid_families 'dm-gan'. Did you mean 'dmgan'"),
        ({"published": ["birds"]}, "unknown published 'birds'"),
        ({"benchmark": {"coko": "val2014"}}, "unknown benchmark 'coko'. Did you mean 'coco'"),
        ({"benchmark": {"coco": 2014}}, "benchmark.coco must be the name of a split, got 2014"),
        ({"benchmark": {}}, "benchmark is empty"),
        ({"name": "Big Name"}, "name must be lower-case letters, digits and hyphens"),
        ({"title": ""}, "title must be one line of text"),
        ({"is_splits": 0}, "is_splits must be an integer"),
        ({"notes": "one"}, "notes must be a list"),
        ({"notes": [3]}, "notes must be a list of sentences"),
        ({"networks": {"dmgan": {"sha256": "0" * 64}}}, "unknown networks 'dmgan'"),
        ({"networks": {"clip": {"sha256": "abc"}}}, "networks: sha256 must be 64 digits of 0-9 and a-f, got 'abc'"),
        ({"networks": {"clip": {"sha": "abc"}}}, "networks.clip: unknown field 'sha'. Did you mean 'sha256'"),
        ({"reference": [{"family": "dmgan"}]}, "unknown reference 'dmgan'"),
        ({"reference": [{"family": "inception-2015", "trace": 2.0}]}, "reference.tolerance is missing"),
        (
            {"reference": [{"family": "inception-2015", "trace": 0, "tolerance": 1}]},
            "reference.trace must be a number",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values(**changes)))
    with pytest.raises(ProtocolError, match=message) as caught:
        read_protocol(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "title", "benchmark", "captions"])
def test_what_has_no_default_must_be_stated(missing: str) -> None:
    given = values()
    given.pop(missing)
    with pytest.raises(ProtocolError, match=f"{missing} missing"):
        Protocol.from_dict(given)


def test_numbers_of_candidates() -> None:
    rule = SamplingRule(candidates=4, curve=(1, 2, 4, 8))
    assert rule.counts() == (1, 2, 4)
    assert rule.counts(1) == (1,)
    assert rule.counts(6) == (1, 2, 4, 6)
    assert SamplingRule(candidates=3).counts() == (3,)


def test_yaml_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(DataFileError, match="'name' stands twice"):
        read_yaml(path)
    path.write_text("- a\n")
    with pytest.raises(DataFileError, match="must be a mapping"):
        read_yaml(path)
    path.write_text("a: [\n")
    with pytest.raises(DataFileError, match="is not valid YAML"):
        read_yaml(path)
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(DataFileError, match="is not valid YAML"):
        read_yaml(path)
    with pytest.raises(DataFileError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_a_wheel_carries_the_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    installed = tmp_path / "dalle_zoo_eval"
    for kind in ("protocols", "published"):
        assert (ROOT / "eval" / kind).is_dir()
        shutil.copytree(ROOT / "eval" / kind, tmp_path / carried[f"eval/{kind}"])
    names = list_protocols(), list_published()
    monkeypatch.setattr(shipped, "_PACKAGE", installed)
    assert bundled_folder("protocols").parent == installed
    assert (list_protocols(), list_published()) == names
    assert find_protocol("cub").published == ("cub",)
    assert find_published("cub").rows
    shutil.rmtree(installed)
    with pytest.raises(FileNotFoundError, match="no protocols found"):
        list_protocols()
