"""``dalle-zoo compare``: any two sets in one line, and statistics in the place of images."""

from __future__ import annotations

import argparse
import json
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dalle_zoo_eval import runner, sides, statistics
from dalle_zoo_eval.compare import _captions
from dalle_zoo_eval.extractors import load_extractor
from dalle_zoo_eval.extractors.pixels import PixelExtractor
from dalle_zoo_eval.generation import GeneratedImages
from dalle_zoo_eval.metrics.frechet import frechet_distance
from dalle_zoo_eval.moments import Moments, StatisticsError
from dalle_zoo_eval.rules import SamplingRule
from dalle_zoo_eval.sides import find_side, generate_side
from dalle_zoo_eval.statistics import NPZ_EXTRACTOR, StoredReference, load_statistics
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_zoo.cli.main import main
from dalle_zoo.sharing import Share

DISTANCE = "frechet:pixels"


@pytest.fixture
def folders(make: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Seven and eight images of several sizes; those of the first have captions."""
    for number in range(7):
        path = make.image(tmp_path / f"a/image {number}.png", (16 + number % 2, 12), seed=number)
        make.text(path.with_suffix(".txt"), f"caption {number}")
    for number in range(8):
        make.image(tmp_path / f"b/{number}.png", (20, 20), seed=100 + number)
    return tmp_path / "a", tmp_path / "b"


def compare(a: Path | str, b: Path | str, out: Path, *options: str) -> dict[str, Any]:
    assert main(["compare", str(a), str(b), "--out", str(out), *options]) == 0
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def values(result: dict[str, Any]) -> dict[str, float]:
    return {f"{row['metric']} {row['images']}": row["value"] for row in result["scores"]}


def features(folder: Path) -> Tensor:
    network = load_extractor("pixels", "")
    assert isinstance(network, PixelExtractor)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    return torch.cat([network(torch.from_numpy(i.copy()).permute(2, 0, 1)[None])["features"] for i in images])


def test_two_folders_need_nothing_else(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare(*folders, tmp_path / "out", "--name-a", "ours", "--name-b", "others")
    expected = frechet_distance(*(Moments.of(features(folder)) for folder in folders))
    assert values(result)["frechet generated"] == pytest.approx(expected, rel=1e-6)
    assert {"density generated", "coverage generated", "vendi generated", "vendi real"} <= set(values(result))
    assert result["source"]["name"] == "ours"
    assert result["groups"]["all"]["dataset"]["name"] == "others"
    needs = [
        f"{name}: 7 samples, and it needs 1,000 to be compared" for name in ("Density", "Coverage", "Vendi score")
    ]
    assert result["notes"] == needs
    shown = capsys.readouterr().out
    assert "| Fréchet distance, pixels |" in shown
    assert "Coverage: 7 samples" in shown
    report = (tmp_path / "out/report.md").read_text()
    assert "# ours against others" in report
    assert "| evaluated images | 7 |\n| images of others (reference) | 8 |" in report
    assert "| Vendi score, pixels, others (reference) |" in report
    assert "| Vendi score, pixels, evaluated images |" in report
    assert main(["report", str(tmp_path / "out/result.json"), "--name", "mine"]) == 0
    assert "# mine against others" in (tmp_path / "out/report.md").read_text()
    assert "radius" not in report.split("What was measured")[0]


def test_archives_and_manifests_are_what_is_in_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = folders
    expected = values(compare(a, b, tmp_path / "folder", "--metrics", DISTANCE))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(a.iterdir()):
            archive.write(path, f"inside/{path.name}")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for path in sorted(a.iterdir()):
            shard.add(path, path.name.replace(" ", ""))
    lines = [{"image_path": p.name, "prompt": p.with_suffix(".txt").read_text()} for p in sorted(a.glob("*.png"))]
    (a / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, side in enumerate((tmp_path / "a.zip", tmp_path / "a.tar", a / "manifest.jsonl", a)):
        found = compare(side, b, tmp_path / f"out{number}", "--metrics", DISTANCE)
        assert values(found) == expected
        assert found["source"]["captions_sha256"] is not None


def test_equal_sets_are_called_equal(folders: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = folders
    result = compare(a, a, tmp_path / "out", "--metrics", DISTANCE)
    assert values(result)["frechet generated"] == pytest.approx(0, abs=1e-9)
    assert result["notes"] == ["both sides hold the same images: distances are 0 except for rounding"]
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["samples.png"]


def test_missing_networks_are_named_together_before_any_work(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DALLE_ZOO_NETWORKS", str(tmp_path / "networks"))
    arguments = ["compare", *map(str, folders), "--metrics", "fid,cmmd,fd_dinov2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(f"{name} (for " in message for name in ("inception-2015", "clip-l14-336", "dinov2"))
    assert not (tmp_path / "out").exists()
    assert main([*arguments[:3], "--metrics", "fidd"]) == 2
    assert "Did you mean 'fid'" in capsys.readouterr().err


def test_statistics_take_the_place_of_images(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    file, metrics = tmp_path / "b.safetensors", ("--metrics", f"{DISTANCE},coverage:pixels")
    direct = compare(a, b, tmp_path / "direct", *metrics, "--save-reference", str(file))
    stored = compare(a, file, tmp_path / "stored", *metrics)
    assert values(stored) == pytest.approx(values(direct), rel=1e-12)
    assert stored["reference_file"]["sha256"] == load_statistics(file).sha256
    assert stored["scores"][0]["reference_samples"] == 8
    with pytest.raises(StatisticsError, match=r"b\.safetensors has no statistics of clip"):
        load_statistics(file).moments("clip")
    tensors = load_file(file)
    tensors["pixels/features"][0, 0] += 1e-3
    head = json.dumps({"format": "dalle-zoo reference statistics 1", "sha256": {}})
    save_file(tensors, file, metadata={"dalle_zoo": head})
    assert main(["compare", str(a), str(file), "--out", str(tmp_path / "damaged")]) == 2
    assert "is not what was saved" in capsys.readouterr().err
    assert main(["compare", str(file), str(a)]) == 2
    assert "give the images as A" in capsys.readouterr().err


def test_a_protocol_takes_statistics_too(folders: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    """The self-check compares what it can; the scores are those of the images themselves."""
    a, b = folders
    file = tmp_path / "b.safetensors"
    options = ["--leave-out", "inception-2015", "--leave-out", "ranker", "--network", f"clip={model / 'ranker'}"]
    evaluation = ["eval", "folder", "--images", str(a), "--data", str(b), *options]
    found = []
    for name, more in (("direct", ["--save-reference", str(file)]), ("stored", ["--reference", str(file)])):
        assert main([*evaluation, "--out", str(tmp_path / name), *more]) == 0
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert values(found[1]) == pytest.approx(values(found[0]), rel=1e-12)
    assert "frechet generated" in values(found[0])
    assert found[1]["reference_file"]["sha256"] == load_statistics(file).sha256
    assert any("self-check of clip by halves: the reference is b.safetensors" in line for line in found[1]["left_out"])


def test_statistics_of_other_weights_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    compare(*folders, tmp_path / "out", "--metrics", DISTANCE, "--save-reference", str(file))
    saved = load_statistics(file)
    saved.networks["pixels"] = "0" * 64  # type: ignore[index]
    with pytest.raises(StatisticsError, match="distances between the two mean nothing"):
        StoredReference(saved, {"pixels": load_extractor("pixels", "")}, 50)


def test_statistics_of_other_packages_are_read_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "d.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(StatisticsError, match=r"expected mu \(2048,\) and sigma \(2048, 2048\) of inception-2015"):
        load_statistics(tmp_path / "d.npz")
    monkeypatch.setattr(statistics, "NPZ_FEATURES", 4)
    rows = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments.of(rows)
    np.savez(tmp_path / "s.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    saved = load_statistics(tmp_path / "s.npz")
    assert frechet_distance(saved.moments(NPZ_EXTRACTOR), moments) == pytest.approx(0, abs=1e-9)
    assert saved.count is None
    np.savez(tmp_path / "p.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(StatisticsError, match="allow_pickle=False"):
        load_statistics(tmp_path / "p.npz")
    np.savez(tmp_path / "k.npz", feats=np.eye(2))
    with pytest.raises(StatisticsError, match="expected mu and sigma, got feats"):
        load_statistics(tmp_path / "k.npz")
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=np.triu(np.ones((4, 4))))
    with pytest.raises(StatisticsError, match="sigma is no covariance"):
        load_statistics(tmp_path / "a.npz")


def test_statistics_of_other_sizes_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    file = tmp_path / "b.safetensors"
    compare(a, b, tmp_path / "out", "--metrics", DISTANCE, "--size", "8", "--save-reference", str(file))
    assert main(["compare", str(a), str(file), "--out", str(tmp_path / "other")]) == 2
    assert "is of images with crop center, size 8" in capsys.readouterr().err
    assert compare(a, file, tmp_path / "same", "--metrics", DISTANCE, "--size", "8")["scores"]


def test_copies_of_training_images_are_found(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images of A are in the training set, and none of B."""
    a, b = folders
    (tmp_path / "training").mkdir()
    for name in ("image 2", "image 5"):
        (tmp_path / f"training/{name} again.png").write_bytes((a / f"{name}.png").read_bytes())
    options = ("--training", str(tmp_path / "training"), "--size", "12", "--threshold", "0.999")
    result = compare(a, b, tmp_path / "out", "--metrics", DISTANCE, *options, "--copies-network", "pixels")
    found = result["memorization"]
    assert (found["network"], found["threshold"], found["training_images"]) == ("pixels", 0.999, 2)
    assert found["share_above"] == pytest.approx(2 / 7)
    assert 0 <= found["interval"][0] < 2 / 7 < found["interval"][1]
    assert found["reference"]["share_above"] == 0
    pairs = [(pair["sample"], pair["training"]) for pair in found["closest"][:2]]
    assert sorted(pairs) == [("image 2", "image 2 again"), ("image 5", "image 5 again")]
    shown = capsys.readouterr().out
    assert "| a | 28.6" in shown
    assert "| reference images | 0.0" in shown
    assert (tmp_path / "out/memorization.png").is_file()


def test_processes_share_the_images_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images depend on neither the processes nor the batch size, and none is generated twice."""
    captions, generated = [f"thing {number}" for number in range(7)], []
    generate = GeneratedImages._generate

    def counted(self: GeneratedImages, indices: Sequence[int]) -> dict[str, Tensor]:
        generated.append(tuple(indices))
        return generate(self, indices)

    monkeypatch.setattr(GeneratedImages, "_generate", counted)
    monkeypatch.setattr(sides, "SamplingRule", partial(SamplingRule, chunk=2))

    def made(cache: str, batch_size: int | None, share: Share) -> dict[str, bytes]:
        folder, record = generate_side(
            str(model), captions, tmp_path / cache, seed=3, batch_size=batch_size, device="cpu", share=share
        )
        assert record["seed"] == 3
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    alone = made("alone", None, Share())
    assert sorted(alone) == sorted(f"{n:06d}.{ending}" for n in range(7) for ending in ("png", "txt"))
    generated.clear()
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda rank: made("shared", 3, Share(rank=rank, world=2)), range(2)))
    assert both == [alone, alone]
    assert sorted(generated) == [(0, 1), (2, 3), (4, 5), (6,)]


def test_a_model_generates_from_the_captions_of_the_other_side(
    folders: tuple[Path, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    options = ("--metrics", f"{DISTANCE},clip_logit:clip", "--network", f"clip={model / 'ranker'}")
    result = compare(model, a, tmp_path / "out", *options)
    assert result["scores"][0]["samples"] == 7
    assert {"frechet generated", "clip_logit generated"} == set(values(result))
    assert {name.split("/")[0] for name in result["source"]["weights_sha256"]} == {"dvae", "prior", "ranker"}
    assert main(["compare", str(model), str(b), "--out", str(tmp_path / "no")]) == 2
    assert "has 0 captions to generate from, expected at least 2: give more with --prompts" in capsys.readouterr().err


def test_prompts_are_chosen_by_seed(make: Any, tmp_path: Path) -> None:
    make.text(tmp_path / "prompts.txt", *(f"caption {number}" for number in range(20)))
    chosen = {
        seed: _captions(argparse.Namespace(prompts=tmp_path / "prompts.txt", captions=3, seed=seed), (), {})
        for seed in range(3)
    }
    assert len({tuple(captions) for captions in chosen.values()}) == 3
    for captions in chosen.values():
        assert captions == sorted(captions, key=lambda caption: int(caption.split()[1]))


def test_some_images_are_chosen_by_seed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = {}
    for seed in "012":
        result = compare(
            *folders, tmp_path / seed, "--metrics", DISTANCE, "--captions", "3", "--seed", seed,
            "--cache", str(tmp_path / "cache"),
        )  # fmt: skip
        row = result["scores"][0]
        assert (row["samples"], row["reference_samples"]) == (3, 3)
        chosen[seed] = result["source"]["sha256"]
    assert len(set(chosen.values())) > 1


def test_data_is_checked_before_networks_are_opened(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was opened")

    monkeypatch.setattr(runner, "open_extractors", opened)
    monkeypatch.setattr(sides.DallePipeline, "from_pretrained", opened)
    a, b = folders
    (tmp_path / "one").mkdir()
    (tmp_path / "one/x.png").write_bytes((a / "image 0.png").read_bytes())
    (tmp_path / "bad.npz").write_bytes(b"no statistics")
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    for arguments, message in (
        ((tmp_path / "one", b), "a comparison needs at least 2"),
        ((a, b, "--captions", "20"), "has 7 images, fewer than --captions 20"),
        ((b, a, "--captions", "8"), "has 7 images, fewer than --captions 8"),
        ((a, b, "--captions", "1"), "--captions must be an integer of at least 2"),
        ((a, b, "--batch-size", "2"), "--batch-size is that of a model, and neither side is a model"),
        ((a, b, "--save-reference", str(tmp_path / "x.npz")), "--save-reference must end in .safetensors"),
        ((a, b, "--cache", str(tmp_path / "file")), "--cache"),
        ((a, b, "--network", "clip=x", "--network", "clip=y"), "--network names 'clip' twice"),
        ((a, b, "--threshold", "0.9"), "--threshold needs --training"),
        ((a, tmp_path / "bad.npz"), "cannot be read as statistics"),
        (("composition", a, "--training", "nowhere", "--size", "8"), "'nowhere' does not exist"),
        (("composition", tmp_path / "bad.npz", "--prompts", str(tmp_path / "prompts.txt")), "read as statistics"),
        (("composition", a, "--captions", "9"), "fewer than --captions 9"),
        ((a, b, "--training", str(b)), "--training needs --size"),
        ((a, b, "--out", str(tmp_path / "file/out")), "is a file"),
    ):
        places, options = arguments[:2], ["--out", str(tmp_path / "out"), *map(str, arguments[2:])]
        assert main(["compare", *map(str, places), *options]) == 2
        assert message in capsys.readouterr().err


def test_sides_are_recognized(folders: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    kinds = {str(folders[0]): "folder", str(model): "model", "composition": "model", "composition:train": "archive"}
    kinds |= {str(tmp_path / "x.npz"): "statistics", "shards/*.tar": "archive", "org/name": "model"}
    assert {location: find_side(location).kind for location in kinds} == kinds
    with pytest.raises(ValueError, match="does not exist: expected a folder of images"):
        find_side("nowhere")
