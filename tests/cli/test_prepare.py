"""``dalle-zoo manifest | filter | tokenizer | encode``: what training reads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dalle_zoo.cli.main import main
from dalle_zoo.data import CodeDataset, shards
from dalle_zoo.files import sha256_file
from dalle_zoo.tokenizers import load_text_tokenizer


def test_encode_writes_code_shards(
    model: Path, images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", str(images), "--model", str(model), "--out", "codes", "--variants", "2"]
    assert main(command) == 0
    assert "codes: 5 samples, 1 shards" in capsys.readouterr().out
    codes = CodeDataset(scratch / "codes")
    assert (len(codes), codes.grid, codes.codebook_size, codes.variants) == (5, (4, 4), 8, 2)
    manifest = json.loads((scratch / "codes/manifest.json").read_text())
    assert manifest["tokenizer"]["weights_sha256"] == sha256_file(model / "dvae" / "model.safetensors")
    shard = (scratch / "codes/codes-00000.tar").read_bytes()
    assert main(command) == 2
    assert "holds a finished encoding" in capsys.readouterr().err
    assert main([*command, "--batch-size", "3", "--overwrite"]) == 0
    assert (scratch / "codes/codes-00000.tar").read_bytes() == shard
    assert main([*command, "--samples-per-shard", "2", "--overwrite"]) == 0
    assert "codes: 5 samples, 3 shards" in capsys.readouterr().out
    assert [path.name for path in scratch.iterdir()] == ["codes"]


def test_encode_in_bfloat16_records_precision(model: Path, images: Path, scratch: Path) -> None:
    command = ["encode", str(images), "--model", str(model)]
    assert main([*command, "--out", "exact"]) == 0
    assert main([*command, "--out", "half", "--dtype", "bfloat16"]) == 0
    exact, half = CodeDataset(scratch / "exact"), CodeDataset(scratch / "half")
    assert "dtype" not in exact.manifest["tokenizer"]
    assert half.manifest["tokenizer"]["dtype"] == "bfloat16"
    equal = [float((a["codes"] == b["codes"]).float().mean()) for a, b in zip(exact, half, strict=True)]
    assert sum(equal) / len(equal) > 0.8


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nowhere", [], "location 'nowhere' does not exist"),
        ("composition:trian", [], "Did you mean 'train'?"),
        (None, ["--variants", "0"], "variants must be"),
        (None, ["--device", "cdua"], "device 'cdua' cannot be used"),
        (None, ["--model", "compositoin"], "unknown model 'compositoin'"),
        (None, ["--compile"], "--compile needs a GPU"),
    ],
)
def test_encode_with_wrong_options_raises(
    data: str | None,
    options: list[str],
    message: str,
    model: Path,
    images: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["encode", data or str(images), "--model", str(model), "--out", "codes", *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


def test_tokenizer_is_trained_on_all_captions(images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", str(images), "--vocab-size", "270", "--out", "tokenizer"]
    assert main(command) == 0
    assert "tokenizer: 270 entries; tokens per caption: median" in capsys.readouterr().out
    tokenizer = load_text_tokenizer(scratch / "tokenizer")
    assert tokenizer.vocab_size == 270
    assert tokenizer.decode(tokenizer.encode("an image")) == "an image"
    assert tokenizer.words is not None
    assert "image" in tokenizer.words  # kept by every copy of the tokenizer
    before = (scratch / "tokenizer/tokenizer.json").read_bytes()
    assert main([*command[:3], "265", *command[4:]]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (scratch / "tokenizer/tokenizer.json").read_bytes() == before
    assert main([*command[:3], "265", *command[4:], "--overwrite"]) == 0
    assert load_text_tokenizer(scratch / "tokenizer").vocab_size == 265


def test_overwrite_does_not_delete_unrelated_files(
    images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scratch / "thesis").write_text("mine")
    assert main(["tokenizer", str(images), "--vocab-size", "270", "--out", ".", "--overwrite"]) == 2
    assert "is not replaced (it has no tokenizer_config.json)" in capsys.readouterr().err
    assert [path.name for path in scratch.iterdir()] == ["thesis"]


def test_tokenizer_without_captions_raises(
    images: Path, tmp_path_factory: pytest.TempPathFactory, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = tmp_path_factory.mktemp("mute")
    (mute / "0.png").write_bytes((images / "0.png").read_bytes())
    assert main(["tokenizer", str(mute), "--out", "tokenizer"]) == 2
    assert "holds no captions" in capsys.readouterr().err
    assert main(["tokenizer", str(images), "--vocab-size", "10", "--out", "tokenizer"]) == 2
    assert "vocab_size must be at least 256" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


def test_tokenizer_training_skips_bad_captions(
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    for key, caption in (("0", b"an image"), ("1", b"caf\xe9")):
        (folder / f"{key}.png").write_bytes((images / "0.png").read_bytes())
        (folder / f"{key}.txt").write_bytes(caption)
    assert main(["tokenizer", str(folder), "--vocab-size", "256", "--out", "tokenizer"]) == 0
    assert "256 entries" in capsys.readouterr().out
    assert "skipped 1: a caption is not valid Unicode" in caplog.text
    assert "1 samples or parts of files are not used" in caplog.text


def test_filter_prints_what_it_drops(images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["filter", str(images), "--out", "kept", "--any-language", "--min-words", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "kept: 5 of 5 samples kept; dropped:" in printed
    assert "0  duplicate" in printed
    before = (scratch / "kept/00000.tar").read_bytes()
    assert main(command) == 0, "finished work is not done again"
    assert main([*command, "--samples-per-shard", "2"]) == 2
    assert "samples_per_shard was 10000 and is 2 now" in capsys.readouterr().err
    assert (scratch / "kept/00000.tar").read_bytes() == before
    assert main(["filter", str(images), "--out", "none", "--any-language", "--min-words", "0"]) == 2
    assert "min_words must be an integer of at least 1, got 0" in capsys.readouterr().err
    assert not (scratch / "none").exists()


def test_a_manifest_saves_counting(
    images: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["filter", str(images), "--out", "kept", "--any-language", "--samples-per-shard", "2"]) == 0
    assert main(["manifest", "kept"]) == 0, "the one of the filter is complete"
    (scratch / "kept/manifest.json").unlink()
    assert main(["manifest", "kept"]) == 0
    assert "kept/manifest.json: 5 samples in 3 shards" in capsys.readouterr().out
    written = json.loads((scratch / "kept/manifest.json").read_text())["shards"]
    assert [(shard["file"], shard["samples"]) for shard in written] == [
        ("00000.tar", 2), ("00001.tar", 2), ("00002.tar", 1)
    ]  # fmt: skip
    before = (scratch / "kept/manifest.json").read_bytes()
    (scratch / "kept/manifest.json").unlink()
    started = []

    def threads(count: int, _: object) -> ThreadPoolExecutor:  # processes take seconds to start
        started.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(shards, "ProcessPoolExecutor", threads)
    assert main(["manifest", "kept", "--processes", "2"]) == 0
    assert started == [2]
    assert (scratch / "kept/manifest.json").read_bytes() == before
    assert main(["manifest", "kept", "--processes", "0"]) == 2
    assert "--processes must be an integer of at least 1, got 0" in capsys.readouterr().err
    assert main(["manifest", "kept/{00000..00001}.tar", "--out", "some.json"]) == 0
    assert len(json.loads((scratch / "some.json").read_text())["shards"]) == 2


def test_manifest_refuses(images: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", str(images)]) == 2
    assert "has no shards: expected .tar" in capsys.readouterr().err
    assert main(["filter", str(images), "--out", "kept", "--any-language"]) == 0
    for mine, message in (('{"shards": [], "notes": 1}', "a file with notes"), ("text", "no JSON file")):
        (scratch / "kept/manifest.json").write_text(mine)
        assert main(["manifest", "kept"]) == 2
        assert f"is {message}, which would be lost" in capsys.readouterr().err
        assert (scratch / "kept/manifest.json").read_text() == mine


def test_processes_that_train_a_tokenizer_share_their_counts(
    images: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", str(images), "--vocab-size", "270"]
    assert main([*command, "--out", "alone"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*command, "--out", "together"]) == 2
    assert "name it with --counts DIR" in capsys.readouterr().err
    assert main([*command, "--out", "together", "--counts", "counts"]) == 0
    assert not (scratch / "together").exists(), "process 0 trains"
    monkeypatch.setenv("RANK", "0")
    assert main([*command, "--out", "together", "--counts", "counts"]) == 0
    for path in (scratch / "alone").iterdir():
        assert (scratch / "together" / path.name).read_bytes() == path.read_bytes()
