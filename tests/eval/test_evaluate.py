"""A protocol from benchmark and model to result file, on made-up data and networks of a few numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval import judges
from dalle_zoo_eval.evaluate import Request, evaluate
from dalle_zoo_eval.measuring import Measurement, Share
from dalle_zoo_eval.networks import NetworkFileError
from dalle_zoo_eval.selfcheck import SelfCheckError
from dalle_zoo_eval.subjects import DrawnPictures
from PIL import Image
from torch import Tensor

PICTURES = 26
PROTOCOL = """
name: toy
title: made-up pictures
benchmark: {coco: val2017}
captions: {rule: one, count: 12, seed: 0}
picture: {crop: center, size: 16}
sampling: {candidates: 2, curve: [1, 2], chunk: 5}
blur: [0, 2]
metrics: [fid, is, kid, precision, recall, clip_score, r_precision]
fid_families: [inception-2015, dmgan]
is_splits: 2
published: [coco]
"""


class Judge:
    """Features that are means of pixels, of channels and of halves."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        self.name, self.scale = name, scale
        self.record: dict[str, str | int] = {"name": name, "sha256": str(scale), "pixels": 16, "resize": "none"}
        self.calls = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.scale * images.float() / 255
        features = torch.cat([x.mean((2, 3)), x[:, :, : x.shape[2] // 2].mean((2, 3))[:, :2]], 1)
        return {"features": features, "logits": 9 * features}

    def text_features(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([torch.tensor([len(c), c.count("a"), c.count("b"), 1, 2]).float() for c in captions])


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Judge]:
    made: dict[str, Judge] = {}

    def load(name: str, location: Path, device: str) -> Judge:
        del location, device
        return made.setdefault(name, Judge(name, {"dmgan": 0.5}.get(name, 1.0)))

    monkeypatch.setattr(judges, "load_network", load)
    return made


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise in MS-COCO's layout."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    (root / "val2017").mkdir()
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for number in range(PICTURES):
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
    given = {name: Path("unused") for name in ("inception-2015", "dmgan", "clip", "ranker")}
    return Request(protocol=protocol, data=coco, out=out, **{"networks": given, **more})


def scores(result: dict[str, Any] | None, metric: str, **fields: Any) -> list[dict[str, Any]]:
    assert result is not None
    return [r for r in result["scores"] if r["metric"] == metric and all(r[k] == v for k, v in fields.items())]


def test_from_captions_to_report(
    networks: dict[str, Judge], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = evaluate(request_of(protocol, coco, out, model=str(model), save_pictures=True, training=coco / "val2017"))
    assert result is not None
    assert {p.name for p in out.iterdir()} >= {
        "result.json",
        "report.md",
        "report.html",
        "samples.png",
        "captions.jsonl",
    }
    assert len(list((out / "pictures").glob("*.png"))) == 12
    assert {(r["family"], r["blur"], r["candidates"]) for r in scores(result, "fid")} == {
        (family, *rest) for family in ("inception-2015", "dmgan") for rest in ((0, 2), (2, 2), (0, 1))
    }
    for row in scores(result, "fid"):
        assert (row["samples"], row["reference_samples"]) == (12, PICTURES)
    whole, half = (scores(result, "fid", family=f, blur=0, candidates=2)[0] for f in ("inception-2015", "dmgan"))
    assert half["value"] == pytest.approx(whole["value"] / 4)  # features of half the size
    assert whole["interval"][0] < whole["value"] < whole["interval"][1]
    assert len(scores(result, "is")) == 3
    assert {r["metric"] for r in result["scores"]} == {"fid", "is", "precision", "recall", "clip_score", "frechet"} | (
        {"r_precision"} & {r["metric"] for r in result["scores"]}
    )
    assert any("kid" in line and "1000" in line for line in result["left_out"])
    assert all(check["passed"] for check in result["selfcheck"])
    assert result["memorisation"]["network"] == "inception-2015"
    assert len(result["memorisation"]["closest"]) == 12
    calls = {name: judge.calls for name, judge in networks.items()}
    again = evaluate(request_of(protocol, coco, out, model=str(model), save_pictures=True, training=coco / "val2017"))
    assert again is not None
    assert again["scores"] == result["scores"]
    assert {name: judge.calls for name, judge in networks.items()} == calls  # all from the chunks


def test_killed_or_shared_runs_give_the_same_scores(
    networks: dict[str, Judge],
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

    shown = DrawnPictures.show

    def killed(self: DrawnPictures, indices: Sequence[int]) -> Any:
        if 7 in indices:
            raise KeyboardInterrupt
        return shown(self, indices)

    monkeypatch.setattr(DrawnPictures, "show", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(request_of(protocol, coco, tmp_path / "killed", model=str(model)))
    assert not (tmp_path / "killed" / "result.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(judges, "load_network", lambda name, *_: networks[name])
    resumed = evaluate(request_of(protocol, coco, tmp_path / "killed", model=str(model)))
    assert resumed is not None
    assert resumed["scores"] == alone["scores"]


def test_a_folder_of_pictures_is_scored_without_a_model(
    networks: dict[str, Judge], protocol: str, coco: Path, tmp_path: Path
) -> None:
    del networks
    result = evaluate(request_of(protocol, coco, tmp_path / "out", images=coco / "val2017", captions=PICTURES))
    assert scores(result, "fid", family="inception-2015", blur=0)[0]["value"] == pytest.approx(0, abs=1e-9)
    assert not scores(result, "clip_score")  # there are no captions beside them
    assert result is not None
    assert any("clip_score: the pictures have no captions" in line for line in result["left_out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "either --model, which draws, or --images"),
        ({"captions": 27}, "26 captions by the rule 'one'"),
        ({"exclusions": Path("some.txt")}, "leaves no picture out"),
        ({"layout": "cub"}, "unknown layout 'cub'"),
        ({"sampling": {"top_k": 0}}, "top_k must be a count of at least 1"),
        ({"networks": {"clip": Path("x")}}, "inception-2015 .*fid, is.*; dmgan .*--leave-out dmgan"),
        ({"leave_out": ("clip",)}, "--leave-out clip: it is given with --network"),
        ({"leave_out": ("mobilenet",)}, "--leave-out mobilenet: toy does not need it"),
    ],
)
def test_a_wrong_request_stops_before_work(
    options: dict[str, Any],
    message: str,
    networks: dict[str, Judge],
    protocol: str,
    coco: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    del networks
    with pytest.raises((ValueError, NetworkFileError), match=message):
        evaluate(request_of(protocol, coco, tmp_path / "out", **{"model": str(model), **options}))
    assert not (tmp_path / "out").exists()


def test_metrics_without_a_network_are_left_out_by_name(
    networks: dict[str, Judge], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    result = evaluate(
        request_of(
            protocol,
            coco,
            tmp_path / "out",
            model=str(model),
            networks={"inception-2015": Path("x")},
            leave_out=("dmgan", "clip"),
        )
    )
    assert result is not None
    assert {"fid: the network dmgan was left out", "clip_score: the network clip was left out"} <= {
        *result["left_out"]
    }
    assert "ranker" in result["networks"]  # the model's own


def test_another_evaluation_in_the_same_folder_is_refused(
    networks: dict[str, Judge], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))
    with pytest.raises(ValueError, match=r"holds another evaluation \(subject: .*choose another --out"):
        evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model), sampling={"seed": 1}))


def test_a_reference_unlike_the_recorded_one_stops_the_run(
    networks: dict[str, Judge], coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    path = tmp_path / "toy.yaml"
    record = "reference: [{family: inception-2015, count: 26, mean_norm: 5.0, trace: 1.0, tolerance: 0.01}]"
    path.write_text(PROTOCOL + record)
    with pytest.raises(SelfCheckError, match=r"norm of the mean, relative to that recorded: -0\.\d+"):
        evaluate(request_of(str(path), coco, tmp_path / "out", model=str(model)))
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_damaged_chunk_is_named(
    networks: dict[str, Judge], protocol: str, coco: Path, model: Path, tmp_path: Path
) -> None:
    del networks
    evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))
    chunk = sorted((tmp_path / "out" / ".cache").rglob("*.safetensors"))[0]
    chunk.write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{chunk.name} cannot be read .* delete it and run"):
        evaluate(request_of(protocol, coco, tmp_path / "out", model=str(model)))


def test_a_measurement_needs_two_samples(tmp_path: Path) -> None:
    class One:
        identity: dict[str, Any] = {}  # noqa: RUF012
        counts = [1]  # noqa: RUF012

        def __len__(self) -> int:
            return 1

        def show(self, indices: Sequence[int]) -> Any: ...

    with pytest.raises(ValueError, match="at least 2 samples"):
        Measurement(One(), {}, (0,), 4, tmp_path)
