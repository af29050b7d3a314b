"""Protocols: bundled ones are complete, and wrong ones raise with an explanation."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from dalle_zoo_eval import data_files
from dalle_zoo_eval.data_files import DataFileError, bundled_folder, read_yaml
from dalle_zoo_eval.protocol import Protocol, ProtocolError, find_protocol, list_protocols, read_protocol
from dalle_zoo_eval.published import find_published, list_published
from dalle_zoo_eval.rules import SamplingRule

from dalle_zoo.registry import UnknownNameError
from dalle_zoo.sampling import SamplingOptions

ROOT = Path(__file__).parents[2]
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RADII = (0, 1, 2, 4, 8)


def values(**changes: Any) -> dict[str, Any]:
    """Values of a valid protocol file, with changes."""
    least: dict[str, Any] = {
        "name": "mine", "title": "Mine", "dataset": {"folder": "all"}, "captions": {"rule": "one"}, "metrics": ["fid"]
    }  # fmt: skip
    return {**least, **changes}


def test_bundled_protocols_match_the_paper() -> None:
    assert list_protocols() == ["coco-30k", "coco-30k-dedup", "composition", "cub", "folder"]
    protocols = find_protocol("coco-30k"), find_protocol("cub")
    coco, cub = (protocol.groups["all"] for protocol in protocols)
    assert (coco.layout, coco.dataset) == ("coco", {"coco": "val2014", "attngan": "test"})
    assert (coco.captions.rule, coco.captions.count, coco.captions.exclusions) == ("one", 30000, False)
    assert [(p.image.crop, p.image.size, p.published) for p in protocols] == [
        ("center", 256, ("coco",)), ("box", 256, ("cub",))
    ]  # fmt: skip
    assert (cub.captions.rule, cub.captions.count) == ("unique", None)
    assert [protocol.blur for protocol in protocols] == [RADII] * 2
    assert [protocol.sampling.curve for protocol in protocols] == [CURVE] * 2
    assert [protocol.families for protocol in protocols] == [["inception-2015", "dmgan"]] * 2
    metrics = [{rule.name: rule for rule in group.metrics} for group in (coco, cub)]
    assert metrics[0]["is"].options == {"splits": 10}
    assert "is" not in metrics[1], "the ImageNet network's score on birds compares with nothing"
    assert find_protocol("folder").published == ()


def test_deduplicated_variant_differs_only_in_exclusions() -> None:
    plain, other = asdict(find_protocol("coco-30k")), asdict(find_protocol("coco-30k-dedup"))
    assert other["groups"]["all"]["captions"].pop("exclusions")
    assert not plain["groups"]["all"]["captions"].pop("exclusions")
    for name in ("name", "title", "notes"):
        plain.pop(name), other.pop(name)
    assert plain == other


@pytest.mark.parametrize("name", list_protocols())
def test_protocol_round_trips_through_result_file(name: str) -> None:
    protocol = find_protocol(name)
    assert protocol.name == name
    assert Protocol.from_dict(json.loads(json.dumps(asdict(protocol)))) == protocol
    assert read_protocol(bundled_folder("protocols") / f"{name}.yaml") == protocol
    assert set(protocol.published) <= set(list_published())


def test_bundled_protocols_record_no_unmeasured_statistics() -> None:
    assert all(find_protocol(name).reference == () for name in list_protocols())


def test_custom_protocol_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    reference = [{"family": "inception-2015", "trace": 3.5, "tolerance": 0.01}]
    path.write_text(yaml.safe_dump(values(reference=reference, blur=[0, 3])))
    protocol = find_protocol(path)
    assert (protocol.name, protocol.blur, protocol.groups["all"].captions.count) == ("mine", (0, 3), None)
    assert (protocol.reference[0].trace, protocol.reference[0].mean_norm) == (3.5, None)


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'coco-30k'\?.*A YAML file works as well"):
        find_protocol("coco30k")
    with pytest.raises(UnknownNameError, match=r"cub: unknown layout 'coc'"):
        find_protocol("cub").split("all", "coc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": ["fid"]}, r"unknown field 'metric'. Did you mean 'metrics'"),
        ({"captions": {"rule": "one", "cuont": 3}}, r"captions: unknown field 'cuont'. Did you mean 'count'"),
        ({"captions": {"count": 3}}, "captions: the field 'rule' is required"),
        ({"captions": {"rule": "uniqe"}}, "unknown captions.rule 'uniqe'. Did you mean 'unique'"),
        ({"captions": {"rule": "one", "count": 1}}, "captions.count must be an integer of at least 2, got 1"),
        ({"captions": {"rule": "one", "count": True}}, "captions.count must be an integer"),
        ({"captions": {"rule": "one", "exclusions": "yes"}}, "exclusions must be true or false, got 'yes'"),
        ({"captions": "one"}, "captions must be a mapping"),
        ({"image": {"crop": "centered"}}, "unknown image.crop 'centered'. Did you mean 'center'"),
        ({"image": {"size": 0}}, "image.size must be an integer of at least 1"),
        ({"sampling": {"curve": [1, 4, 2]}}, r"sampling.curve must be strictly increasing, got \[1, 4, 2\]"),
        ({"sampling": {"curve": 4}}, "curve must be a list, got 4"),
        ({"sampling": {"candidates": 1.5}}, "candidates must be an integer"),
        ({"blur": [1, 2]}, "blur must begin with 0"),
        ({"blur": []}, "blur must begin with 0"),
        ({"blur": [0, -1]}, "blur must be an integer of at least 0, got -1"),
        ({"metrics": ["fdi"]}, "unknown metrics 'fdi'. Did you mean 'fid'"),
        ({"metrics": ["fid", "fid"]}, "metrics has a rule twice: fid"),
        ({"metrics": []}, "metrics is empty"),
        (
            {"metrics": [{"fid": {"extractor": "dm-gan"}}]},
            "unknown metrics.fid.extractor 'dm-gan'. Did you mean 'dmgan'",
        ),
        ({"metrics": [{"kid": {"extractor": "clip"}}]}, "unknown metrics.kid.extractor 'clip'"),
        ({"metrics": [{"fid": {"images": ["reel"]}}]}, "unknown metrics.fid.images 'reel'. Did you mean 'real'"),
        ({"metrics": [{"is": {"splitz": 3}}]}, "metrics.is: unknown option 'splitz': known are splits, seed"),
        ({"metrics": [{"is": {}, "fid": {}}]}, "metrics: expected a name or {name: options}"),
        ({"published": ["birds"]}, "unknown published 'birds'"),
        ({"dataset": {"coko": "val2014"}}, "unknown dataset 'coko'. Did you mean 'coco'"),
        ({"dataset": {"coco": 2014}}, "dataset.coco must be the name of a split, got 2014"),
        ({"dataset": {}}, "dataset is empty"),
        ({"name": "Big Name"}, "name must be lower-case letters, digits and hyphens"),
        ({"title": ""}, "title must be one line of text"),
        ({"metrics": [{"is": {"splits": 0}}]}, "metrics.is: splits must be a number of at least 1"),
        ({"notes": "one"}, "notes must be a list"),
        ({"notes": [3]}, "notes must be a list of sentences"),
        ({"extractors": {"inception2015": {}}}, "unknown extractors 'inception2015'. Did you mean 'inception-2015'"),
        ({"extractors": {"clip": {"optional": 1}}}, "extractors.optional must be true or false"),
        (
            {"extractors": {"clip": {"sha256": "abc"}}},
            "extractors: sha256 must be 64 digits of 0-9 and a-f, got 'abc'",
        ),
        ({"extractors": {"clip": {"sha": "abc"}}}, "extractors.clip: unknown field 'sha'. Did you mean 'sha256'"),
        ({"metrics": ["kid"], "reference": [{"family": "dmgan"}]}, "unknown reference 'dmgan'"),
        ({"reference": [{"family": "inception-2015", "trace": 2.0}]}, "reference.tolerance is missing"),
        (
            {"reference": [{"family": "inception-2015", "trace": 0, "tolerance": 1}]},
            "reference.trace must be a number",
        ),
    ],
)
def test_wrong_field_raises_with_its_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values(**changes)))
    with pytest.raises(ProtocolError, match=message) as caught:
        read_protocol(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "title", "dataset", "captions", "metrics"])
def test_missing_required_field_raises(missing: str) -> None:
    given = values()
    given.pop(missing)
    with pytest.raises(ProtocolError, match=f"the field '{missing}' is required"):
        Protocol.from_dict(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": 3}, "unknown field 'sample'. Did you mean 'samples'"),
        ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
        ({"groups": {}}, "groups is empty"),
        ({"groups": ["train"]}, "groups must be a mapping"),
        ({"groups": {"train": {"captions": {"count": 1}}}}, "captions.count must be an integer of at least 2"),
        ({"groups": {"train": {"captons": {}}}}, "groups.train: unknown field 'captons'. Did you mean 'captions'"),
        ({"targets": [{"name": "a", "group": "trian", "score": {}, "required": 1}]}, "unknown targets.group 'trian'"),
        ({"targets": [{"name": "a", "group": "all", "score": {"metrik": "fid"}, "required": 1}]}, "field 'metrik'"),
        ({"targets": [{"name": "a", "group": "all", "score": {}, "required": "1"}]}, "required must be a number"),
        ({"targets": [{"name": "a", "group": "all", "score": {}}]}, "targets: the field 'required' is required"),
        (
            {"metrics": [{"concept_accuracy": {"ks": []}}]},
            "metrics.concept_accuracy: ks must be a number of at least 1, or rising ones",
        ),
        (
            {"metrics": [{"concept_accuracy": {"ks": [5, 1]}}]},
            r"ks must be rising numbers of at least 1, got \[5, 1\]",
        ),
        ({"sampling": {"temperature": "hot"}}, "temperature must be a finite number of at least 0, got 'hot'"),
        ({"sampling": {"guidance_scale": None}}, "guidance_scale must be a finite number in 0..1e.06, got None"),
        ({"sampling": {"guidance_scale": -1}}, "guidance_scale must be a finite number in 0..1e.06, got -1"),
        ({"sampling": {"chunk": 0}}, "sampling.chunk must be an integer of at least 1"),
        ({"sampling": {"seeds": "image"}}, "unknown sampling.seeds 'image'"),
    ],
)
def test_wrong_field_of_groups_or_sampling_raises_with_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        Protocol.from_dict(values(**changes))


def groups() -> Protocol:
    """Three groups that share the keys at the top level."""
    train = {"dataset": {"source": "here"}, "captions": {"count": 4}}
    others = {name: {"dataset": {"source": name}} for name in ("val-styles", "val-concepts")}
    given = values(captions={"rule": "first"}, sampling={"candidates": 3}, groups={"train": train, **others})
    return Protocol.from_dict(given)


def test_groups_inherit_top_level_fields() -> None:
    protocol = groups()
    assert [(rule.captions.rule, rule.captions.count) for rule in protocol.groups.values()] == [
        ("first", 4), ("first", None), ("first", None)
    ]  # fmt: skip
    assert {rule.metrics[0].name for rule in protocol.groups.values()} == {"fid"}
    assert protocol.split("train", "source") == "here"
    assert Protocol.from_dict(json.loads(json.dumps(asdict(protocol)))) == protocol
    own = values(groups={"a": {}, "b": {"metrics": ["kid"]}})  # each group may have metrics of its own
    assert [rule.metrics[0].name for rule in Protocol.from_dict(own).groups.values()] == ["fid", "kid"]


def test_caller_values_override_the_file() -> None:
    protocol = groups()
    assert protocol.changed(seed=None, train_captions=None) == protocol
    assert protocol.changed(seed=0, candidates=3, train_captions=4).overridden == ()  # what the file says anyway
    assert SamplingRule().options == SamplingOptions(), "one set of defaults"
    changed = protocol.changed(seed=5, val_captions=3, temperature=0.5)
    assert changed.overridden == (
        "seed: 5 instead of 0", "temperature: 0.5 instead of 1.0", "captions of val-styles: 3 instead of all",
        "captions of val-concepts: 3 instead of all",
    )  # fmt: skip
    assert (changed.seed, changed.sampling.temperature, changed.sampling.candidates) == (5, 0.5, 3)
    assert [rule.captions.count for rule in changed.groups.values()] == [4, 3, 3]
    assert [rule.captions.count for rule in protocol.changed(captions=2).groups.values()] == [2, 2, 2]
    with pytest.raises(DataFileError, match="candidates must be an integer of at least 1, got 0"):
        protocol.changed(candidates=0)
    with pytest.raises(ProtocolError, match="has no group 'train'"):
        find_protocol("folder").changed(train_captions=2)


def test_counts_include_curve_and_candidates() -> None:
    rule = SamplingRule(candidates=4, curve=(1, 2, 4, 8))
    assert rule.counts == (1, 2, 4)
    assert replace(rule, candidates=1).counts == (1,)
    assert replace(rule, candidates=6).counts == (1, 2, 4, 6)
    assert SamplingRule(candidates=3).counts == (3,)


def test_invalid_yaml_raises(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(DataFileError, match="'name' appears twice"):
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


def test_wheel_contains_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    installed = tmp_path / "dalle_zoo_eval"
    for kind in ("protocols", "published"):
        assert (ROOT / "eval" / kind).is_dir()
        shutil.copytree(ROOT / "eval" / kind, tmp_path / carried[f"eval/{kind}"])
    names = list_protocols(), list_published()
    monkeypatch.setattr(data_files, "_PACKAGE", installed)
    assert bundled_folder("protocols").parent == installed
    assert (list_protocols(), list_published()) == names
    assert find_protocol("cub").published == ("cub",)
    assert find_published("cub").rows
    shutil.rmtree(installed)
    with pytest.raises(FileNotFoundError, match="no protocols found"):
        list_protocols()
