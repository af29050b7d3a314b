"""A protocol from benchmark and model to result file, on made-up data and networks of a few numbers."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval import opening
from dalle_zoo_eval import runner as evaluation
from dalle_zoo_eval.datasets import EvalDataset, load_exclusions, read_dataset
from dalle_zoo_eval.external import read_from_folder
from dalle_zoo_eval.extractors import EXTRACTORS, ExtractorFileError
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.generation import GeneratedImages
from dalle_zoo_eval.image_sources import EVERY, GeneratedSet
from dalle_zoo_eval.protocol import Protocol, find_protocol
from dalle_zoo_eval.request import Request
from dalle_zoo_eval.rules import SamplingRule
from dalle_zoo_eval.runner import evaluate
from dalle_zoo_eval.selfcheck import SelfCheck, SelfCheckError, check_reference
from dalle_zoo_eval.training_images import TrainingImages
from PIL import Image
from torch import Tensor

from dalle_zoo.cli.main import main
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sharing import Share

IMAGES = 26
PROTOCOL = """
name: toy
title: made-up images
dataset: {coco: val2017}
captions: {rule: one, count: 12, seed: 0}
image: {crop: center, size: 16}
sampling: {candidates: 2, curve: [1, 2], chunk: 5}
blur: [0, 2]
metrics: [fid, frechet, {is: {splits: 2}}, kid, precision, recall, clip_score, r_precision]
published: [coco]
"""


class StubExtractor:
    """Features that are means of pixels, of channels and of halves."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        self.name, self.scale = name, scale
        published = EXTRACTORS.spec(name).weights
        digest = published[0].sha256 if published else name
        self.record: dict[str, str | int] = {"name": name, "sha256": digest, "pixels": 16, "resize": "none"}
        self.calls = 0

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.scale * images.float() / 255
        features = torch.cat([x.mean((2, 3)), x[:, :, : x.shape[2] // 2].mean((2, 3))[:, :2]], 1)
        return {"features": features, "logits": 9 * features}

    def text_features(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([torch.tensor([len(c), c.count("a"), c.count("b"), 1, 2]).float() for c in captions])


UNUSED = Path(__file__)
"""Stands for the file of a network, which must exist and which the stubs do not read."""


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, StubExtractor]:
    made: dict[str, StubExtractor] = {}

    def load(name: str, location: Path, device: str, **pinned: str | None) -> StubExtractor:
        del location, device, pinned
        return made.setdefault(name, StubExtractor(name, {"dmgan": 0.5}.get(name, 1.0)))

    monkeypatch.setattr(opening, "load_extractor", load)
    return made


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise in MS-COCO's layout."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number in range(IMAGES):
        name = f"{number:012d}.jpg"
        pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": 20, "width": 24})
        for c in range(2):
            annotations.append({"image_id": number, "id": 2 * number + c, "caption": f"a {'b' * number} number {c}"})
    (root / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return root


@pytest.fixture
def protocol(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(PROTOCOL)
    return str(path)


def request_of(protocol: str, coco: Path, out: Path, **more: Any) -> Request:
    given = dict.fromkeys(("inception-2015", "dmgan", "clip", "ranker"), UNUSED)
    return Request(protocol=protocol, data=coco, out=out, **{"networks": given, **more})


def scores(result: dict[str, Any] | None, metric: str, **fields: Any) -> list[dict[str, Any]]:
    assert result is not None
    return [r for r in result["scores"] if r["metric"] == metric and all(r[k] == v for k, v in fields.items())]


def test_evaluation_from_captions_to_report(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = evaluate(
        request_of(protocol, coco, out, model=str(model), save_images=True, training=str(coco / "val2017"))
    )
    assert result is not None
    assert {p.name for p in out.iterdir()} >= {
        "result.json",
        "report.md",
        "report.html",
        "samples.png",
        "captions.jsonl",
    }
    assert len(list((out / "images").glob("*.png"))) == 12
    assert result["source"]["generated_at"] == [16, 16]
    assert {(r["family"], r["blur"], r["candidates"]) for r in scores(result, "fid")} == {
        (family, *rest) for family in ("inception-2015", "dmgan") for rest in ((0, 2), (2, 2), (0, 1))
    }
    for row in scores(result, "fid"):
        assert (row["samples"], row["reference_samples"]) == (12, IMAGES)
    complete, half = (scores(result, "fid", family=f, blur=0, candidates=2)[0] for f in ("inception-2015", "dmgan"))
    assert half["value"] == pytest.approx(complete["value"] / 4)  # features of half the size
    for row in scores(result, "fid"):  # at every radius and number of candidates
        assert row["interval"][0] < row["value"] < row["interval"][1]
    assert len([row for row in scores(result, "fid") if "at_infinity" in row]) == 0  # 12 are fewer than 3 times 5
    assert len([line for line in result["left_out"] if "at infinity of fid of dmgan" in line]) == 1
    assert not [row for row in scores(result, "fid") if "rank_deficient" in row]
    assert len(scores(result, "is")) == 3
    assert {r["metric"] for r in result["scores"]} == {"fid", "is", "precision", "recall", "clip_score", "frechet"}
    assert any(line.startswith("r_precision: 99 captions of other concepts") for line in result["left_out"])
    assert any("kid" in line and "1000" in line for line in result["left_out"])
    assert all(check["passed"] for check in result["selfcheck"])
    assert [record["family"] for record in result["reference"]] == ["inception-2015", "dmgan"]
    assert result["memorization"]["network"] == "inception-2015"
    assert result["memorization"]["training"] == "val2017"
    assert len(result["memorization"]["training_sha256"]) == 64
    assert result["memorization"]["network_sha256"] == EXTRACTORS.spec("inception-2015").weights[0].sha256
    assert {"config.json", "tokenizer.json"} & {Path(name).name for name in result["source"]["files_sha256"]}
    assert result["bootstrap"] == {"level": 0.95, "rounds": 1000, "seed": 0}
    assert result["run"] == {
        "command": None, "batch_size": 64, "threads": torch.get_num_threads(), "processes": 1, "gpu": None
    }  # fmt: skip
    for phase, images in (("reference", IMAGES), ("generated", 12), ("training", IMAGES)):
        took = result["speed"][phase]
        assert took["images"] == images
        assert took["images_per_second"] == pytest.approx(images / took["seconds"])
    assert result["speed"]["generated"]["images_per_second"] < result["speed"]["extractors_only_images_per_second"]
    assert 0 < result["speed"]["loading_seconds"]["generated"] < result["speed"]["generated"]["seconds"]
    assert r"images\_per\_second" in (out / "report.md").read_text()
    assert len(result["memorization"]["closest"]) == 12
    calls = {name: extractor.calls for name, extractor in networks.items()}
    again = evaluate(
        request_of(protocol, coco, out, model=str(model), save_images=True, training=str(coco / "val2017"))
    )
    assert again is not None
    assert again["scores"] == result["scores"]
    assert again["speed"]["generated"]["images"] == 0  # nothing was missing
    assert {name: extractor.calls for name, extractor in networks.items()} == calls  # all from the chunks


def test_interrupted_or_shared_runs_give_equal_scores(
    networks: dict[str, StubExtractor],
    protocol: str,
    coco: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = evaluate(request_of(protocol, coco, tmp_path / "alone", model=str(model)))
    shared = tmp_path / "shared"
    others = [request_of(protocol, coco, shared, model=str(model), share=Share(rank=r, world=3)) for r in (2, 1, 0)]
    results = [evaluate(other) for other in others]
    assert results[:2] == [None, None]
    assert results[2] is not None
    assert alone is not None
    assert results[2]["scores"] == alone["scores"]

    shown = GeneratedImages.load

    def killed(self: GeneratedImages, indices: Sequence[int]) -> Any:
        if 7 in indices:
            raise KeyboardInterrupt
        return shown(self, indices)

    monkeypatch.setattr(GeneratedImages, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request_of(protocol, coco, tmp_path / "killed", model=str(model)))
    assert not (tmp_path / "killed" / "result.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(opening, "load_extractor", lambda name, *_, **__: networks[name])
    resumed = evaluate(request_of(protocol, coco, tmp_path / "killed", model=str(model)))
    assert resumed is not None
    assert resumed["scores"] == alone["scores"]


def test_distance_of_too_few_samples_is_marked(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    result = evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model), changes={"captions": 5}))
    distances = [*scores(result, "fid"), *scores(result, "frechet")]  # of 5 features
    assert distances
    assert all(row["rank_deficient"] is True for row in distances)
    assert not any("rank_deficient" in row for row in scores(result, "is"))
    assert result is not None
    assert not any("certainty" in line for line in result["left_out"])
    assert "‡ no more samples than features" in (tmp_path / "out/report.md").read_text()


def external(
    folder: Path, protocol: Protocol, dataset: EvalDataset, excluded: frozenset[str] = frozenset()
) -> GeneratedSet:
    (group,) = protocol.groups.values()
    return read_from_folder(folder, group.captions, protocol.image, dataset, name=protocol.name, excluded=excluded)


def test_external_images_are_counted_by_size(make: Any) -> None:
    for number in range(26):
        make.image(make.root / f"{number:02}.png", (8 + number // 2, 8) if number < 20 else (99, 8))
    folder = read_dataset("folder", make.root, "all")
    generated = external(make.root, find_protocol("folder"), folder)
    sizes = generated.record["sizes"]
    assert list(sizes.items())[:2] == [("99x8", 6), ("8x8", 2)]
    assert sizes["other"] == 6
    assert (len(sizes), sum(sizes.values())) == (9, 26)


LEAVES_OUT = PROTOCOL.replace("seed: 0}", "seed: 0, exclusions: true}").replace("count: 12, ", "")


def test_external_images_with_dm_gan_names_are_excluded_by_name(make: Any) -> None:
    coco, generated = make.coco("val2017"), make.root / "sampled"
    for number in (4, 9, 25):
        for turn in range(2):
            make.image(generated / f"single/{number:012d}_s-1_{turn}.png", (16, 16), seed=number + turn)
    make.image(generated / "single/another.png", (16, 16))
    (make.root / "toy.yaml").write_text(LEAVES_OUT)
    protocol, benchmark = find_protocol(make.root / "toy.yaml"), read_dataset("coco", coco, "val2017")
    excluded = frozenset([f"{9:012d}"])
    found = external(generated, protocol, benchmark, excluded)
    assert [key for key in found.keys if "_s-1_" in key] == [
        f"single/{number:012d}_s-1_{turn}" for number in (4, 25) for turn in range(2)
    ]
    assert found.concepts == [*[f"{4:012d}"] * 2, *[f"{25:012d}"] * 2, "single/another"]
    assert (found.record["named_as_dataset"], found.record["excluded"]) == (6, 2)
    for path in (generated / "single").iterdir():
        path.rename(path.with_stem("no-" + path.stem))
    with pytest.raises(ValueError, match=r"toy excludes images by name, but none of the 7 in .* KEY\.png"):
        external(generated, protocol, benchmark, excluded)


def test_external_images_get_class_of_unique_namesake(make: Any) -> None:
    benchmark, generated = read_dataset("cub", make.cub(), "train"), make.root / "sampled"
    for path in ("single/001.Tern/Tern_0001_11_s-1_0.png", "002.Wren/Wren_0001_21.png", "x/Wren_0002_22_s0_12.png"):
        make.image(generated / path)
    found = external(generated, find_protocol("folder"), benchmark)
    assert found.concepts == ["002.Wren", "001.Tern", "002.Wren"]
    twice = replace(benchmark, items=(*benchmark.items, replace(benchmark.items[0], key="other/Tern_0001_11")))
    found = external(generated, find_protocol("folder"), twice)
    assert found.concepts[1] == "single/001.Tern/Tern_0001_11_s-1_0"  # of which of the two is not known


def test_folder_of_images_is_scored_without_model(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, tmp_path: Path
) -> None:
    del networks
    result = evaluate(
        request_of(protocol, coco, tmp_path / "out", images=coco / "val2017", changes={"captions": IMAGES})
    )
    assert scores(result, "fid", family="inception-2015", blur=0)[0]["value"] == pytest.approx(0, abs=1e-9)
    assert all(row["at_infinity"] < 1e-9 for row in scores(result, "fid"))  # below 0: the bias is taken away
    assert not scores(result, "clip_score")  # there are no captions with them
    assert result is not None
    assert any("clip_score: the images have no captions" in line for line in result["left_out"])
    assert result["source"]["sizes"] == {"24x20": IMAGES}
    assert {row["candidates"] for row in result["scores"]} == {None}


def test_skipped_entries_are_listed(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    data = shutil.copytree(coco, tmp_path / "data")
    (data / "val2017" / "000000000003.jpg").unlink()
    result = evaluate(request_of(protocol, data, tmp_path / "out", model=str(model)))
    assert result is not None
    assert result["groups"]["all"]["dataset"]["skipped"] == 1
    assert result["groups"]["all"]["dataset"]["skipped_names"] == ["000000000003"]


def test_copies_network_can_be_chosen(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    more = {"model": str(model), "training": str(coco / "val2017")}
    result = evaluate(request_of(protocol, coco, tmp_path / "out", copies_network="clip", **more))
    assert result is not None
    assert (result["memorization"]["network"], result["memorization"]["network_sha256"]) == ("clip", "clip")
    with pytest.raises(ValueError, match="--copies-network mobilenet: the networks of this evaluation are inception"):
        evaluate(request_of(protocol, coco, tmp_path / "other", copies_network="mobilenet", **more))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "either --model, which generates images, or --images"),
        ({"changes": {"captions": 27}}, "26 captions by the rule 'one'"),
        ({"model": None, "images": Path("absent")}, "absent"),
        ({"threshold": 2.0}, "--threshold must be a cosine"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"networks": {"inception-2015": Path("gone"), "dmgan": UNUSED, "clip": UNUSED}},
         "--network inception-2015=gone: there is no such file or folder; expected"),
        ({"exclusions": Path("some.txt")}, "excludes no images"),
        ({"layout": "cub"}, "unknown layout 'cub'"),
        ({"changes": {"top_k": 0}}, "top_k must be an integer of at least 1"),
        ({"changes": {"seed": -1}}, "seed must be an integer of at least 0, got -1"),
        ({"changes": {"guidance_scale": -1}}, "guidance_scale must be a finite number"),
        ({"changes": {"guidance_scale": float("nan")}}, "guidance_scale must be a finite number"),
        ({"model": None, "images": Path("x"), "batch_size": 64}, "--batch-size and sampling options need --model"),
        ({"networks": {"clip": UNUSED}}, r"(?s)fid, is.*dmgan .*--leave-out inception-2015 --leave-out dmgan"),
        ({"leave_out": ("clip",)}, "--leave-out clip: it is given with --network"),
        ({"leave_out": ("mobilenet",)}, "--leave-out mobilenet: toy does not need it"),
    ],
)  # fmt: skip
def test_wrong_request_raises_before_model_is_loaded(
    options: dict[str, Any],
    message: str,
    networks: dict[str, StubExtractor],
    protocol: str,
    coco: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del networks
    monkeypatch.setattr(evaluation.DallePipeline, "from_pretrained", None)
    with pytest.raises((ValueError, ExtractorFileError), match=message):
        evaluate(request_of(protocol, coco, tmp_path / "out", **{"model": str(model), **options}))
    assert not (tmp_path / "out").exists()


def test_metrics_without_network_are_left_out_and_listed(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    result = evaluate(
        request_of(
            protocol,
            coco,
            tmp_path / "out",
            model=str(model),
            networks={"inception-2015": UNUSED},
            leave_out=("dmgan", "clip"),
        )
    )
    assert result is not None
    assert {"fid: the network dmgan was left out", "clip_score: the network clip was left out"} <= {
        *result["left_out"]
    }
    assert "ranker" in result["extractors"]  # the model's own


def test_other_evaluation_in_same_folder_raises(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))
    with pytest.raises(ValueError, match=r"another evaluation \(protocol.overridden"):
        evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model), changes={"seed": 1}))


def test_changed_pixels_in_file_of_equal_size_are_computed_again(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(coco, data)
    first, other = sorted((data / "val2017").iterdir())[:2]
    size = max(first.stat().st_size, other.stat().st_size)
    for path in (first, other):  # bytes after the end of an image say nothing
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    before = evaluate(request_of(protocol, data, tmp_path / "before", model=str(model), cache=cache))
    first.write_bytes(other.read_bytes())
    after = evaluate(request_of(protocol, data, tmp_path / "after", model=str(model), cache=cache))
    assert before is not None
    assert after is not None
    assert before["groups"]["all"]["dataset"]["sha256"] != after["groups"]["all"]["dataset"]["sha256"]
    assert scores(before, "fid")[0]["value"] != scores(after, "fid")[0]["value"]


def test_reference_unlike_record_raises(
    networks: dict[str, StubExtractor], coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    path = tmp_path / "toy.yaml"
    record = "reference: [{family: inception-2015, mean_norm: 5.0, trace: 1.0, tolerance: 0.01}]"
    path.write_text(PROTOCOL + record)
    out = tmp_path / "out"
    for share in (Share(rank=1, world=2), Share(rank=0, world=2), Share(rank=1, world=2)):  # all of them stop
        with pytest.raises(SelfCheckError, match=r"norm of the mean, as on record: 1\.\d+, expected 5, within 0\.01"):
            evaluate(request_of(str(path), coco, out, model=str(model), share=share))
        assert [file.name for file in out.iterdir()] == [".cache"]  # the folder is free for the right data
    measured = {json.loads(file.read_text())["source"]["kind"] for file in out.rglob("run.json")}
    assert measured == {"files"}  # nothing was sampled
    assert not list(out.rglob("*.claim"))


def test_no_process_generates_before_reference_is_checked(
    networks: dict[str, StubExtractor],
    protocol: str,
    coco: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del networks
    checked: list[int] = []

    def check(*arguments: Any, **options: Any) -> SelfCheck:
        checked.append(1)
        return check_reference(*arguments, **options)

    monkeypatch.setattr(evaluation, "check_reference", check)
    out = tmp_path / "out"
    for rank, checks in ((1, 1), (2, 1), (0, 2), (1, 2)):  # the first to come, and the one that writes the result
        evaluate(request_of(protocol, coco, out, model=str(model), share=Share(rank=rank, world=3)))
        assert len(checked) == checks
        assert (out / "run.json").exists() == (checks == 2)


def test_damaged_chunk_raises_with_its_name(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))
    chunk = sorted((tmp_path / "out" / ".cache").rglob("*.safetensors"))[0]
    chunk.write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{chunk.name} cannot be read .* delete it and run"):
        evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))


def test_fewer_than_two_samples_raise(tmp_path: Path) -> None:
    class One:
        identity: dict[str, Any] = {}  # noqa: RUF012
        counts = [1]  # noqa: RUF012

        def __len__(self) -> int:
            return 1

        def load(self, indices: Sequence[int]) -> Any: ...

    with pytest.raises(ValueError, match="at least 2 samples"):
        FeatureStore(One(), {}, (0,), 4, tmp_path)


CUB = """
name: toy-birds
title: made-up birds
dataset: {cub: test}
captions: {rule: unique}
num_images: {cub: 2}
image: {crop: box, size: 16}
sampling: {candidates: 1, chunk: 3}
metrics: [{fid: {extractor: dmgan}}]
"""


def test_dataset_images_are_cropped_to_boxes_and_external_images_are_not(
    networks: dict[str, StubExtractor], make: Any, model: Path, tmp_path: Path
) -> None:
    del networks
    cub = make.cub()
    path = tmp_path / "birds.yaml"
    path.write_text(CUB)
    given = {"dmgan": UNUSED}
    training = str(cub / "images" / "001.Tern")
    generated = evaluate(
        request_of(str(path), cub, tmp_path / "sampled", model=str(model), networks=given, training=training)
    )
    assert scores(generated, "fid")[0]["samples"] == 19  # of twenty captions one is shared by both
    assert generated is not None
    assert generated["memorization"]["training_images"] == 2
    elsewhere = cub / "images" / "002.Wren"
    read = evaluate(request_of(str(path), cub, tmp_path / "read", images=elsewhere, networks=given))
    assert scores(read, "fid")[0]["samples"] == 2
    (cub / "bounding_boxes.txt").unlink()
    with pytest.raises(ValueError, match=r"2 images of cub:test, such as .* have none: is there a bounding_boxes"):
        evaluate(request_of(str(path), cub, tmp_path / "boxless", images=elsewhere, networks=given))
    assert not (tmp_path / "boxless").exists()


def test_incomplete_dataset_raises(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    path = tmp_path / "counted.yaml"
    path.write_text(Path(protocol).read_text() + "num_images: {coco: 30}\n")
    with pytest.raises(ValueError, match=r"is defined for the 30 captioned images of coco:val2017, .* has 26"):
        evaluate(request_of(str(path), coco, tmp_path / "out", model=str(model)))


def test_images_missing_after_interruption_are_written(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    out = tmp_path / "out"
    evaluate(request_of(protocol, coco, out, model=str(model)))
    assert not (out / "images").exists()
    evaluate(request_of(protocol, coco, out, model=str(model), save_images=True))
    files = sorted((out / "images").iterdir())
    assert [path.suffix for path in files] == [".png", ".txt"] * 12
    before = files[4].read_bytes()
    files[4].unlink()
    evaluate(request_of(protocol, coco, out, model=str(model), save_images=True))
    assert files[4].read_bytes() == before
    # What was written can be scored as images of another system, captions and all.
    read = evaluate(request_of(protocol, coco, tmp_path / "read", images=out / "images"))
    generated = json.loads((out / "result.json").read_text())
    for metric in ("fid", "clip_score"):
        assert scores(read, metric)[0]["value"] == pytest.approx(scores(generated, metric)[0]["value"])


def test_curve_uses_best_of_first_candidates(model: Path) -> None:
    pipe = DallePipeline.from_pretrained(model)
    captions = ["a cat", "a dog", "two birds"]
    many = GeneratedImages(pipe, captions, SamplingRule(candidates=6, curve=(1, 2, 6)), batch_size=4, every=True)
    batch = many.load(range(3))
    few = GeneratedImages(pipe, captions, SamplingRule(candidates=2)).load(range(3))
    assert batch.chosen[1] == [0, 0, 0]
    assert batch.chosen[2] == few.chosen[2]
    for number, caption in enumerate(captions):
        assert torch.equal(batch.images[2][number], few.images[2][number])
        candidates = torch.stack(batch.images[EVERY][6 * number : 6 * number + 6])
        assert pipe.ranker is not None
        best = int(pipe.ranker.scores(candidates.float() / 255, [caption] * 6).argmax())
        assert batch.chosen[6][number] == best
        assert torch.equal(batch.images[6][number], candidates[best])


def test_command_generates_evaluates_and_reports(
    networks: dict[str, StubExtractor],
    protocol: str,
    coco: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del networks
    given = [f"--network={name}={UNUSED}" for name in ("inception-2015", "dmgan", "clip")]
    arguments = ["eval", protocol, "--model", str(model), "--data", str(coco), "--out", str(tmp_path / "out"), *given]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    asked = json.loads((tmp_path / "out" / "result.json").read_text())["run"]["command"]
    assert shlex.split(asked) == ["dalle-zoo", *arguments]
    assert main([*arguments, "--copies-network", "clip"]) == 2
    assert "--copies-network needs --training" in capsys.readouterr().err
    assert "| **toy** | measured |" in printed
    assert "left out: kid: subsets of 1000" in printed
    assert main([*arguments, "--network", "clip=y"]) == 2
    assert "--network names 'clip' twice" in capsys.readouterr().err
    assert main([*arguments, "--device", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dalle-zoo eval: device 'nonsense' cannot be used")
    assert said.count("\n") == 1
    assert main(["eval", "coco30k", "--model", "composition"]) == 2
    assert "Did you mean 'coco-30k'" in capsys.readouterr().err
    assert main(["eval", "coco-30k", "--model", str(model), "--data", str(coco)]) == 2
    missing = capsys.readouterr().err
    assert "weights-inception-2015-12-05-6726825d.pth (sha256 6726825d0af5" in missing
    assert "--leave-out inception-2015" in missing


def test_copies_are_searched_in_shards_by_all_processes(
    networks: dict[str, StubExtractor], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    shard = tmp_path / "00000.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted((coco / "val2017").iterdir()):
            archive.add(path, path.name)
        broken = tarfile.TarInfo("broken.jpg")
        broken.size = 9
        archive.addfile(broken, io.BytesIO(b"no images"))
    found = {}
    for name, training in (("folder", coco / "val2017"), ("shards", shard)):
        request = request_of(protocol, coco, tmp_path / name, model=str(model), training=str(training))
        assert evaluate(replace(request, share=Share(rank=1, world=2))) is None
        cache = sorted((tmp_path / name / ".cache").glob("inception-2015-*"))
        chunks = {len(list(folder.glob("*.safetensors"))) for folder in cache}
        # Every other one of 26 or 27 images and of 12 in chunks of 5; and the complete reference, to check it.
        assert chunks == {6, 3, 1}
        result = evaluate(replace(request, share=Share(rank=0, world=2)))
        assert result is not None
        found[name] = result["memorization"]
    assert (found["folder"]["training_images"], found["folder"]["unreadable"]) == (26, 0)
    assert (found["shards"]["training_images"], found["shards"]["unreadable"]) == (27, 1)
    assert found["shards"]["closest"] == found["folder"]["closest"]
    del networks


def test_overlaps_are_written_as_exclusion_list(
    networks: dict[str, StubExtractor],
    protocol: str,
    coco: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del networks
    training = tmp_path / "training"
    training.mkdir()
    for number in (3, 7):
        name = f"{number:012d}.jpg"
        (training / name).write_bytes((coco / "val2017" / name).read_bytes())
    out = tmp_path / "overlaps.txt"
    arguments = ["overlap", protocol, "--data", str(coco), "--training", str(training), "--network", "clip=x"]
    assert main([*arguments, "--threshold", "0.999999", "--out", str(out)]) == 0
    assert "2 of 26 images" in capsys.readouterr().out
    assert load_exclusions(out) == {f"{number:012d}" for number in (3, 7)}
    assert out.with_suffix(".png").is_file()
    head = out.read_text().splitlines()[0]
    digests = [TrainingImages(training, "center", 16).identity["source"], read_dataset("coco", coco, "val2017")]
    assert head == (
        f"# coco:val2017 (sha256 {digests[1].sha256()}) in training, a training set of 2 images (sha256 of names "
        f"and sizes {digests[0]}), clip (sha256 clip) cosine at least 0.999999"
    )
    assert main([*arguments, "--threshold", "7", "--out", str(out)]) == 2
